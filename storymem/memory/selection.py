"""Which frames of a generated shot become keyframes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from storymem.memory.keyframes import normalised

MOST_KEYFRAMES = 1000  # of one shot

Verdict = Literal["kept", "low quality", "like the last", "in the memory"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A frame that was examined, and why it was kept or not.

    Args:
        frame: index into the shot.
        verdict: "low quality": the score is below the threshold; "like the last": the cosine to the last frame chosen
            is not below it; "in the memory": the cosine to the memory is above it.
        quality: its score, if it was scored.
        similarity: the cosine; None for low quality, and while the memory is empty.
        threshold: what the score or the cosine was compared with; None: nothing.
    """

    frame: int
    verdict: Verdict
    quality: float | None
    similarity: float | None
    threshold: float | None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The result of a selection policy; frames are indices into the shot.

    Args:
        selected: frames chosen within the shot, ascending.
        kept: those of ``selected`` that become keyframes: the bank has nothing like them.
        quality: frame -> score, for every frame that was scored.
        similarity: selected frame -> its highest cosine to the bank; None if the bank was empty.
        candidates: every frame that was scored or once chosen, ascending; none if a policy does not explain itself.
    """

    selected: tuple[int, ...]
    kept: tuple[int, ...]
    quality: dict[int, float]
    similarity: dict[int, float | None]
    candidates: tuple[Candidate, ...] = ()


@runtime_checkable
class SelectionPolicy(Protocol):
    """Chooses the keyframes of a shot. Any class like this can be the ``_target_`` of ``memory.selector``."""

    @property
    def max_keyframes(self) -> int:
        """Most keyframes of one shot."""
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
            bank: [M, D], embeddings of the whole memory; M may be 0.
            quality: frame -> score, called at most once per frame and only where needed; None: no quality filter.
            quality_threshold: lowest score that passes, given with ``quality``: each scorer has a scale of its own.
        """
        ...


class _Selector(ABC):
    """What the policies here share; each chooses frames of a shot in :meth:`_choose`."""

    def select(
        self,
        embeddings: np.ndarray,
        *,
        bank: np.ndarray,
        quality: Callable[[int], float] | None = None,
        quality_threshold: float | None = None,
    ) -> Selection:
        """See :meth:`SelectionPolicy.select`."""
        if embeddings.ndim != 2 or len(embeddings) == 0:
            raise ValueError(f"embeddings must be [N, D] with at least one frame, are {list(embeddings.shape)}")
        frames, good = normalised(embeddings), _QualityFilter(quality, quality_threshold)
        selected, rejected = self._choose(frames, good)
        similarity, limit = _highest_cosines(frames, selected, bank), self._bank_limit
        kept = [f for f in selected if limit is None or (cosine := similarity[f]) is None or cosine <= limit]
        outcomes: dict[int, tuple[Verdict, float | None, float | None]] = {}
        outcomes |= dict.fromkeys(good.scores, ("low quality", None, good.threshold))
        outcomes |= {frame: ("like the last", *numbers) for frame, numbers in rejected.items()}
        for frame, cosine in similarity.items():
            outcomes[frame] = "kept" if frame in kept else "in the memory", cosine, None if cosine is None else limit
        candidates = (
            Candidate(frame=frame, verdict=verdict, quality=good.scores.get(frame), similarity=cosine, threshold=bound)
            for frame, (verdict, cosine, bound) in sorted(outcomes.items())
        )
        return Selection(
            selected=tuple(selected),
            kept=tuple(kept),
            quality=good.scores,
            similarity=similarity,
            candidates=tuple(candidates),
        )

    @property
    def _bank_limit(self) -> float | None:
        """Cosine above which the bank has a frame; None: it is not compared."""
        return None

    @abstractmethod
    def _choose(self, frames: np.ndarray, good: _QualityFilter) -> tuple[list[int], Mapping[int, tuple[float, float]]]:
        """The chosen of ``frames``, [N, D] of unit length; and those like the last one: frame -> cosine, threshold."""


