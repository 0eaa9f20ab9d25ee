"""Memory-to-video as a diffusers pipeline (paper section 3.3): M2V, MI2V, MM2V, MR2V and plain text-to-video."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from einops import rearrange
from PIL import Image
from torch import Tensor

from storymem.wan.acceleration import check_shared_states, forget_steps
from storymem.wan.conditioning import (
    MOTION_FRAMES,
    TEMPORAL_STRIDE,
    blank_padded,
    decode_video,
    encode_frames,
    encode_video,
    latent_frames,
    memory_condition,
)
from storymem.wan.memory_attention import install_memory_attention, reading_memory
from storymem.wan.memory_guidance import hiding_memory
from storymem.wan.parallel import check_guidance
from storymem.wan.rope import DEFAULT_STRIDE, install_memory_rope
from storymem.wan.settings import MemoryCache

Memory = Sequence[Image.Image] | Sequence[Tensor] | Tensor


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What one call adds to the image-to-video pipeline; lives from ``__call__`` to its end."""

    memory: Tensor | None  # normalised latents [1, 16, M, h, w] that are denoised with the shot
    cached_memory: Tensor | None  # the same in the mode "cached", where the loop is of the shot alone
    given: Tensor | None  # first or motion frames [3, n, H, W] in -1..1
    rope_stride: int
    guide_memory: bool

    @property
    def memory_frames(self) -> int:
        return 0 if self.memory is None else self.memory.shape[2]

    @property
    def given_slots(self) -> int:
        return 0 if self.given is None else latent_frames(self.given.shape[1])


