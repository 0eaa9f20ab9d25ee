"""Memory-to-video as a diffusers pipeline (paper section 3.3): M2V, MI2V, MM2V, MR2V and plain text-to-video."""

# No postponed annotations here: diffusers reads the components' classes from the signature of ``__init__``.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from einops import rearrange
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, UMT5EncoderModel

from storymem.wan.checks import Memory, check_expert, check_memory, check_sampling, check_shot, noise_shape
from storymem.wan.conditioning import (
    blank_padded,
    condition_channels,
    decode_video,
    encode_frames,
    encode_video,
    memory_input,
)
from storymem.wan.inputs import Inputs, Texts, batched
from storymem.wan.parallel import GuidanceHalves
from storymem.wan.runtime import clear_step_caches, release_memory
from storymem.wan.segments import DEFAULT_STRIDE, memory_cached, memory_joint, with_given
from storymem.wan.spec import COMPONENTS, ModelSpec, spec_of
from storymem.wan.transformer import SegmentCache, enable_layouts

Pass = Literal["cond", "uncond"]


@dataclass(frozen=True)
class Turns:
    """How a pipeline's experts take turns: at most one is loaded.

    Args:
        load: the transformer of a name, from its files.
        prepare: adapts, accelerates and places the networks that a pipeline has.
        spec: of the base model.
    """

    load: Callable[[str], Any]
    prepare: Callable[[DiffusionPipeline], None]
    spec: ModelSpec


