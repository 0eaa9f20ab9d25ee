"""From a request for one shot to its frames: the video model as the shot loop sees it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from storymem.io import check_finite
from storymem.wan.conditioning import decode_video
from storymem.wan.loading import load_pipeline, load_text_to_video
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.placement import settle
from storymem.wan.preview import Preview, Projection
from storymem.wan.recall import Candidates, LearnedRecall
from storymem.wan.runtime import check_machine, check_runtime, compiled_graphs, release_memory
from storymem.wan.settings import Continuity, ModelSettings, RuntimeSettings, SamplerSettings, VideoSettings
from storymem.wan.spec import Expert, experts_of

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]
StepCallback = Callable[..., dict]  # as diffusers calls it


@dataclass(frozen=True, kw_only=True)
class ShotRequest:
    """What one shot is made from.

    Args:
        prompt: must be among those given to :meth:`WanShotGenerator.prepare`.
        negative_prompt: likewise; None: the sampler's.
        frames: F = 4n + 1.
        seed: of the noise.
        memory: normalised one-frame latents [z, 1, h, w] of the keyframes, oldest first.
        given: uint8 [n, H, W, 3], the frames that the shot begins with: n is 0 (M2V), 1 (MI2V) or 5 (MM2V).
    """

    prompt: str
    negative_prompt: str | None
    frames: int
    seed: int
    memory: Sequence[Tensor]
    given: np.ndarray


class WanShotGenerator:
    """Generates shots with Wan; loads networks when they are needed and frees them when they are not.

    The text encoder is freed when all prompts are encoded. Text-to-video experts are loaded for shots from text alone
    and freed when those of memory-to-video are needed, which are loaded once.

    Args:
        continuity: selects the adapter, where there is one for each kind.
        scorers: bytes of the scorers that take turns with the networks, for ``runtime.offload: auto``.

    Attributes:
        on_preview: called with previews of a shot while it is denoised, uint8 [h, w, 3]; None: there are none.
    """

    def __init__(
        self,
        *,
        model: ModelSettings,
        sampler: SamplerSettings,
        runtime: RuntimeSettings,
        continuity: Continuity = "none",
        scorers: int = 0,
    ) -> None:
        self.model, self.sampler, self.runtime = model, sampler, runtime
        self.continuity, self.scorers = continuity, scorers
        self.on_preview: Callable[[np.ndarray], None] | None = None
        self._projection = Projection()
        self._embeds: dict[str, Tensor] = {}
        self._pipe: WanMemoryToVideoPipeline | None = None
        self._text_pipe: WanMemoryToVideoPipeline | None = None
        self._recall: LearnedRecall | None = None

    @property
    def video(self) -> VideoSettings:
        """Size, length and rate of the shots."""
        return self.model.video

    @property
    def expert_names(self) -> tuple[Expert, ...]:
        """The experts of the model, from high to low noise."""
        return self.model.spec.experts

    def check_machine(self) -> None:
        """Raise ``ValueError`` for a machine that cannot run the settings, and warn of what it is short of."""
        check_runtime(self.runtime)
        check_machine(self.model, self.runtime)
        _ = self.settled

    @torch.no_grad()  # else the embeddings' graph would keep the text encoder alive
    def prepare(self, prompts: Iterable[str], negative_prompts: Iterable[str | None]) -> None:
        """Encode each distinct text once and free the text encoder.

        One at a time, so that a text's embedding does not depend on what else is encoded.
        """
        texts = set(prompts)
        if self._uses_guidance:
            texts |= {self.sampler.negative_prompt if text is None else text for text in negative_prompts}
        texts -= self._embeds.keys()
        if not texts:
            return
        if self.settled.offload != "none":  # the experts of a film before are in RAM, which has no room for both
            self._free_experts()
        pipe = self._load(text_encoder=True, experts=False)
        for text in sorted(texts):
            embeds, _ = pipe.encode_prompt(
                text,
                do_classifier_free_guidance=False,
                max_sequence_length=self.model.network.text_tokens,
            )
            check_finite(embeds, f"the embeddings of {text[:60]!r}", "check the text encoder's weights")
            self._embeds[text] = embeds.cpu()
        pipe.remove_all_hooks()
        del pipe
        release_memory()

    def generate(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray:
        """The frames of a shot by memory-to-video, uint8 [F, H, W, 3]; NotFiniteError for NaN, with likely causes."""
        for number, latents in enumerate(request.memory):
            check_finite(latents, f"the latents of memory frame {number + 1}")
        images = [Image.fromarray(frame) for frame in request.given]
        (frames,) = self._run(
            self._memory_to_video(),
            [request],
            on_step,
            memory=list(request.memory) or None,
            negative_sees_memory=self.sampler.negative_sees_memory,
            first_frame=images[0] if len(images) == 1 else None,
            motion_frames=images if len(images) > 1 else None,
        )
        return frames

    def first(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray:
        """The frames of a first shot from text alone, by the text-to-video networks if the model has them."""
        if not self.model.has_text_to_video:
            return self.generate(request, on_step)
        (frames,) = self._run(self._text_to_video(), [request], on_step)
        return frames

    def encode_keyframes(self, frames: Sequence[np.ndarray]) -> list[Tensor]:
        """Normalised latents [z, 1, h, w] of images, uint8 [H, W, 3], each encoded alone."""
        if not frames:
            return []
        latents = self._memory_to_video().encode_memory([Image.fromarray(frame) for frame in frames])
        check_finite(latents, "the latents of a keyframe", "check the VAE's weights, or use model.vae_dtype=float32")
        return list(latents)

    def choose(self, candidates: Candidates, local: int, whole: int, expert: Expert | None = None) -> list[int]:
        """Which candidates the adapter's learned recall chooses; see :meth:`storymem.wan.recall.LearnedRecall.choose`.

        Prompt and caption must be among those given to :meth:`prepare`.
        """
        for number, latents in enumerate(candidates.latents, start=1):
            check_finite(latents, f"the latents of candidate {number}")
        pipe = self._memory_to_video()
        if pipe.turns is not None:
            raise ValueError("a learned recall reads both experts, and with runtime.experts=in_turn one is loaded")
        if self._recall is None:
            experts, device = experts_of(pipe), pipe._execution_device
            self._recall = LearnedRecall.of(self.model, experts, continuity=self.continuity, device=device)
        texts = (self._embeds[text][0] for text in (candidates.prompt, candidates.caption))
        return self._recall.choose(candidates, *texts, local=local, whole=whole, expert=expert)

    @property
    def _uses_guidance(self) -> bool:
        return self.sampler.guidance > 1

    def _memory_to_video(self) -> WanMemoryToVideoPipeline:
        if self._pipe is None:
            self._free_experts()
            self._pipe = self._load(text_encoder=False, experts=True)
            self._pipe.blank_latents = {}
        return self._pipe

    def _text_to_video(self) -> WanMemoryToVideoPipeline:
        if self._text_pipe is None:
            self._free_experts()
            vae = self._load(text_encoder=False, experts=False).vae
            self._text_pipe = load_text_to_video(self.model, vae=vae, runtime=self.settled, sampler=self.sampler)
        return self._text_pipe

    def _free_experts(self) -> None:
        """Two pairs of experts do not fit most machines."""
        for pipe in (self._pipe, self._text_pipe):
            if pipe is not None:
                pipe.remove_all_hooks()
        self._pipe = self._text_pipe = self._recall = pipe = None
        release_memory()

    @cached_property
    def settled(self) -> RuntimeSettings:
        """``runtime`` without "auto", settled once, before anything takes room.

        Raises:
            ValueError: if the adapter has a learned recall, which needs both experts, and they take turns.
        """
        settled = settle(self.model, self.runtime, sampler=self.sampler, scorers=self.scorers)
        adapter = self.model.adapter
        if settled.experts == "in_turn" and adapter is not None and adapter.query:
            raise ValueError(
                "learned recall needs both experts, and one is loaded at a time (runtime.experts=in_turn): use another "
                "memory/recall or method, or a runtime with room for both (runtime.precision, runtime.offload)"
            )
        return settled

    def _load(self, *, text_encoder: bool, experts: bool) -> WanMemoryToVideoPipeline:
        return load_pipeline(
            self.model,
            runtime=self.settled,
            continuity=self.continuity,
            sampler=self.sampler,
            text_encoder=text_encoder,
            experts=experts,
        )

    def _run(
        self, pipe: WanMemoryToVideoPipeline, requests: Sequence[ShotRequest], on_step: OnStep | None, **conditions: Any
    ) -> list[np.ndarray]:
        """The frames of shots of equal length, which one call of the pipeline makes as a batch."""
        if not pipe.experts:
            pipe.take_turn("transformer")
        video, sampler, device = self.model.video, self.sampler, pipe._execution_device
        prompts, negatives = [one.prompt for one in requests], [self._negative(one) for one in requests]

        def sample(stepped: StepCallback) -> Tensor:
            (latents,) = pipe(
                prompt_embeds=self._embedded(prompts).to(device),
                negative_prompt_embeds=self._embedded(negatives).to(device) if self._uses_guidance else None,
                height=video.height,
                width=video.width,
                num_frames=requests[0].frames,
                num_inference_steps=sampler.steps,
                guidance_scale=sampler.guidance,
                guidance_scale_2=sampler.guidance_low,
                # Noise from the CPU's generator is the same on every device.
                generator=[torch.Generator().manual_seed(request.seed) for request in requests],
                output_type="latent",
                return_dict=False,
                callback_on_step_end=stepped,
                **conditions,
            )
            return latents

        return self._decoded(pipe, sample, requests[0], on_step)

    def _embedded(self, texts: Sequence[str]) -> Tensor:
        return torch.cat([self._embeds[text] for text in texts])

    def _negative(self, request: ShotRequest) -> str:
        return self.sampler.negative_prompt if request.negative_prompt is None else request.negative_prompt

    def _decoded(
        self,
        pipe: WanMemoryToVideoPipeline,
        sample: Callable[[StepCallback], Tensor],
        request: ShotRequest,
        on_step: OnStep | None,
    ) -> list[np.ndarray]:
        """The frames of each shot, uint8 [F, H, W, 3], of the latents [B, z, T, h, w] that ``sample`` denoises."""
        new_frames = self.model.spec.latent_frames(request.frames)
        preview = Preview(self._projection, pipe.vae, new_frames) if self.on_preview is not None else None

        def stepped(_pipe: Any, step: int, _timestep: Any, tensors: dict) -> dict:
            if on_step is not None:
                on_step(step + 1, self.sampler.steps)
            if preview is not None and self.on_preview is not None:
                image = preview.after(step, tensors["latents"], pipe.scheduler.sigmas)
                if image is not None:
                    self.on_preview(image)
            return {}

        pipe.set_progress_bar_config(disable=True)
        latents = sample(stepped)
        pipe.take_turn(None)  # it would be read again for the next shot anyhow
        decoded = torch.cat([self._decode(pipe, one, "the shot") for one in latents.split(1)])
        pipe.maybe_free_model_hooks()
        if preview is not None:
            self._projection.fit(latents[:1], decoded[:1])
        return to_pixels(pipe, decoded)

    def _decode(self, pipe: WanMemoryToVideoPipeline, latents: Tensor, what: str) -> Tensor:
        """The video [1, 3, F, H, W] in -1..1 of sampled latents [1, z, T, h, w]; NotFiniteError for NaN."""
        if self.runtime.compile != "none":
            logger.info("compiled graphs so far: %d", compiled_graphs())
        check_finite(latents, f"the latents of {what}", f"likely causes: {', '.join(self._likely_causes(pipe))}")
        decoded = decode_video(pipe.vae, latents)
        check_finite(decoded, f"the frames of {what}", "check the VAE's weights, or use model.vae_dtype=float32")
        return decoded

    def _likely_causes(self, pipe: WanMemoryToVideoPipeline) -> list[str]:
        """What may have computed values that are not finite, the likeliest first."""
        model, sampler, runtime = self.model, self.sampler, self.runtime
        step_adapter = "" if sampler.adapter is None else sampler.adapter.weights.name
        adapter = "" if model.adapter is None or pipe is not self._pipe else model.adapter.weights.name
        causes = {
            f"the adapter {step_adapter} (sampler.adapter)": step_adapter,
            f"the adapter {adapter} (model.adapter)": adapter,
            f"runtime.precision={runtime.precision}": runtime.precision != "as_is",
            f"runtime.cache={runtime.cache}": runtime.cache != "none",
            "model.dtype=float16, which overflows easily (bfloat16 does not)": model.dtype == "float16",
            f"sampler.guidance={sampler.guidance:g}": self._uses_guidance,
            f"the weights of {model.name}": True,
        }
        return [cause for cause, applies in causes.items() if applies]


def to_pixels(pipe: WanMemoryToVideoPipeline, decoded: Tensor) -> list[np.ndarray]:
    """Videos [B, 3, F, H, W] in -1..1 as uint8 [F, H, W, 3] each."""
    videos = pipe.video_processor.postprocess_video(decoded, "np")
    return [(frames * 255).round().astype(np.uint8) for frames in videos]
