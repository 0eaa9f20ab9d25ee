"""A quality filter that is in memory only while it scores."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from storymem.scorers import QualityScorer


class OnDemand:
    """Loads a quality filter when it is used and frees it when it is moved to the CPU.

    For machines with no room for it beside the video model (``runtime.experts=in_turn``). It is loaded once at the
    start, so that a filter that does not load is reported before the first shot.

    Args:
        build: makes the filter, on the CPU.
    """

    def __init__(self, build: Callable[[], QualityScorer]) -> None:
        self._build, self._device = build, torch.device("cpu")
        self._scorer: QualityScorer | None = None
        self.threshold = build().threshold
        gc.collect()

    def score(self, frames: Tensor) -> Tensor:
        """As of the filter."""
        if self._scorer is None:
            self._scorer = self._build()
            self._scorer.to(self._device)
        return self._scorer.score(frames)

    def to(self, device: str | torch.device) -> Self:
        """Where it will score; "cpu" frees it."""
        self._device = torch.device(device)
        if self._device.type == "cpu":
            self._scorer = None
            gc.collect()
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
        elif self._scorer is not None:
            self._scorer.to(self._device)
        return self