class WanMemoryToVideoPipeline(WanImageToVideoPipeline):
    """Wan2.2 with memory: generates one shot conditioned on keyframes of earlier shots.

    A layout (:mod:`storymem.wan.segments`) states what the network denoises: ``joint`` as published, or ``cached``, in
    which memory is computed once a shot. Base models: Wan2.2-I2V-A14B and Wan2.2-TI2V-5B.

    Args:
        rope_stride: S, the default distance between memory frames on the temporal axis; saved with the pipeline.
        memory_attention: ``joint`` or ``cached``; saved with the pipeline.

    Attributes:
        memory_cache: where ``cached`` keeps keys and values: "device", "cpu", or "recompute" for nowhere.
        blank_latents: for callers that never change the VAE: a dictionary, empty at first, for the latents of blank
            videos by (frames, height, width). None: they are computed in every call.
        guidance_halves: run each pass on one half of the processes.
        turns: for experts that take turns; None: both are loaded.

    The other arguments are those of ``diffusers.WanImageToVideoPipeline``.
    """

    _callback_tensor_inputs = [*WanImageToVideoPipeline._callback_tensor_inputs, "condition"]  # noqa: RUF012

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: FlowMatchEulerDiscreteScheduler,
        image_processor: CLIPImageProcessor = None,
        image_encoder: CLIPVisionModel = None,
        transformer: WanTransformer3DModel = None,
        transformer_2: WanTransformer3DModel = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        rope_stride: int = DEFAULT_STRIDE,
        memory_attention: str = "joint",
    ) -> None:
        for expert in (transformer, transformer_2):
            if expert is not None:
                enable_layouts(expert)
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
        memory_attention = memory_attention or "joint"
        if memory_attention not in ("joint", "cached"):
            raise ValueError(f"memory_attention must be joint or cached, not {memory_attention!r}")
        self.register_to_config(rope_stride=rope_stride, memory_attention=memory_attention)
        self.memory_cache = "device"
        self.blank_latents: dict[tuple[int, int, int], Tensor] | None = None
        self.guidance_halves: GuidanceHalves | None = None
        self.turns: Turns | None = None
        for name, expert in self.experts.items():
            check_expert(self, name, expert)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "WanMemoryToVideoPipeline":
        """As in diffusers; how ``pipeline`` runs (see the attributes) stays, if it is one of these."""
        pipe = super().from_pipe(pipeline, **kwargs)
        for name in ("memory_cache", "guidance_halves", "turns"):
            if hasattr(pipeline, name):
                setattr(pipe, name, getattr(pipeline, name))
        return pipe

    @property
    def experts(self) -> dict[str, Any]:
        """The transformers that are loaded: ``transformer`` (high noise) and ``transformer_2`` (low noise)."""
        both = {"transformer": self.transformer, "transformer_2": self.transformer_2}
        return {name: expert for name, expert in both.items() if expert is not None}

    def take_turn(self, name: str | None) -> None:
        """Where experts take turns, load ``name`` in the place of the other; None: only free the one that is loaded."""
        if self.turns is None or ([] if name is None else [name]) == list(self.experts):
            return
        self.remove_all_hooks()
        self.transformer = self.transformer_2 = None
        release_memory()
        if name is not None:
            expert = self.turns.load(name)
            enable_layouts(expert)
            setattr(self, name, expert)
            check_expert(self, name, expert)
        self.turns.prepare(self)

    @property
    def spec(self) -> ModelSpec:
        """The base model, from the shapes of the networks."""
        if self.turns is not None:
            return self.turns.spec
        return self.spec_of(next(iter(self.experts.values())))

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
        negative_sees_memory: bool = True,
    ) -> WanPipelineOutput | tuple:
        """Generate one shot. Arguments not named here are those of ``WanImageToVideoPipeline``.

        Latents in the loop have N frames: M + T, memory first, in the layout ``joint``; T in ``cached``.

        Args:
            memory: M keyframes, oldest first: images of exactly ``width`` x ``height``, or normalised one-frame
                latents as :meth:`encode_memory` returns them. None or empty: no memory.
            first_frame: the image the shot begins with (MI2V); it is the first frame of the output.
            motion_frames: five images the shot begins with (MM2V); they are the first five frames of the output.
            rope_stride: S for this call; None: the pipeline's own.
            negative_sees_memory: whether the pass with the negative prompt sees the memory, as published. If not,
                guidance strengthens memory as it does the prompt.
            latents: the noise to start from, [B, z, N, h, w].
            callback_on_step_end_tensor_inputs: also "condition", the condition channels [B, C, N, h, w].

        Returns:
            The F frames of the shot as ``output_type`` ("np", "pt", "pil"); for "latent" the normalised latents
            [B, z, T, h, w] of the shot. Memory is never part of the output.

        Raises:
            ValueError: for wrong sizes, counts or combinations, before anything is computed.
        """
        if not self.experts:
            self.take_turn("transformer")
        stride = self.config.rope_stride if rope_stride is None else rope_stride
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        check_shot(self, height, width, num_frames, first_frame, motion_frames, output_type)
        check_memory(self, memory, height, width, stride)
        check_sampling(self, num_inference_steps, guidance_scale, guidance_scale_2, negative_sees_memory, memory)
        texts = (prompt, negative_prompt, torch.zeros(1), height, width, prompt_embeds, negative_prompt_embeds, None)
        self.check_inputs(*texts, list(callback_on_step_end_tensor_inputs), guidance_scale_2)
        prompts: Any = prompt_embeds if prompt is None else [prompt] if isinstance(prompt, str) else prompt
        batch = len(prompts) * num_videos_per_prompt
        shape = noise_shape(self, batch, memory, num_frames, height, width, latents, generator)

        self._guidance_scale, self._guidance_scale_2 = guidance_scale, guidance_scale_2
        device = self._execution_device
        embeds = self.encode_prompt(
            prompt=prompt,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            num_videos_per_prompt=num_videos_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
            device=device,
        )
        given = list(motion_frames or ([] if first_frame is None else [first_frame]))
        shot = self._shot(embeds, memory, given, num_frames, height, width, stride, negative_sees_memory)
        noise = randn_tensor(shape, generator, device, torch.float32) if latents is None else latents
        latents = self.denoise(
            noise,
            shot,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_scale_2=guidance_scale_2,
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        video = latents[:, :, -self.spec.latent_frames(num_frames) :]
        if output_type != "latent":
            video = self.video_processor.postprocess_video(decode_video(self.vae, video), output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=video) if return_dict else (video,)

    def encode_memory(self, frames: Sequence[Image.Image]) -> Tensor:
        """Normalised latents [M, z, 1, h, w] of memory frames, to be passed as ``memory`` to any number of calls."""
        return encode_frames(self.vae, self._pixels(frames)).cpu()

    def encode_given(self, images: Sequence[Image.Image], frames: int, height: int, width: int) -> Tensor:
        """Normalised latents [1, z, T, h, w] of the video that conditions a shot: ``images`` first, mid-grey after."""
        key, cached = (frames, height, width), None if images else self.blank_latents
        if cached is None or key not in cached:
            pixels = rearrange(self._pixels(images), "n c h w -> c n h w") if images else None
            latents = encode_video(self.vae, blank_padded(pixels, frames, height, width))
            if cached is None:
                return latents.to(self._execution_device)
            cached[key] = latents.cpu()
        return cached[key].to(self._execution_device)

    # The denoising loop

    @torch.no_grad()
    def denoise(
        self,
        noise: Tensor,
        inputs: Inputs | Mapping[str, Inputs],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_scale_2: float | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Tensor:
        """Denoise any layout: :meth:`__call__` does it for a shot, the methods of other systems for theirs.

        Args:
            noise: [B, z, N, h, w].
            inputs: layouts, texts and conditions of both experts, or of each by its name, such as "transformer_2".

        The other arguments are those of :meth:`__call__`. Returns the latents [B, z, N, h, w].
        """
        names = self.experts if self.turns is None else COMPONENTS.values()
        by_expert = dict.fromkeys(names, inputs) if isinstance(inputs, Inputs) else dict(inputs)
        self._guidance_scale, self._guidance_scale_2 = guidance_scale, guidance_scale_2
        self._attention_kwargs, self._interrupt = attention_kwargs, False
        noise = noise.to(self._execution_device, torch.float32)
        self.scheduler.set_timesteps(num_inference_steps, device=noise.device)
        self._num_timesteps = len(self.scheduler.timesteps)
        after_step = None
        if callback_on_step_end is not None:
            after_step = partial(self._after_step, callback_on_step_end, callback_on_step_end_tensor_inputs)
        return self._denoise(noise, by_expert, after_step)

    def _denoise(
        self, latents: Tensor, inputs: dict[str, Inputs], after_step: Callable[..., tuple[Tensor, Inputs]] | None
    ) -> Tensor:
        """``latents`` [B, z, N, h, w] from noise to the last step; ``after_step`` may change any tensor in between."""
        active = expert = predict = cache = dtype = adapters = None
        shot, last = next(iter(inputs.values())), self.scheduler.config.num_train_timesteps
        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress_bar:
            for i, t in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                name, scale = self._expert_at(t)
                if name not in self.experts:
                    active = expert = predict = cache = None  # else the other would stay in memory
                    self.take_turn(name)
                expert, shot = self.experts[name], inputs[name]
                # A callback may change the adapters, which cached keys and values depend on.
                if expert is not active or (cache and after_step and adapters != _adapters_of(expert)):
                    active, cache, adapters = expert, self._cached_memory(expert, shot), _adapters_of(expert)
                    dtype = expert.dtype  # once: diffusers walks through every module for it
                latents = shot.with_known(latents, t / last)
                seen = shot.network_input(latents, with_memory=cache is None).to(dtype)
                predict = partial(self._predict, expert, seen, t, latents.shape[2], shot, cache)
                latents = self.scheduler.step(self._guided(predict, shot, scale), t, latents, return_dict=False)[0]
                if after_step is not None:
                    latents, after = after_step(i, t, latents, shot)
                    inputs = {name: after if each is shot else each for name, each in inputs.items()}
                progress_bar.update()
        self._current_timestep = None
        return inputs[name].with_known(latents, 0.0)

    def _after_step(
        self, callback: Callable[..., dict], names: Sequence[str], i: int, t: Tensor, latents: Tensor, shot: Inputs
    ) -> tuple[Tensor, Inputs]:
        """The tensors of the next step: a callback is given those of ``names`` and may replace any."""
        condition = None if shot.condition is None else shot.condition.expand(latents.shape[0], -1, -1, -1, -1)
        negative = None if shot.negative is None else shot.negative["prompt"]
        texts = {"prompt_embeds": shot.text["prompt"], "negative_prompt_embeds": negative}
        tensors: dict[str, Any] = {"latents": latents, "condition": condition, **texts}
        tensors |= callback(self, i, t, {name: tensors[name] for name in names}) or {}
        if tensors["condition"] is condition:
            tensors["condition"] = shot.condition
        text, negative = {**shot.text, "prompt": tensors["prompt_embeds"]}, tensors["negative_prompt_embeds"]
        negatives = None if negative is None else {**(shot.negative or {}), "prompt": negative}
        return tensors["latents"], replace(shot, condition=tensors["condition"], text=text, negative=negatives)

    def _expert_at(self, t: Tensor) -> tuple[str, float]:
        """The name of a timestep's expert, and its guidance."""
        ratio, low = self.config.boundary_ratio, self._guidance_scale_2
        if ratio is None or t >= ratio * self.scheduler.config.num_train_timesteps:
            return "transformer", self._guidance_scale
        return "transformer_2", self._guidance_scale if low is None else low

    def _guided(self, predict: Callable[..., Tensor], shot: Inputs, scale: float) -> Tensor:
        """The prediction with guidance: negative + scale * (positive - negative)."""
        if not self.do_classifier_free_guidance:
            return predict("cond", shot.text)
        assert shot.negative is not None
        if self.guidance_halves is not None:
            own = self.guidance_halves.own
            prediction = predict(own, shot.text if own == "cond" else shot.negative)
            with_prompt, without = self.guidance_halves.exchange(prediction)
        else:
            with_prompt, without = predict("cond", shot.text), predict("uncond", shot.negative)
        # Denoised memory that the second pass does not see keeps the prediction of the first.
        if unseen := with_prompt.shape[2] - without.shape[2]:
            without = torch.cat([with_prompt[:, :, :unseen], without], dim=2)
        return without + scale * (with_prompt - without)

    def _predict(
        self,
        expert: Any,
        seen: Tensor,
        t: Tensor,
        frames: int,
        shot: Inputs,
        cache: SegmentCache | None,
        name: Pass,
        text: Texts,
    ) -> Tensor:
        """What an expert predicts for those of the denoised ``frames`` that a pass sees."""
        layout = shot.layout if name == "cond" else shot.negative_layout
        with expert.cache_context(name):
            (prediction,) = expert(
                hidden_states=seen[:, :, -layout.frames :],
                timestep=t.expand(seen.shape[0]),
                encoder_hidden_states=batched(text, seen.shape[0], seen),
                attention_kwargs=self.attention_kwargs,
                return_dict=False,
                layout=layout,
                cache=cache,
            )
        return prediction[:, :, -frames:]

    def _cached_memory(self, expert: Any, shot: Inputs) -> SegmentCache | None:
        """Keys and values of memory that does not change between steps; step caches are cleared."""
        clear_step_caches(self.experts)
        if shot.memory is None or self.memory_cache == "recompute":
            return None
        cache, device, dtype = SegmentCache(on_cpu=self.memory_cache == "cpu"), self._execution_device, expert.dtype
        # Two forwards a shot are not worth a graph of their own.
        with expert.cache_context("memory"), torch.compiler.set_stance("force_eager"):
            expert(
                hidden_states=shot.memory.to(device, dtype),
                timestep=torch.zeros(1, device=device),
                encoder_hidden_states={},  # constant segments read no text
                attention_kwargs=self.attention_kwargs,
                return_dict=False,
                layout=shot.layout.only(shot.layout.constant),
                cache=cache,
            )
        clear_step_caches(self.experts)  # of this forward, where a cache has one state for all
        return cache

    # What a shot is made from

    def _shot(
        self,
        embeds: tuple[Tensor, Tensor | None],
        memory: Memory | None,
        given: Sequence[Image.Image],
        frames: int,
        height: int,
        width: int,
        stride: int,
        negative_sees_memory: bool,
    ) -> Inputs:
        spec = self.spec
        slots, given_slots = spec.latent_frames(frames), spec.latent_frames(len(given))
        latents = self._memory_latents(memory)
        cached = self.config.memory_attention == "cached"
        build = memory_cached if cached else memory_joint
        layouts = [build(count, slots, stride) for count in (0 if latents is None else latents.shape[2], 0)]
        condition = first = None
        if spec.condition_channels:
            video = self.encode_given(given, frames, height, width)
            condition = condition_channels(None if cached else latents, video, given_slots, spec)
        elif given:
            pixels = rearrange(self._pixels(given), "n c h w -> 1 c n h w")
            first = encode_video(self.vae, pixels).to(self._execution_device)
            layouts = [with_given(layout, given_slots) for layout in layouts]
        return Inputs(
            layout=layouts[0],
            negative_layout=layouts[0] if negative_sees_memory else layouts[1],
            text={"prompt": embeds[0]},
            negative=None if embeds[1] is None else {"prompt": embeds[1]},
            condition=condition,
            memory=memory_input(latents, spec) if cached and latents is not None else None,
            given=first,
        )

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """[n, 3, H, W] in -1..1."""
        return torch.cat([self.video_processor.preprocess(image) for image in images])

    def _memory_latents(self, memory: Memory | None) -> Tensor | None:
        """[1, z, M, h, w] on the execution device."""
        if memory is None or len(memory) == 0:
            return None
        if isinstance(memory[0], Image.Image):
            latents = self.encode_memory(memory)  # type: ignore[arg-type]
        else:
            latents = memory if isinstance(memory, Tensor) else torch.stack(list(memory))  # type: ignore[arg-type]
        return rearrange(latents, "m c 1 h w -> 1 c m h w").to(self._execution_device)

    def spec_of(self, expert: Any) -> ModelSpec:
        """The base model that a transformer belongs to."""
        return spec_of(
            in_channels=expert.config.in_channels,
            latent_channels=self.vae.config.z_dim,
            spatial_stride=self.vae_scale_factor_spatial,
        )


def _adapters_of(expert: Any) -> list[tuple[Any, ...]]:
    """Which LoRAs are active in each layer, and how strong."""
    return [
        (layer.disable_adapters, tuple(layer.active_adapters), tuple(layer.merged_adapters), dict(layer.scaling))
        for layer in expert.modules()
        if isinstance(layer, BaseTunerLayer)
    ]
