"""What a quality filter of frames is, and the one that lets every frame pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from storymem.scorers.inputs import check_frames


class QualityScorer(Protocol):
    """Scores frames; a frame whose score is below ``threshold`` is of low quality.

    Attributes:
        name: for a film's manifest.
        threshold: on the scorer's own scale.
    """

    name: str
    threshold: float

    def score(self, frames: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """[N, 3, H, W] float in 0..1 -> [N] float32 on the CPU."""
        ...

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> QualityScorer:
        """Move the weights, for example off the accelerator between shots."""
        ...

    def free(self) -> None:
        """Drop the weights."""
        ...


class NoQuality:
    """No filter: every frame scores 0 against a threshold of 0, and so passes."""

    name = "none"
    threshold = 0.0

    def score(self, frames: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Zeros [N], after the same check of ``frames`` as every scorer makes."""
        return torch.zeros(len(check_frames(frames)))

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> NoQuality:
        """Nothing to move."""
        return self

    def free(self) -> None:
        """Nothing to drop."""
