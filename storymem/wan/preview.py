"""Previews of a shot while it is denoised: small images by a linear projection of the latents."""

from __future__ import annotations

from math import ceil

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from storymem.wan.conditioning import decode_video

_MOST = 12  # previews of a shot


class Preview:
    """The linear map from latents to RGB that is nearest to a VAE's decoder, in the sense of least squares.

    It is fitted on the beginning of the first estimate, and then on each shot.
    """

    def __init__(self) -> None:
        self._weights: Tensor | None = None  # [z + 1, 3]
        self._before: tuple[Tensor, float] | None = None  # latents of the step before, and their noise level

    def fit(self, latents: Tensor, video: Tensor) -> None:
        """Fit it on normalised latents [1, z, T, h, w] and their decoded video in -1..1, [1, 3, F, H, W].

        The first latent frame, which is a frame alone, is left out: it is decoded in another way than the others.
        """
        frames = torch.linspace(0, video.shape[2] - 1, latents.shape[2]).round().long()[1:]
        latents = latents[:, :, 1:]
        small = nn.functional.interpolate(video[:, :, frames].float().cpu(), size=latents.shape[2:], mode="area")
        colours = small.permute(0, 2, 3, 4, 1).reshape(-1, 3) / 2 + 0.5
        self._weights = torch.linalg.lstsq(_rows(latents), colours).solution

    def after(self, step: int, latents: Tensor, sigmas: Tensor, vae: AutoencoderKLWan) -> np.ndarray | None:
        """What the shot's middle frame will look like, uint8 [h, w, 3], for some of the steps.

        Two successive latents give the direction x1 - x0 in which they move (x_s = (1 - s) x0 + s x1 at the noise
        level s), and so the clean x0.

        Args:
            step: which has been done, from 0.
            latents: of the shot after it, [1, z, T, h, w].
            sigmas: noise levels before each step, and after the last.
            vae: their decoder.
        """
        before, level = self._before if step else None, float(sigmas[step + 1])
        self._before = (latents, level)
        every = ceil((len(sigmas) - 1) / _MOST)
        if before is None or level == before[1] or (step % every and level > 0):
            return None
        direction = (latents - before[0]) / (level - before[1])
        clean = latents - level * direction
        if self._weights is None:
            self.fit(clean[:, :, :2], decode_video(vae, clean[:, :, :2]))
        assert self._weights is not None
        middle = clean.shape[2] // 2
        colours = _rows(clean[:, :, middle : middle + 1]) @ self._weights
        return (colours.clamp(0, 1) * 255).round().to(torch.uint8).reshape(*clean.shape[3:], 3).numpy()


def _rows(latents: Tensor) -> Tensor:
    """[B, z, T, h, w] -> [B T h w, z + 1] on the CPU, the last column 1."""
    rows = latents.float().cpu().permute(0, 2, 3, 4, 1).reshape(-1, latents.shape[1])
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
