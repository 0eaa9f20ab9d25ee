"""What the shot loop calls, as protocols, and what it recalls for a shot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from storymem.memory import Keyframe
from storymem.wan.settings import VideoSettings
from storymem.wan.shots import Candidates, OnStep, ShotRequest
from storymem.wan.spec import Expert


class ShotGenerator(Protocol):
    """Generates shots; see :class:`storymem.wan.shots.WanShotGenerator`."""

    @property
    def video(self) -> VideoSettings: ...

    @property
    def expert_names(self) -> tuple[Expert, ...]: ...

    def prepare(self, prompts: Sequence[str], negative_prompts: Sequence[str | None]) -> None: ...

    def first(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray: ...

    def generate(self, request: ShotRequest, on_step: OnStep | None = None) -> np.ndarray: ...

    def encode_keyframes(self, frames: Sequence[np.ndarray]) -> list[Tensor]: ...

    def choose(self, candidates: Candidates, local: int, whole: int, expert: Expert | None = None) -> list[int]: ...


class Embedder(Protocol):
    """Embeds frames and texts; see :class:`storymem.scorers.clip.ClipScorer`."""

    def embed_images(self, frames: Tensor) -> Tensor: ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor: ...

    def to(self, device: str | torch.device | None = None) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Recalled:
    """The keyframes that a shot is given, oldest first.

    Args:
        keyframes: all of them.
        by_expert: where each expert recalls its own, those of each.
    """

    keyframes: list[Keyframe]
    by_expert: Mapping[Expert, list[Keyframe]] = field(default_factory=dict)

    @property
    def ids(self) -> dict[str, tuple[str, ...]]:
        """Ids by expert."""
        return {expert: tuple(keyframe.id for keyframe in own) for expert, own in self.by_expert.items()}
