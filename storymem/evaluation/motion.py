"""How much films move, and whether continued shots continue: what a still would pass off as consistency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from storymem.evaluation.metric import Column, FilmInfo, ImageEmbedder, Metric, Scores, Value, cosine, mean
from storymem.scorers.scorer import as_images
from storymem.story import Shot

NEARLY_STILL = 0.02
"""Motion below which consistency means little; about the noise that a video codec leaves in a still."""

_FPS = 16.0  # where a file states none


class Motion(Metric):
    """Mean absolute difference of neighbouring frames in 0..1, times frames per second; mean over shots.

    It is measured with every metric of consistency, because a film of one still is the most consistent of all. Ours;
    not part of the paper.
    """

    columns = (Column("motion", "Motion (mean change of a pixel per second)", "Motion"),)
    rules: Mapping[str, Any] = {"frames": "all", "nearly_still_below": NEARLY_STILL}

    def measure_shot(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> float:
        """Motion of a shot; 0 for a single frame."""
        rate = (film.fps[shot.index] if film.fps else None) or _FPS
        changes = [np.abs(after.astype(np.int16) - before).mean() for before, after in pairwise(frames)]
        return float(np.mean(changes)) / 255 * rate if changes else 0.0

    def compute(self, measured: Sequence[float | None], film: FilmInfo) -> Scores:
        return Scores.of({"motion": mean(measured)}, film.missing, shots={"motion": tuple(measured)})


class Joins(Metric):
    """Where a shot continues the one before (``cut: false``): cosine of the last frame before and the first after.

    As cs_transition of EntityBench (arXiv 2605.15199), whose embedder is DINOv2.

    Args:
        embedder: of frames.
    """

    columns = (Column("join_similarity", "Similarity where a shot continues", "Joins", consistency=True),)

    def __init__(self, embedder: ImageEmbedder) -> None:
        self.embedder, self.scorers = embedder, (embedder,)
        self.rules = {"frames": "the last before and the first after"}

    def measure_shot(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> np.ndarray:
        """Embeddings [2, D] of the first and the last frame."""
        return self.embedder.embed_images(as_images(frames[[0, -1]])).double().numpy()

    def compute(self, measured: Sequence[np.ndarray | None], film: FilmInfo) -> Scores:
        joins = [shot.index for shot in film.story.shots if not shot.cut]
        values: list[Value] = [None] * len(measured)
        for index in joins:
            before, after = measured[index - 1], measured[index]
            values[index] = None if before is None or after is None else cosine(before[1], after[0])
        return Scores.of(
            {"join_similarity": mean([values[index] for index in joins])},
            film.missing,
            {} if joins else {"join_similarity": "no shot continues the one before"},
            shots={"join_similarity": tuple(values)},
        )