@dataclass(frozen=True, kw_only=True)
class KeyframeSelector(_Selector):
    """Semantic keyframe selection: a frame becomes a keyframe if it shows something new.

    The first keyframe is the first frame whose quality passes. Each later frame is compared with the last keyframe
    chosen, and becomes one if their cosine is below the threshold and its quality passes. While more than
    ``max_keyframes`` are chosen, the threshold is lowered by ``threshold_step`` (below zero if needed) and the scan
    starts again. Finally a keyframe whose cosine to anything in the bank is above ``bank_similarity_threshold`` is
    dropped; that threshold stays as it is.

    Same decisions as the published scan, whose quirk is the default: it starts at frame 2, so frame 1 can only be the
    first keyframe. One difference: each frame has one embedding here, where the published code embeds reduced frames
    for the scan and full-size ones for the bank.

    Args:
        similarity_threshold: cosine below which a frame is new, at first.
        threshold_step: how much the threshold is lowered by, at least 0.0001.
        max_keyframes: most keyframes of one shot.
        bank_similarity_threshold: cosine above which the bank has the image already; 1 keeps everything.
        first_scanned_frame: lowest frame index that can become a later keyframe.
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
        _check_count("max_keyframes", self.max_keyframes)
        _check_count("first_scanned_frame", self.first_scanned_frame)

    @property
    def _bank_limit(self) -> float:
        return self.bank_similarity_threshold

    def _choose(self, frames: np.ndarray, good: _QualityFilter) -> tuple[list[int], Mapping[int, tuple[float, float]]]:
        first = next((frame for frame in range(len(frames)) if good.passes(frame)), None)
        if first is None:
            return [], {}
        cosines = np.clip(frames @ frames.T, -1, 1).tolist()
        threshold, examined = self.similarity_threshold, set[int]()
        while len(selected := self._scan(cosines, first, threshold, good)) > self.max_keyframes:
            examined.update(selected)
            threshold -= self.threshold_step
        before = {frame: max(one for one in selected if one < frame) for frame in sorted(examined - {*selected})}
        return selected, {frame: (cosines[last][frame], threshold) for frame, last in before.items()}

    def _scan(self, cosines: list[list[float]], first: int, threshold: float, good: _QualityFilter) -> list[int]:
        """One pass over the shot at one threshold; ``cosines`` of all pairs of frames, [N][N]."""
        chosen = [first]
        for frame in range(max(first + 1, self.first_scanned_frame), len(cosines)):
            if cosines[chosen[-1]][frame] < threshold and good.passes(frame):
                chosen.append(frame)
        return chosen


@dataclass(frozen=True, kw_only=True)
class UniformSelector(_Selector):
    """Keyframes at even distances: the ablation without semantic selection.

    The shot is divided into ``max_keyframes`` parts of equal length, and the first frame of each part whose quality
    passes is kept, whatever the bank holds. The paper does not specify how frames are chosen in its ablation:
    ``max_keyframes=1`` (the first frame of every shot) is the plainest reading, ``max_keyframes=3`` keeps as many as
    the semantic selection may.
    """

    max_keyframes: int = 3

    def __post_init__(self) -> None:
        _check_count("max_keyframes", self.max_keyframes)

    def _choose(self, frames: np.ndarray, good: _QualityFilter) -> tuple[list[int], Mapping[int, tuple[float, float]]]:
        starts = [number * len(frames) // self.max_keyframes for number in range(self.max_keyframes + 1)]
        found = [next(filter(good.passes, range(start, stop)), None) for start, stop in pairwise(starts)]
        return [frame for frame in found if frame is not None], {}


@dataclass(frozen=True, kw_only=True)
class EvenlySpaced(_Selector):
    """Frames at equal distances, the first and the last among them: ``round(i (F - 1) / (n - 1))``, as Memento samples.

    Quality makes no difference.

    Args:
        max_keyframes: n; a shot with fewer frames gives each once.
    """

    max_keyframes: int = 8

    def __post_init__(self) -> None:
        if self.max_keyframes < 2:
            raise ValueError(f"max_keyframes={self.max_keyframes}: the first and the last frame are 2")

    def _choose(self, frames: np.ndarray, good: _QualityFilter) -> tuple[list[int], Mapping[int, tuple[float, float]]]:
        last, steps = len(frames) - 1, self.max_keyframes - 1
        return sorted({round(number * last / steps) for number in range(self.max_keyframes)}), {}


class _QualityFilter:
    """Scores a frame when its score is first needed, and never again."""

    def __init__(self, score: Callable[[int], float] | None, threshold: float | None) -> None:
        if (score is None) != (threshold is None):
            raise ValueError("quality and quality_threshold belong together: give both, or neither for no filter")
        self._score = score
        self.threshold = threshold
        self.scores: dict[int, float] = {}

    def passes(self, frame: int) -> bool:
        if self._score is None or self.threshold is None:
            return True
        if frame not in self.scores:
            self.scores[frame] = float(self._score(frame))
        return self.scores[frame] >= self.threshold


def _check_count(name: str, value: int) -> None:
    if not 1 <= value <= MOST_KEYFRAMES:
        raise ValueError(f"{name}={value}: must be at least 1 and at most {MOST_KEYFRAMES}")


def _highest_cosines(frames: np.ndarray, selected: Sequence[int], bank: np.ndarray) -> dict[int, float | None]:
    """Frame -> highest cosine to a row of the bank; ``frames`` are [N, D] of unit length."""
    if len(bank) == 0:
        return dict.fromkeys(selected)
    if bank.ndim != 2 or bank.shape[1] != frames.shape[1]:
        raise ValueError(
            f"the bank holds embeddings {list(bank.shape)} and those of the shot have {frames.shape[1]} dimensions: "
            "they are of different encoders; embed the bank again"
        )
    highest = np.clip(frames[list(selected)] @ normalised(bank).T, -1, 1).max(axis=1, initial=-1)
    return dict(zip(selected, highest.tolist(), strict=True))
