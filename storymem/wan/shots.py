"""From a request for one shot to its frames: the video model as the shot loop sees it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from storymem.io import check_finite
from storymem.wan.conditioning import decode_video
from storymem.wan.inputs import Inputs
from storymem.wan.keyframe_query import KeyframeQuery, choose, embedded, film_positions, mean_scores
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import read_memory_lora
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.placement import settle
from storymem.wan.preview import Preview
from storymem.wan.runtime import check_machine, check_runtime, compiled_graphs, release_memory
from storymem.wan.settings import Continuity, ModelSettings, RuntimeSettings, SamplerSettings, VideoSettings
from storymem.wan.sources import adapter_weights
from storymem.wan.spec import Expert, experts_of
from storymem.weights import locate

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]


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


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Frames of a film among which a learned recall chooses for a shot.

    Args:
        latents: normalised one-frame latents [z, 1, h, w] of each.
        frames: place of each in the film, from 0, with all shots as they were generated end to end.
        start: place of the shot's first frame.
        prompt: of the shot.
        caption: of the whole film; the prompt where there is none.
    """

    latents: Sequence[Tensor]
    frames: Sequence[int]
    start: int
    prompt: str
    caption: str


class WanShotGenerator:
    """Generates shots with Wan; loads networks when they are needed and frees them when they are not.

    The text encoder is freed when all prompts are encoded. Text-to-video experts are loaded for shots from text alone
    and freed when those of memory-to-video are needed, which are loaded once.

    Args:
        continuity: selects the adapter, where there is one for each kind.
        scorers: their bytes, as of :func:`storymem.wan.estimate.estimate_shot`, for ``runtime.offload: auto``.

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
        scorers: Sequence[int] = (0, 0),
    ) -> None:
        self.model, self.sampler, self.runtime = model, sampler, runtime
        self.continuity, self.scorers = continuity, scorers
        self.on_preview: Callable[[np.ndarray], None] | None = None
        self._preview = Preview()
        self._embeds: dict[str, Tensor] = {}
        self._pipe: WanMemoryToVideoPipeline | None = None
        self._text_pipe: WanMemoryToVideoPipeline | None = None
        self._queries: dict[Expert, KeyframeQuery] | None = None

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
        pipe = self._load(vae=False, experts=False)
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

    @torch.no_grad()
    def choose(self, candidates: Candidates, local: int, whole: int, expert: Expert | None = None) -> list[int]:
        """Indices of the candidates that the adapter's learned recall chooses, ascending.

        Args:
            candidates: its prompt and caption must be among those given to :meth:`prepare`.
            local, whole: how many frames the two groups of queries choose.
            expert: whose scores decide; None: the mean of all experts, for a memory that they share.
        """
        for number, latents in enumerate(candidates.latents, start=1):
            check_finite(latents, f"the latents of candidate {number}")
        pipe = self._memory_to_video()
        if pipe.turns is not None:
            raise ValueError("a learned recall reads both experts, and with runtime.experts=in_turn one is loaded")
        experts = experts_of(pipe)
        if self._queries is None:
            self._queries = self._load_queries(experts)
        device, scores = pipe._execution_device, []
        latents = torch.cat(list(candidates.latents), dim=1).to(device, torch.float32)
        positions = film_positions(candidates.frames, candidates.start)
        for name in self._queries if expert is None else (expert,):
            texts = (self._embeds[text][0] for text in (candidates.prompt, candidates.caption))
            query = self._queries[name].to(device)  # on the CPU when it is not at work
            found = query(latents, positions, *(embedded(experts[name], text).to(device) for text in texts))
            scores.append(torch.stack(mean_scores(found, len(query.queries))).cpu())
            query.to("cpu")
        by_local, by_global = torch.stack(scores).mean(dim=0)
        return sorted(choose(by_local, by_global, local=local, whole=whole).tolist())

    def _load_queries(self, experts: Mapping[Expert, Any]) -> dict[Expert, KeyframeQuery]:
        """The query of each expert from the adapter's files, which were checked; random without an adapter."""
        if self.model.adapter is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.model.seed)
                return {name: KeyframeQuery.of(expert) for name, expert in experts.items()}
        adapters = read_memory_lora(experts, locate(adapter_weights(self.model.adapter, self.continuity)))
        return {
            expert: KeyframeQuery.from_tensors(adapter.query(), experts[expert], where=str(adapter.file.path))
            for expert, adapter in adapters.items()
        }

    @property
    def _uses_guidance(self) -> bool:
        return self.sampler.guidance > 1

    def _memory_to_video(self) -> WanMemoryToVideoPipeline:
        if self._pipe is None:
            self._free_experts()
            self._pipe = self._load(text_encoder=False)
            self._pipe.set_progress_bar_config(disable=True)
            self._pipe.blank_latents = {}
        return self._pipe

    def _text_to_video(self) -> WanMemoryToVideoPipeline:
        if self._text_pipe is None:
            self._free_experts()
            vae = self._load(text_encoder=False, experts=False).vae
            model, sampler = self.model.text_model, self.sampler.text_sampler
            self._text_pipe = load_pipeline(model, runtime=self.settled, sampler=sampler, text_encoder=False, vae=vae)
            self._text_pipe.set_progress_bar_config(disable=True)
        return self._text_pipe

    def _free_experts(self) -> None:
        """Two pairs of experts do not fit most machines."""
        for pipe in (self._pipe, self._text_pipe):
            if pipe is not None:
                pipe.remove_all_hooks()
        self._pipe = self._text_pipe = self._queries = pipe = None
        release_memory()

    @cached_property
    def settled(self) -> RuntimeSettings:
        """``runtime`` without "auto", settled once, before anything takes room."""
        return settle(self.model, self.runtime, sampler=self.sampler, scorers=self.scorers)

    def _load(self, **parts: bool) -> WanMemoryToVideoPipeline:
        """The networks ``parts`` of the model, all by default; see :func:`storymem.wan.loading.load_pipeline`."""
        return load_pipeline(
            self.model, runtime=self.settled, continuity=self.continuity, sampler=self.sampler, **parts
        )

    def _run(
        self, pipe: WanMemoryToVideoPipeline, requests: Sequence[ShotRequest], on_step: OnStep | None, **conditions: Any
    ) -> list[np.ndarray]:
        """The frames of shots of equal length, which one call of the pipeline makes as a batch."""
        if not pipe.experts:
            pipe.take_turn("transformer")
        video, sampler, device = self.model.video, self.sampler, pipe._execution_device
        prompts, negatives = [one.prompt for one in requests], [self._negative(one) for one in requests]
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
            callback_on_step_end=self._reporting(requests[0].frames, on_step),
            **conditions,
        )
        return self._decoded(pipe, latents.split(1))

    def _denoised(
        self,
        pipe: WanMemoryToVideoPipeline,
        noise: Tensor,
        inputs: Inputs | Mapping[str, Inputs],
        frames: int,
        on_step: OnStep | None,
        *,
        guidance: float | None = None,
    ) -> Tensor:
        """The latents [1, z, N, h, w] of any layout.

        Args:
            frames: of the last video in it, of which there are previews.
            guidance: None: the sampler's.
        """
        return pipe.denoise(
            noise,
            inputs,
            num_inference_steps=self.sampler.steps,
            guidance_scale=guidance or self.sampler.guidance,
            guidance_scale_2=guidance or self.sampler.guidance_low,
            callback_on_step_end=self._reporting(frames, on_step),
        )

    def _reporting(self, frames: int, on_step: OnStep | None) -> Callable[..., dict]:
        """A callback of diffusers' pipelines that reports steps, and previews of the last ``frames``."""
        new_frames = self.model.spec.latent_frames(frames)

        def stepped(pipe: WanMemoryToVideoPipeline, step: int, _timestep: Any, tensors: dict) -> dict:
            if on_step is not None:
                on_step(step + 1, self.sampler.steps)
            if self.on_preview is not None:
                latents = tensors["latents"][:1, :, -new_frames:]
                image = self._preview.after(step, latents, pipe.scheduler.sigmas, pipe.vae)
                if image is not None:
                    self.on_preview(image)
            return {}

        return stepped

    def _embedded(self, texts: Sequence[str]) -> Tensor:
        return torch.cat([self._embeds[text] for text in texts])

    def _negative(self, request: ShotRequest) -> str:
        return self.sampler.negative_prompt if request.negative_prompt is None else request.negative_prompt

    def _decoded(self, pipe: WanMemoryToVideoPipeline, latents: Iterable[Tensor]) -> list[np.ndarray]:
        """The frames, uint8 [F, H, W, 3], of each of several sampled ``latents`` [1, z, T, h, w]."""
        pipe.take_turn(None)  # it would be read again for the next shot anyhow
        videos = []
        for one in latents:
            decoded = self._decode(pipe, one)
            if self.on_preview is not None:
                self._preview.fit(one, decoded)
            (pixels,) = pipe.video_processor.postprocess_video(decoded, "np")
            videos.append((pixels * 255).round().astype(np.uint8))
        pipe.maybe_free_model_hooks()
        return videos

    def _decode(self, pipe: WanMemoryToVideoPipeline, latents: Tensor) -> Tensor:
        """The video [1, 3, F, H, W] in -1..1 of sampled latents [1, z, T, h, w]; NotFiniteError for NaN."""
        if self.runtime.compile != "none":
            logger.info("compiled graphs so far: %d", compiled_graphs())
        check_finite(latents, "the latents of the shot", f"likely causes: {', '.join(self._likely_causes(pipe))}")
        decoded = decode_video(pipe.vae, latents)
        check_finite(decoded, "the frames of the shot", "check the VAE's weights, or use model.vae_dtype=float32")
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
