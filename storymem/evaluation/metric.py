"""What a metric is: it measures each shot of a film once, and computes the story's scores from that."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from itertools import accumulate, combinations
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from storymem.scorers.scorer import Origin, as_images
from storymem.story import Shot, Story

Value = float | None
Pair = tuple[int, int, Value]
"""Indices of two shots of a story, from 0, and a value."""

_OF_SCORERS = ("name", "preprocessing", "dtype", "box_threshold")  # recorded where a scorer has them


class ImageEmbedder(Protocol):
    """Embeds images, as :class:`storymem.scorers.clip.ClipScorer` and DINOv2 do."""

    batch_size: int

    def embed_images(self, frames: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Column:
    """A column of the tables: ``name`` in files, ``title`` on the page, ``heading`` in narrow tables.

    Args:
        consistency: a film of one still scores highest, so the films' motion is measured and shown beside it.
        exact: it is read without error from a drawn world; other columns are compared with it.
    """

    name: str
    title: str
    heading: str
    _: KW_ONLY
    consistency: bool = False
    exact: bool = False


@dataclass(frozen=True, kw_only=True)
class FilmInfo:
    """What metrics know of a film before they measure its shots.

    Args:
        story: of the film.
        lengths: frames of each shot; None for a missing shot.
        fps: frames per second of each shot, where known.
        separate: whether each shot is a file of its own.
    """

    story: Story
    lengths: tuple[int | None, ...]
    fps: tuple[float | None, ...] = ()
    separate: bool = True

    @cached_property
    def total(self) -> int | None:
        """Frames of the whole film; None if a shot is missing."""
        lengths = [length for length in self.lengths if length is not None]
        return sum(lengths) if len(lengths) == len(self.lengths) else None

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First frame of each shot in the film; a missing shot counts as empty."""
        return (0, *accumulate(length or 0 for length in self.lengths[:-1]))

    @cached_property
    def missing(self) -> str | None:
        """Which shots are missing, as a reason; None if none is."""
        names = [shot.label for shot, length in zip(self.story.shots, self.lengths, strict=True) if length is None]
        return f"missing: {', '.join(names)}" if names else None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one film by one metric, in plain JSON types.

    Args:
        columns: column -> value of the story. It is None, with a reason, if a shot that it needs is missing: the mean
            over the other shots would be that of another film.
        reasons: column -> why there is no value.
        undefined: columns that this story cannot have (no character appears twice). They do not count as missing in
            means over stories.
        shots: column -> a value for each shot.
        pairs: column -> values of pairs of shots.
        marks: column -> a sentence that explains its value, for a footnote of the tables.
        details: further values for ``results.json``.
    """

    columns: dict[str, Value]
    reasons: dict[str, str] = field(default_factory=dict)
    undefined: tuple[str, ...] = ()
    shots: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    pairs: dict[str, tuple[Pair, ...]] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, columns: dict[str, Value], why: str | None, undefined: Mapping[str, str] | None = None, **more: Any
    ) -> Scores:
        """Scores with reasons for what is None: those of ``undefined``, by column, else ``why``."""
        lacking = {name: why for name, value in columns.items() if value is None and why is not None}
        undefined = dict(undefined or {})
        return cls(columns=columns, reasons=lacking | undefined, undefined=tuple(undefined), **more)


class Metric(ABC):
    """Measures films. Subclass it and name the class by ``_target_`` below ``metrics``: ``+metrics.mine._target_=...``.

    A metric keeps no state from one film to the next, so that neither their order nor the number of processes changes
    a result.

    Attributes:
        columns: what it measures; names must be unique among the metrics of a run.
        version: increase it when values change; results of another version are recomputed.
        scorers: the networks that it measures with.
        rules: what else decides the values, except the films, in plain JSON types.
        is_papers: whether its scorers' published weights are those of the paper; others count as "own".
    """

    columns: Sequence[Column]
    version: int = 1
    scorers: tuple[Any, ...] = ()
    rules: Mapping[str, Any] = {}
    is_papers: bool = True

    @property
    def weights(self) -> Origin:
        """The least trusted origin of its scorers' weights; "own" without scorers, or for one that does not name it.

        Values by "untrained" weights mean nothing and are marked everywhere; only values by "published" ones stand
        beside those of the paper.
        """
        origins: set[Origin] = {getattr(scorer, "origin", "own") for scorer in self.scorers} or {"own"}
        least = min(origins, key=("untrained", "own", "published").index)
        return "own" if least == "published" and not self.is_papers else least

    @abstractmethod
    def measure_shot(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> Any:
        """What :meth:`compute` needs of a shot with ``frames``, uint8 [F, H, W, 3].

        It should be small: the frames of a whole film do not fit into RAM.
        """

    @abstractmethod
    def compute(self, measured: Sequence[Any | None], film: FilmInfo) -> Scores:
        """Scores of a film from what was measured of its shots, in order; None for each missing shot."""

    def check(self, story: Story) -> None:  # noqa: B027 (most measure any story)
        """Raise ``ValueError`` for a story that this metric cannot measure; called before films are made."""

    def finds_characters(self, story: Story) -> bool:
        """Whether :meth:`without_characters` can find those of ``story``."""
        return False

    def without_characters(self, shot: Shot, frames: np.ndarray, film: FilmInfo) -> np.ndarray:
        """``frames`` with the background in place of characters, for a control film."""
        return frames

    def settings(self) -> dict[str, Any]:
        """All that decides the values except the films: of the scorers names and hashes of weights, then `rules`."""
        found: dict[str, Any] = (
            {"scorers": ", ".join(type(one).__name__ for one in self.scorers)} if self.scorers else {}
        )
        for key in _OF_SCORERS:
            values = dict.fromkeys(str(value) for one in self.scorers if (value := getattr(one, key, None)) is not None)
            found |= {key: ", ".join(values)} if values else {}
        if networks := [one.network for one in self.scorers if hasattr(one, "network")]:
            found["weights_sha256"] = weights_sha256(*networks)
        return found | dict(self.rules)


class InnerFramesMetric(Metric):
    """A metric of some frames of each shot, evenly spaced, without the first and the last.

    Args:
        frames: how many of each shot.
        scorers: see `Metric`.
    """

    def __init__(self, frames: int, *scorers: Any) -> None:
        if frames < 1:
            raise ValueError(f"frames={frames}: must be at least 1")
        self.frames, self.scorers = frames, scorers
        self.rules = {"frames": f"{frames} of each shot, evenly spaced, not the first or last"}

    def chosen(self, length: int) -> list[int]:
        """Indices of the frames of a shot with ``length`` frames; fewer of a short shot."""
        return sorted({round(place * (length - 1) / (self.frames + 1)) for place in range(1, self.frames + 1)})

    def chosen_of_film(self, film: FilmInfo) -> list[list[int] | None]:
        """Those of each shot, for the details; None for a missing shot."""
        return [None if length is None else self.chosen(length) for length in film.lengths]


def appearances(story: Story, names: Sequence[str] | None = None) -> dict[str, list[int]]:
    """Character -> indices of the shots that list it, for those of ``names`` (default: all) with two or more."""
    wanted = [one.name for one in story.characters] if names is None else names
    found = {name: [shot.index for shot in story.shots if name in shot.characters] for name in wanted}
    return {name: shots for name, shots in found.items() if len(shots) >= 2}


def weights_sha256(*networks: nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def in_batches(frames: np.ndarray, size: int, run: Callable[[Tensor], Tensor]) -> np.ndarray:
    """``run`` over ``frames`` [N, H, W, 3], ``size`` at a time, to save RAM -> float64 [N, ...]."""
    results = [run(as_images(frames[start : start + size])) for start in range(0, len(frames), size)]
    return torch.cat(results).double().numpy()


def mean(values: Sequence[Value]) -> Value:
    """The mean; None if there is no value or one is None."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present and len(present) == len(values) else None


def mean_of_present(values: Sequence[Value]) -> Value:
    """The mean of the values that are not None; None if there is none."""
    return mean([value for value in values if value is not None])


def cosine(one: np.ndarray | None, other: np.ndarray | None) -> Value:
    """The product of two unit vectors; None if one is missing."""
    return None if one is None or other is None else float(one @ other)


def pairs_of(rows: Sequence[np.ndarray | None], shots: Sequence[int] | None = None) -> list[Pair]:
    """The cosines of all pairs of ``rows``, or of those of the given ``shots``."""
    return [(i, j, cosine(rows[i], rows[j])) for i, j in combinations(range(len(rows)) if shots is None else shots, 2)]


def values_of(pairs: Iterable[Pair]) -> list[Value]:
    """Their values."""
    return [value for *_, value in pairs]


def unmeasured(measured: Sequence[Any | None], film: FilmInfo) -> str | None:
    """Why a film is incomplete: shots that are missing or, among ``measured``, not finite; None if it is complete."""
    return film.missing or ("a shot has values that are not finite" if any(one is None for one in measured) else None)
