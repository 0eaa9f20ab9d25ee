"""From a request for a whole film to the frames of its shots, for systems that denoise all shots at once.

:mod:`storymem.wan.shots` is its counterpart for systems that generate one shot after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storymem.wan.conditioning import condition_channels
from storymem.wan.inputs import Inputs
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.segments import Layout
from storymem.wan.shots import OnStep, StepCallback, WanShotGenerator


@dataclass(frozen=True, kw_only=True)
class FilmRequest:
    """What a film is denoised from.

    Args:
        layout: of the pass with the prompt; its text is "prompt".
        negative_layout: of the pass with the negative prompt.
        texts: encoded one by one, each padded to the L tokens of the network; "prompt" is all of them in this order.
            They must be among those given to :meth:`WanFilmGenerator.prepare`.
        videos: frames, 4n + 1, of each video that the VAE encodes and decodes by itself.
        shots: frames of each shot; the videos, one after the other, are cut there.
        seed: of the noise.
    """

    layout: Layout
    negative_layout: Layout
    texts: tuple[str, ...]
    videos: tuple[int, ...]
    shots: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        assert sum(self.videos) == sum(self.shots)


class WanFilmGenerator(WanShotGenerator):
    """Generates all shots of a film in one denoising; networks are loaded and freed as by :class:`WanShotGenerator`."""

    def film(self, request: FilmRequest, on_step: OnStep | None = None) -> list[np.ndarray]:
        """The frames of each shot, uint8 [F, H, W, 3]; NotFiniteError for NaN, with likely causes."""
        pipe, video = self._memory_to_video(), self.video
        device = pipe._execution_device  # not where offloaded weights are
        texts = [self._embeds[text].to(device) for text in request.texts]
        negative = self._embeds[self.sampler.negative_prompt].to(device) if self._uses_guidance else None
        noise, inputs = film_inputs(request, pipe, texts, negative, video.height, video.width)

        def sample(stepped: StepCallback) -> Sequence[Tensor]:
            latents = self._denoised(pipe, noise, inputs, stepped)
            return latents.split([pipe.spec.latent_frames(frames) for frames in request.videos], dim=2)

        videos = self._decoded(pipe, sample, request.videos[-1], on_step)
        return np.split(np.concatenate(videos), np.cumsum(request.shots)[:-1])


def film_inputs(
    request: FilmRequest,
    pipe: WanMemoryToVideoPipeline,
    texts: Sequence[Tensor],
    negative: Tensor | None,
    height: int,
    width: int,
) -> tuple[Tensor, Inputs]:
    """The noise [1, z, N, h, w] of a film, float32, and what else the denoising loop is given.

    Args:
        texts: embeddings [1, L, D] of ``request.texts``.
        negative: embeddings [1, L, D] of the negative prompt; None: without guidance.
        height, width: of the frames.
    """
    spec, condition = pipe.spec, None
    latent_frames = sum(spec.latent_frames(frames) for frames in request.videos)
    shape = (1, spec.latent_channels, latent_frames, *spec.latent_size(height, width))
    # From the CPU's generator, so the same on every device.
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))
    if spec.condition_channels:  # no frame is given
        blank = {frames: pipe.encode_given([], frames, height, width) for frames in set(request.videos)}
        condition = torch.cat([condition_channels(None, blank[frames], 0, spec) for frames in request.videos], dim=2)
    return noise, Inputs(
        layout=request.layout,
        negative_layout=request.negative_layout,
        text={"prompt": torch.cat(list(texts), dim=1)},
        negative=None if negative is None else {"prompt": torch.cat([negative] * len(texts), dim=1)},
        condition=condition,
    )
