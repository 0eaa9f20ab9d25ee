"""Which frames of a finished shot become keyframes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from storymem.memory.keyframes import normalised

MOST_KEYFRAMES = 1000  # of one shot


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a selection policy decided, and why.

    Args:
        selected: frame indices chosen within the shot, ascending.
        kept: those of ``selected`` that the bank does not hold already.
        kept_slots: positions of ``kept`` in ``selected``.
        final_threshold: cosine threshold of the accepted pass; ``None`` if the policy has none.
        threshold_steps: how often the threshold fell.
        candidates_per_pass: number of frames chosen in each pass, the accepted one last.
        quality: frame -> quality score, for every frame whose score was asked for.
        similarity: selected frame -> its highest cosine to the bank; ``None`` if the bank was empty.
    """

    selected: tuple[int, ...]
    kept: tuple[int, ...]
    kept_slots: tuple[int, ...]
    final_threshold: float | None
    threshold_steps: int
    candidates_per_pass: tuple[int, ...]
    quality: dict[int, float]
    similarity: dict[int, float | None]


class SelectionPolicy(Protocol):
    """Chooses keyframes of a shot. Any class with this method can be a ``_target_`` in the configuration."""

    @property
    def max_keyframes(self) -> int:
        """Most keyframes that one shot can leave."""
        ...

    def select(
        self,
        embeddings: np.ndarray,
        *,
        bank: np.ndarray,
        quality: Callable[[int], float] | None = None,
        quality_threshold: float | None = None,
    ) -> Selection:
        """Choose among the frames of one shot.

        Args:
            embeddings: [N, D], one row per frame; rows need not have unit length.
            bank: [M, D], embeddings of everything remembered so far; M may be 0.
            quality: frame index -> score. Asked lazily and at most once per frame; ``None``: no quality
                filter.
            quality_threshold: lowest score that passes. It belongs to the scorer (each has its own scale),
                not to the policy, so it comes with the scores: both are given, or neither.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class KeyframeSelector:
    """Semantic keyframe selection: a frame is kept when it shows something new.

    The first keyframe is the first frame whose quality passes; each later frame is compared with the last
    keyframe chosen and becomes one if their cosine is below the threshold and its quality passes. While more
    than ``max_keyframes`` are chosen, the threshold falls by ``threshold_step`` and the choice is made again.
    The threshold may become negative, and one step can take the number from above the limit to well below it.
    At last, a keyframe whose cosine to anything in the bank is above ``bank_similarity_threshold`` is
    dropped; that threshold does not fall with the other, and keyframes of one shot are not compared with each
    other here.

    Agrees with the published scan, of which it keeps one peculiarity by default: scanning starts at frame 2,
    so frame 1 can be chosen only as the first keyframe. ``first_scanned_frame=1`` mends that. It differs in
    what is compared, not in the rule: the published code embeds size-reduced frames for the scan and
    full-size ones for the bank, twice per compared pair; here each frame has one embedding, made once, for
    both. Cosines can therefore differ slightly from published runs even with the same weights.

    Args:
        similarity_threshold: cosine below which a frame is new, at first.
        threshold_step: by how much the threshold falls, at least 0.0001.
        max_keyframes: most keyframes chosen from one shot.
        bank_similarity_threshold: cosine above which the bank has the picture already; 1 keeps everything.
        first_scanned_frame: lowest index that can become a later keyframe.
    """

    similarity_threshold: float = 0.9
    threshold_step: float = 0.01
    max_keyframes: int = 3
    bank_similarity_threshold: float = 0.9
    first_scanned_frame: int = 2

    def __post_init__(self) -> None:
        for name in ("similarity_threshold", "bank_similarity_threshold"):
            if not -1 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a cosine lies between -1 and 1")
        if not 1e-4 <= self.threshold_step <= 1:
            raise ValueError(f"threshold_step={self.threshold_step}: must be between 0.0001 and 1")
        for name in ("max_keyframes", "first_scanned_frame"):
            if not 1 <= getattr(self, name) <= MOST_KEYFRAMES:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1 and at most {MOST_KEYFRAMES}")

    def select(
        self,
        embeddings: np.ndarray,
        *,
        bank: np.ndarray,
        quality: Callable[[int], float] | None = None,
        quality_threshold: float | None = None,
    ) -> Selection:
        """See :meth:`SelectionPolicy.select`."""
        frames = _frames(embeddings)
        good = _QualityFilter(quality, quality_threshold)
        first = next((frame for frame in range(len(frames)) if good.passes(frame)), None)
        selected: list[int] = []
        passes = [0]
        threshold = self.similarity_threshold
        if first is not None:
            cosines = np.clip(frames @ frames.T, -1, 1).tolist()
            selected = self._scan(cosines, first, threshold, good)
            passes = [len(selected)]
            while len(selected) > self.max_keyframes:
                threshold -= self.threshold_step
                selected = self._scan(cosines, first, threshold, good)
                passes.append(len(selected))
        similarity = _highest_cosines(frames, selected, bank)
        slots = [
            slot
            for slot, frame in enumerate(selected)
            if (cosine := similarity[frame]) is None or cosine <= self.bank_similarity_threshold
        ]
        return Selection(
            selected=tuple(selected),
            kept=tuple(selected[slot] for slot in slots),
            kept_slots=tuple(slots),
            final_threshold=threshold,
            threshold_steps=len(passes) - 1,
            candidates_per_pass=tuple(passes),
            quality=good.scores,
            similarity=similarity,
        )

    def _scan(self, cosines: list[list[float]], first: int, threshold: float, good: _QualityFilter) -> list[int]:
        """One pass over the shot at one threshold; ``cosines`` is the [N, N] Gram matrix."""
        chosen = [first]
        for frame in range(max(first + 1, self.first_scanned_frame), len(cosines)):
            if cosines[chosen[-1]][frame] < threshold and good.passes(frame):
                chosen.append(frame)
        return chosen


@dataclass(frozen=True, kw_only=True)
class UniformSelector:
    """Keyframes at even distances, whatever they show: the ablation without semantic selection.

    The shot is cut into ``max_keyframes`` stretches of equal length, and of each the first frame whose quality passes
    is kept. The bank is not consulted, because that comparison is semantic too; the cosines are still
    reported. The paper does not say how frames are taken in its ablation: ``max_keyframes=1`` is its plainest reading
    (the first frame of every shot), ``max_keyframes=3`` remembers as much as the semantic selection may.
    """

    max_keyframes: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.max_keyframes <= MOST_KEYFRAMES:
            raise ValueError(f"max_keyframes={self.max_keyframes}: must be at least 1 and at most {MOST_KEYFRAMES}")

    def select(
        self,
        embeddings: np.ndarray,
        *,
        bank: np.ndarray,
        quality: Callable[[int], float] | None = None,
        quality_threshold: float | None = None,
    ) -> Selection:
        """See :meth:`SelectionPolicy.select`."""
        frames = _frames(embeddings)
        good = _QualityFilter(quality, quality_threshold)
        starts = [number * len(frames) // self.max_keyframes for number in range(self.max_keyframes + 1)]
        stretches = [range(start, stop) for start, stop in pairwise(starts)]
        found = [next((frame for frame in stretch if good.passes(frame)), None) for stretch in stretches]
        selected = [frame for frame in found if frame is not None]
        return Selection(
            selected=tuple(selected),
            kept=tuple(selected),
            kept_slots=tuple(range(len(selected))),
            final_threshold=None,
            threshold_steps=0,
            candidates_per_pass=(len(selected),),
            quality=good.scores,
            similarity=_highest_cosines(frames, selected, bank),
        )


class _QualityFilter:
    """Asks for a frame's score when it is first needed, and never again."""

    def __init__(self, score: Callable[[int], float] | None, threshold: float | None) -> None:
        if (score is None) != (threshold is None):
            raise ValueError("quality and quality_threshold belong together: give both, or neither for no filter")
        self._score = score
        self._threshold = threshold
        self.scores: dict[int, float] = {}

    def passes(self, frame: int) -> bool:
        if self._score is None or self._threshold is None:
            return True
        if frame not in self.scores:
            self.scores[frame] = float(self._score(frame))
        return self.scores[frame] >= self._threshold


def _frames(embeddings: np.ndarray) -> np.ndarray:
    if embeddings.ndim != 2 or len(embeddings) == 0:
        raise ValueError(f"embeddings must be [N, D] with at least one frame, are {list(embeddings.shape)}")
    return normalised(embeddings)


def _highest_cosines(frames: np.ndarray, selected: list[int], bank: np.ndarray) -> dict[int, float | None]:
    """Frame -> highest cosine to a row of the bank; ``frames`` are [N, D] of unit length."""
    if len(bank) == 0:
        return dict.fromkeys(selected)
    if bank.ndim != 2 or bank.shape[1] != frames.shape[1]:
        raise ValueError(
            f"the bank holds embeddings {list(bank.shape)}, the shot's have {frames.shape[1]} dimensions: "
            "they were made by different encoders; embed the bank anew"
        )
    highest = np.clip(frames[selected] @ normalised(bank).T, -1, 1).max(axis=1, initial=-1)
    return dict(zip(selected, highest.tolist(), strict=True))
