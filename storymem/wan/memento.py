"""Memento's way to generate a shot (arXiv 2606.14667): what is denoised, and from what.

One sequence: an image of the subject, the memory of each expert, the video. See ``memento`` in
:mod:`storymem.wan.segments`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from storymem.io import check_finite
from storymem.wan.conditioning import condition_channels
from storymem.wan.inputs import Inputs, Renoised, Texts
from storymem.wan.keyframe_query import film_positions
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.segments import memento
from storymem.wan.shots import OnStep, ShotRequest, StepCallback, WanShotGenerator
from storymem.wan.spec import A14B, COMPONENTS, Expert, ModelSpec


@dataclass(frozen=True, kw_only=True)
class FilmFrames:
    """The memory of an expert.

    Args:
        latents: normalised one-frame latents [z, 1, h, w], oldest first.
        frames: place of each in the film, from 0, with all shots as they were generated end to end.
    """

    latents: Sequence[Tensor]
    frames: Sequence[int]

    def positions(self, start: int) -> tuple[int, ...]:
        """Temporal positions before a shot that begins at frame ``start`` of the film, all below 0."""
        return tuple(min(position, -1) for position in film_positions(self.frames, start))


def memento_inputs(
    memory: FilmFrames,
    *,
    start: int,
    video: Tensor,
    given: int,
    blank: Tensor | None,
    noise: Tensor,
    text: Texts,
    negative: Texts | None,
    spec: ModelSpec = A14B,
) -> Inputs:
    """What an expert is given in the denoising loop.

    Args:
        memory: its own frames.
        start: place of the shot's first frame in the film.
        video: normalised latents [1, z, T, h, w] of the blank-padded video that conditions the shot.
        given: latent frames of the shot that are given: 0, or 1 with a first frame.
        blank: latents [1, z, 1, h, w] of one blank frame, the condition of the subject; None: no subject is denoised,
            and attention is joint, as in released inference.
        noise: that of the whole sequence, [1, z, N, h, w], from which the memory's frames take theirs.
        text: embeddings "prompt", and "subject" where there is one, of the pass with the prompt.
        negative: of the pass with the negative prompt; None without guidance.
    """
    layout = memento(memory.positions(start), video.shape[2], subject=blank is not None, split=blank is not None)
    clean = torch.cat(list(memory.latents), dim=1)[None].to(video)
    condition = condition_channels(clean, video, given, spec)
    if blank is not None:
        condition = torch.cat([condition_channels(None, blank.to(video), 0, spec), condition], dim=2)
    known = Renoised(segment="memory", latents=clean, noise=noise[:, :, layout.span("memory")].to(video))
    return Inputs(
        layout=layout, negative_layout=layout, text=text, negative=negative, condition=condition, renoised=known
    )


@dataclass(frozen=True, kw_only=True)
class MementoRequest(ShotRequest):
    """What one shot of Memento is made from; ``memory`` is not read.

    Args:
        memories: of each expert.
        start: place of the shot's first frame in the film.
        subject: caption of the subject; None: none is denoised. It and "" must be among the prepared texts.
        guidance: of this shot, if the sampler uses guidance; None: the sampler's.
    """

    memories: Mapping[Expert, FilmFrames] = field(default_factory=dict)
    start: int = 0
    subject: str | None = None
    guidance: float | None = None


class MementoGenerator(WanShotGenerator):
    """Generates shots as Memento does. A shot without memory is one of the base with the adapter."""

    def generate(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray:
        """See :meth:`storymem.wan.shots.WanShotGenerator.generate`."""
        if not isinstance(request, MementoRequest) or not any(one.frames for one in request.memories.values()):
            return super().generate(request, on_step)
        for expert, memory in request.memories.items():
            for number, latents in enumerate(memory.latents, start=1):
                check_finite(latents, f"the latents of memory frame {number} of the {expert} expert")
        pipe = self._memory_to_video()

        def sample(stepped: StepCallback) -> Sequence[Tensor]:
            return [self._sample(pipe, request, stepped)]

        (frames,) = self._decoded(pipe, sample, request.frames, on_step)
        return frames

    def _sample(self, pipe: WanMemoryToVideoPipeline, request: MementoRequest, stepped: StepCallback) -> Tensor:
        """The denoised latents [1, z, T, h, w] of the video."""
        size, device = self.model.video, pipe._execution_device
        images = [Image.fromarray(frame) for frame in request.given]
        video = pipe.encode_given(images, request.frames, size.height, size.width)
        blank = None if request.subject is None else pipe.encode_given([], 1, size.height, size.width)
        blank_text = None if request.subject is None else ""
        frames = video.shape[2] + (blank is not None) + len(next(iter(request.memories.values())).frames)
        # Noise from the CPU's generator is the same on every device.
        generator = torch.Generator().manual_seed(request.seed)
        noise = torch.randn(1, video.shape[1], frames, *video.shape[3:], generator=generator)
        parts: dict[str, Any] = {
            "start": request.start,
            "video": video,
            "given": pipe.spec.latent_frames(len(images)),
            "blank": blank,
            "noise": noise.to(device),
            "text": self._texts(request.prompt, request.subject),
            "negative": self._texts(self._negative(request), blank_text) if self._uses_guidance else None,
            "spec": pipe.spec,
        }
        own = request.guidance if self._uses_guidance else None
        inputs = {COMPONENTS[name]: memento_inputs(memory, **parts) for name, memory in request.memories.items()}
        latents = self._denoised(pipe, noise, inputs, stepped, own)
        return latents[:, :, -video.shape[2] :]

    def _texts(self, prompt: str, subject: str | None) -> dict[str, Tensor]:
        texts = {"prompt": prompt} | ({} if subject is None else {"subject": subject})
        return {name: self._embeds[text] for name, text in texts.items()}
