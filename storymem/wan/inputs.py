"""What a denoising loop is given besides the noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from storymem.wan.conditioning import model_input
from storymem.wan.segments import Layout

Texts = Mapping[str, Tensor]
"""Embeddings [prompts, L, D] by the names that a layout reads; that of StoryMem reads "prompt" alone."""


@dataclass(frozen=True, kw_only=True)
class Renoised:
    """Frames of a segment that are known: in each step they are the clean ones with that step's noise level.

    Args:
        segment: its name.
        latents: clean [1, z, M, h, w].
        noise: of the same shape.
    """

    segment: str
    latents: Tensor
    noise: Tensor

    def at(self, level: float) -> Tensor:
        """(1 - level) latents + level noise."""
        return (1 - level) * self.latents + level * self.noise


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is constant in the denoising loop, unless a callback changes it.

    Args:
        layout: of the pass with the prompt.
        negative_layout: of the pass with the negative prompt; it may lack the first segments of ``layout``.
        text: of the prompts.
        negative: of the negative prompts; None without guidance.
        condition: condition channels [1, C, N, h, w] of the N denoised latent frames; None: the base has none.
        memory: clean input [1, C, M, h, w] of memory frames that are not denoised; None: there are none.
        given: clean latents [1, z, n, h, w] that begin the video, for a base without condition channels.
        renoised: frames of ``layout`` that are known.
    """

    layout: Layout
    negative_layout: Layout
    text: Texts
    negative: Texts | None = None
    condition: Tensor | None = None
    memory: Tensor | None = None
    given: Tensor | None = None
    renoised: Renoised | None = None

    def with_known(self, latents: Tensor, level: float) -> Tensor:
        """``latents`` of the denoised frames, those that are known as they are at a noise level in 0..1."""
        if self.given is not None:
            given = self.given.to(latents).expand(latents.shape[0], -1, -1, -1, -1)
            latents = torch.cat([given, latents[:, :, given.shape[2] :]], dim=2)
        if self.renoised is not None:
            span = self.layout.span(self.renoised.segment)
            known = self.renoised.at(level).to(latents).expand(latents.shape[0], -1, -1, -1, -1)
            latents = torch.cat([latents[:, :, : span.start], known, latents[:, :, span.stop :]], dim=2)
        return latents

    def network_input(self, latents: Tensor, *, with_memory: bool) -> Tensor:
        """[B, C, N, h, w]: latents and condition channels; clean memory frames before them ``with_memory``."""
        seen = model_input(latents, self.condition)
        if not with_memory or self.memory is None:
            return seen
        return torch.cat([self.memory.to(seen).expand(seen.shape[0], -1, -1, -1, -1), seen], dim=2)


def batched(texts: Texts, batch: int, like: Tensor) -> dict[str, Tensor]:
    """Texts for ``batch`` videos, each [B, L, D], with the device and the type of ``like``."""
    found = {}
    for name, embeds in texts.items():
        times, rest = divmod(batch, len(embeds))
        if rest:
            raise ValueError(f"{len(embeds)} text embeddings for {batch} videos: give one for each prompt")
        repeated = embeds if times == 1 else embeds.repeat_interleave(times, dim=0)
        found[name] = repeated.to(like.device, like.dtype)
    return found