class WanMemoryToVideoPipeline(WanImageToVideoPipeline):
    """Wan2.2 image-to-video with memory: generates one shot that looks back at keyframes of earlier shots.

    Memory frames are encoded one by one and put before the shot's latents as extra slots, which are denoised with
    the rest, sit at negative temporal positions and are dropped before decoding. The denoising loop is inherited:
    callbacks, caching hooks, offloading, attention backends and quantised loading work as in diffusers.

    That is the published mode, ``joint``. In ``cached`` (see :mod:`storymem.wan.memory_attention`) memory slots are
    not denoised: they are computed once in a call, and only the shot's slots go round the loop.

    Args:
        rope_stride: S, the default distance between memory slots on the temporal axis; saved with the pipeline.
        memory_attention: ``joint`` or ``cached``; saved with the pipeline.

    Attributes:
        memory_cache: where ``cached`` keeps keys and values, see :class:`storymem.wan.settings.RuntimeSettings`.
        blank_latents: for callers that never change the VAE: a dictionary, empty at first, that keeps the latents of
            blank videos between calls, by (frames, height, width). None: they are computed in every call.

    The other arguments are those of ``diffusers.WanImageToVideoPipeline``; the transformers must have 36 input
    channels (16 noisy, 4 mask, 16 condition) and no image encoder, which is Wan2.2-I2V-A14B's shape.
    """

    _callback_tensor_inputs = [*WanImageToVideoPipeline._callback_tensor_inputs, "condition"]  # noqa: RUF012

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        scheduler: Any,
        image_processor: Any = None,
        image_encoder: Any = None,
        transformer: Any = None,
        transformer_2: Any = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        rope_stride: int = DEFAULT_STRIDE,
        memory_attention: str = "joint",
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            image_processor=image_processor,
            image_encoder=image_encoder,
            transformer=transformer,
            transformer_2=transformer_2,
            boundary_ratio=boundary_ratio,
            expand_timesteps=expand_timesteps,
        )
        self.register_to_config(rope_stride=rope_stride, memory_attention=memory_attention)
        if memory_attention not in ("joint", "cached"):
            raise ValueError(f"memory_attention must be joint or cached, not {memory_attention!r}")
        if expand_timesteps:
            raise ValueError("memory-to-video needs Wan2.2-A14B's conditioning; Wan2.2-TI2V-5B has another")
        for name, expert in self.experts.items():
            _check_expert(name, expert)
            install_memory_rope(expert)
            if memory_attention == "cached":
                install_memory_attention(expert)
        self.memory_cache: MemoryCache = "device"
        self.blank_latents: dict[tuple[int, int, int], Tensor] | None = None
        self._call: _Call | None = None

    @property
    def experts(self) -> dict[str, Any]:
        """The transformers that are loaded: ``transformer`` (high noise) and ``transformer_2`` (low noise)."""
        both = {"transformer": self.transformer, "transformer_2": self.transformer_2}
        return {name: expert for name, expert in both.items() if expert is not None}

    # The signature is that of WanImageToVideoPipeline with `image` replaced by the four arguments of a shot.
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int = 40,
        guidance_scale: float = 3.5,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str | None = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        *,
        memory: Memory | None = None,
        first_frame: Image.Image | None = None,
        motion_frames: Sequence[Image.Image] | None = None,
        rope_stride: int | None = None,
        guide_memory: bool = False,
    ) -> WanPipelineOutput | tuple:
        """Generate one shot. Arguments not named here are those of ``WanImageToVideoPipeline``.

        Latents in the loop have M + T slots, memory first; in the mode ``cached`` T.

        Args:
            memory: M keyframes, oldest first: pictures of exactly ``width`` x ``height``, or normalised one-frame
                latents as :meth:`encode_memory` returns them. None or empty: no memory.
            first_frame: the picture the shot begins with (MI2V); it is the first frame of the output.
            motion_frames: five pictures the shot begins with (MM2V); they are the first five frames of the output.
            rope_stride: S for this call; by default the pipeline's own.
            guide_memory: whether guidance strengthens memory too, see :mod:`storymem.wan.memory_guidance`.
            latents: the noise to start from, [B, 16, M + T, h, w].
            callback_on_step_end_tensor_inputs: also "condition", the 20 condition channels [B, 20, M + T, h, w].

        Returns:
            The F frames of the shot in the form ``output_type`` asks for; with "latent" the normalised latents
            [B, 16, T, h, w] of the shot. Memory slots are never part of the output.

        Raises:
            ValueError: for wrong sizes, counts or combinations, before anything is computed.
        """
        stride = self.config.rope_stride if rope_stride is None else rope_stride
        image = torch.zeros(1, 3, 16, 16)  # a stand-in: prepare_latents builds the true condition
        self._check_shot(height, width, num_frames, first_frame, motion_frames)
        self._check_memory(memory, height, width, stride)
        self._check_sampling(num_inference_steps, guidance_scale, guidance_scale_2)
        check_guidance(self.experts.values(), guidance_scale)
        looks_back = memory is not None and len(memory) > 0
        check_shared_states(self.experts.values(), guided=guidance_scale > 1, passes_differ=guide_memory and looks_back)
        if guide_memory and self.memory_cache == "recompute":
            raise ValueError("guide_memory needs a memory that is kept: memory_cache must be device or cpu")
        if guide_memory and guidance_scale <= 1:
            raise ValueError("guide_memory needs guidance: guidance_scale must be above 1")
        self.check_inputs(
            *(prompt, negative_prompt, image, height, width, prompt_embeds, negative_prompt_embeds, None),
            *(list(callback_on_step_end_tensor_inputs), guidance_scale_2),
        )
        if output_type not in ("latent", "np", "pt", "pil"):
            raise ValueError(f"output_type must be latent, np, pt or pil, not {output_type!r}")
        texts = [prompt] if isinstance(prompt, str) else prompt_embeds if prompt is None else prompt
        assert texts is not None, "check_inputs asks for one of the two"
        cached = self.config.memory_attention == "cached"
        slots = (0 if memory is None or cached else len(memory)) + latent_frames(num_frames)
        self._check_noise(len(texts) * num_videos_per_prompt, slots, height, width, latents, generator)
        forget_steps(self.experts)  # of a call that was broken off; diffusers does it after one that was not
        prompt_embeds, negative_prompt_embeds = self._on_device(prompt_embeds), self._on_device(negative_prompt_embeds)
        memory_latents = self._memory_latents(memory)
        self._call = _Call(
            memory=None if cached else memory_latents,
            cached_memory=memory_latents if cached else None,
            given=self._given_frames(first_frame, motion_frames),
            rope_stride=stride,
            guide_memory=guide_memory,
        )
        try:
            with self._looking_back(self._call):
                (denoised,) = super().__call__(
                    image=image,
                    prompt=prompt,
                    negative_prompt=negative_prompt,
                    height=height,
                    width=width,
                    num_frames=num_frames,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    guidance_scale_2=guidance_scale_2,
                    num_videos_per_prompt=num_videos_per_prompt,
                    generator=generator,
                    latents=latents,
                    prompt_embeds=prompt_embeds,
                    negative_prompt_embeds=negative_prompt_embeds,
                    output_type="latent",
                    return_dict=False,
                    attention_kwargs=attention_kwargs,
                    callback_on_step_end=callback_on_step_end,
                    callback_on_step_end_tensor_inputs=list(callback_on_step_end_tensor_inputs),
                    max_sequence_length=max_sequence_length,
                )
            video = denoised[:, :, self._call.memory_frames :]
        finally:
            self._call = None
        if output_type != "latent":
            video = self.video_processor.postprocess_video(decode_video(self.vae, video), output_type)
            self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=video) if return_dict else (video,)

    def prepare_latents(
        self,
        image: Tensor,
        batch_size: int,
        num_channels_latents: int = 16,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        last_image: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Noise [B, 16, M + T, h, w] and condition [B, 20, M + T, h, w] of the call that is under way."""
        call = self._call
        assert call is not None, "prepare_latents belongs to a call of the pipeline"
        video = self._video_latents(call.given, num_frames, height, width).to(device, dtype)
        memory = None if call.memory is None else call.memory.to(device, dtype)
        condition = memory_condition(memory, video, call.given_slots).expand(batch_size, -1, -1, -1, -1)
        shape = (batch_size, num_channels_latents, *condition.shape[2:])
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device, dtype), condition

    def encode_memory(self, frames: Sequence[Image.Image]) -> Tensor:
        """Normalised latents [M, 16, 1, h, w] of memory frames, to be kept and passed as ``memory`` again."""
        pixels = torch.cat([self.video_processor.preprocess(frame) for frame in frames])
        return encode_frames(self.vae, pixels).cpu()

    def _on_device(self, embeds: Tensor | None) -> Tensor | None:
        """Embeddings where the networks run, which is not where offloaded weights lie; diffusers expects them there."""
        return None if embeds is None else embeds.to(self._execution_device)

    def _video_latents(self, given: Tensor | None, frames: int, height: int, width: int) -> Tensor:
        """Latents [1, 16, T, h, w] of the conditioning video."""
        key, kept = (frames, height, width), self.blank_latents if given is None else None
        if kept is not None and key in kept:
            return kept[key]
        latents = encode_video(self.vae, blank_padded(given, frames, height, width))
        if kept is not None:
            kept[key] = latents.cpu()
        return latents

    def _memory_latents(self, memory: Memory | None) -> Tensor | None:
        if memory is None or len(memory) == 0:
            return None
        if isinstance(memory[0], Image.Image):
            latents = self.encode_memory(memory)  # type: ignore[arg-type]
        else:
            latents = memory if isinstance(memory, Tensor) else torch.stack(list(memory))  # type: ignore[arg-type]
        return rearrange(latents, "m c 1 h w -> 1 c m h w")

    def _given_frames(
        self, first_frame: Image.Image | None, motion_frames: Sequence[Image.Image] | None
    ) -> Tensor | None:
        frames = list(motion_frames or ([first_frame] if first_frame is not None else []))
        if not frames:
            return None
        pixels = torch.cat([self.video_processor.preprocess(frame) for frame in frames])
        return rearrange(pixels, "n c h w -> c n h w")

    @contextmanager
    def _looking_back(self, call: _Call) -> Iterator[None]:
        """Have the experts look back at the memory of a call, and forget it again."""
        experts, stride, kept = list(self.experts.values()), call.rope_stride, call.cached_memory
        with ExitStack() as stack:
            if kept is not None:
                stack.enter_context(reading_memory(experts, kept, stride=stride, cache=self.memory_cache))
            else:
                stack.enter_context(self._memory_rope(call.memory_frames, stride))
            if call.guide_memory and (call.memory_frames or kept is not None):
                stack.enter_context(hiding_memory(experts, slots=call.memory_frames))
            yield

    @contextmanager
    def _memory_rope(self, memory_frames: int, stride: int) -> Iterator[None]:
        """Tell both experts' rotary embeddings about the memory, and make them forget it again."""
        ropes = [install_memory_rope(expert) for expert in self.experts.values()]
        for rope in ropes:
            rope.memory_frames, rope.stride = memory_frames, stride
        try:
            yield
        finally:
            for rope in ropes:
                rope.memory_frames = 0

    def _check_shot(
        self,
        height: int,
        width: int,
        num_frames: int,
        first_frame: Image.Image | None,
        motion_frames: Sequence[Image.Image] | None,
    ) -> None:
        if height < 16 or width < 16 or height % 16 or width % 16:
            raise ValueError(f"height and width must be positive multiples of 16, not {height} and {width}")
        if num_frames < 1:
            raise ValueError(f"a shot has 4n + 1 frames, not {num_frames}")
        for expert in self.experts.values():
            if latent_frames(num_frames) > expert.rope.max_seq_len:
                longest = TEMPORAL_STRIDE * (expert.rope.max_seq_len - 1) + 1
                raise ValueError(f"this model's shots have {longest} frames at most, not {num_frames}")
        if first_frame is not None and motion_frames is not None:
            raise ValueError("first_frame (MI2V) and motion_frames (MM2V) exclude each other: give one of them")
        given = {} if first_frame is None else {"first_frame": first_frame}
        if motion_frames is not None:
            if len(motion_frames) != MOTION_FRAMES:
                raise ValueError(f"motion_frames must be exactly {MOTION_FRAMES} pictures, not {len(motion_frames)}")
            given = {f"motion_frames[{number}]": frame for number, frame in enumerate(motion_frames)}
        if len(given) >= num_frames:
            raise ValueError(f"a shot of {num_frames} frames has no room after {len(given)} given frames")
        for name, picture in given.items():
            _check_picture(name, picture, height, width)

    def _check_sampling(self, steps: int, *guidance: float | None) -> None:
        if not 1 <= steps <= self.scheduler.config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps must be 1 to {self.scheduler.config.num_train_timesteps}, not {steps}"
            )
        if not all(scale is None or math.isfinite(scale) for scale in guidance):
            raise ValueError(f"guidance_scale and guidance_scale_2 must be finite numbers, not {guidance}")

    def _check_memory(self, memory: Memory | None, height: int, width: int, stride: int) -> None:
        if memory is not None and not isinstance(memory, Sequence | Tensor):
            raise ValueError(f"memory must be a list of PIL images or of latents, not one {type(memory).__name__}")
        frames = [] if memory is None else list(memory)
        expected = [self.vae.config.z_dim, 1, height // 8, width // 8]
        for number, frame in enumerate(frames):
            if not isinstance(frame, Tensor):
                _check_picture(f"memory[{number}]", frame, height, width)
            elif list(frame.shape) != expected:
                raise ValueError(f"memory[{number}] must be latents of shape {expected}, not {list(frame.shape)}")
        if len({isinstance(frame, Tensor) for frame in frames}) > 1:
            raise ValueError("memory must be all pictures or all latents, not a mixture")
        for expert in self.experts.values():
            install_memory_rope(expert).check_reach(len(frames), stride)

    def _check_noise(
        self,
        batch: int,
        slots: int,
        height: int,
        width: int,
        latents: Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> None:
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"{len(generator)} generators for a batch of {batch}: give one for each video")
        expected = [batch, self.vae.config.z_dim, slots, height // 8, width // 8]
        if latents is not None and list(latents.shape) != expected:
            which = " (memory slots first)" if self.config.memory_attention == "joint" else ""
            raise ValueError(f"latents must be {expected}{which}, not {list(latents.shape)}")


def _check_picture(name: str, picture: Any, height: int, width: int) -> None:
    if not isinstance(picture, Image.Image):
        raise ValueError(f"{name} must be a PIL image, not {type(picture).__name__}")
    if picture.size != (width, height):
        raise ValueError(
            f"{name} is {picture.size[0]}x{picture.size[1]} pixels; resize it to the shot's {width}x{height} first"
        )


def _check_expert(name: str, expert: Any) -> None:
    config = expert.config
    if config.in_channels != 36 or config.image_dim is not None:
        raise ValueError(
            f"{name} has {config.in_channels} input channels and image_dim={config.image_dim}; memory-to-video needs "
            "an image-to-video network with 36 channels and no image encoder, such as Wan2.2-I2V-A14B"
        )
