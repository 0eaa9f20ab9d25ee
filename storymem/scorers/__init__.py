"""Scorers: images, clips and texts become embeddings or scores.

- `storymem.scorers.clip.ClipScorer`: image and text embeddings (keyframe selection, aesthetics).
- `storymem.scorers.viclip.ViclipScorer`: clip and text embeddings (prompt following, consistency).
- `QualityScorer`: the protocol of a quality filter; `storymem.scorers.scorer.NoQuality` lets every frame pass.
- `storymem.scorers.aesthetic.AestheticScorer`: LAION aesthetic score, V1 and V2.
- `storymem.scorers.hpsv3.Hpsv3Scorer`: human preference score, version 3.

One contract for all: images are float tensors in 0..1, RGB, [N, 3, H, W] (clips [B, T, 3, H, W]); results are float32
on the CPU, one row per image, clip or text, and an empty input gives an empty result.

This module loads no torch, and no scorer is imported before it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, Self

from storymem.weights import Weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LOADS = ".from_pretrained"


class QualityScorer(Protocol):
    """Scores frames. Any class with these members can be the ``_target_`` of ``scorer.quality``.

    Attributes:
        threshold: a frame that scores less is of low quality.
    """

    threshold: float

    def score(self, frames: Tensor) -> Tensor:
        """[N, 3, H, W] float in 0..1 -> [N] float32 on the CPU."""
        ...

    def to(self, device: str | torch.device) -> Self:
        """Move the weights, for example off the accelerator between shots."""
        ...


def scorer_weights(node: Any) -> list[Weights]:
    """The published weights that the ``_target_`` nodes at or below ``node`` load; no scorer is loaded."""
    if not isinstance(node, Mapping):
        return []
    found = [weights for below in node.values() for weights in scorer_weights(below)]
    if (target := str(node.get("_target_"))).endswith(_LOADS):
        module, name = target.removesuffix(_LOADS).rsplit(".", 1)
        required = getattr(getattr(importlib.import_module(module), name), "required_weights", None)
        if required is not None:  # else it is a user's own scorer
            found += required(**{key: value for key, value in node.items() if key != "_target_"})
    return found


def scorer_bytes(*scorers: Mapping[str, Any]) -> int:
    """Total size of the published weights of scorers; those that come with the package count as nothing."""
    return int(sum(weights.size_gb for scorer in scorers for weights in scorer_weights(scorer)) * 1e9)
