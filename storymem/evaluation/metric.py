"""What a metric is: it sees each shot of a film once, and says what it found of the story."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from storymem.scorers.scorer import Origin, as_images
from storymem.story import Shot, Story

Value = float | None
Pair = tuple[int, int, Value]
"""Two shots of a story, counted from 0, and a value."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One number of a table: ``name`` in files, ``title`` for people, ``heading`` where room is short."""

    name: str
    title: str
    heading: str


@dataclass(frozen=True, kw_only=True)
class Screening:
    """The film of one story, as far as metrics may know it before they see a shot.

    Args:
        story: what the film tells.
        lengths: frames of each shot; None for a shot that is missing.
    """

    story: Story
    lengths: tuple[int | None, ...]

    @cached_property
    def total(self) -> int | None:
        """Frames of the whole film; None if a shot is missing."""
        lengths = [length for length in self.lengths if length is not None]
        return sum(lengths) if len(lengths) == len(self.lengths) else None

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each shot begins in the film, in frames; a missing shot counts as empty."""
        return (0, *accumulate(length or 0 for length in self.lengths[:-1]))

    @cached_property
    def missing(self) -> str | None:
        """Which shots are missing, as a reason; None if none is."""
        names = [shot.label for shot, length in zip(self.story.shots, self.lengths, strict=True) if length is None]
        return f"missing: {', '.join(names)}" if names else None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one metric found in one film; plain JSON types.

    Args:
        columns: column -> value of the story. It is None, with a reason, if a shot that it needs is missing: a mean
            of the others would be of another film.
        reasons: column -> why there is no value.
        undefined: columns that this story does not have, whatever the film (no character appears twice); it does not
            count as missing in means over stories.
        shots: column -> a value for each shot.
        pairs: column -> values of pairs of shots.
        details: anything else worth keeping.
    """

    columns: dict[str, Value]
    reasons: dict[str, str] = field(default_factory=dict)
    undefined: tuple[str, ...] = ()
    shots: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    pairs: dict[str, tuple[Pair, ...]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


class Metric(ABC):
    """Measures films. A metric keeps nothing from one film to the next, so that their order cannot matter.

    Any subclass can be a ``_target_`` below ``metrics`` in the configuration.

    Attributes:
        version: is raised when values change; results of another version are not gone on with.
        columns: what it measures; names must not be those of another metric in the same run.
    """

    version: ClassVar[int] = 1
    columns: Sequence[Column]

    @property
    def weights(self) -> Origin:
        """Where its networks' weights are from.

        Values by "untrained" ones mean nothing and are marked everywhere; only values by "published" ones stand beside
        those of the paper.
        """
        return "own"

    @abstractmethod
    def see(self, shot: Shot, frames: np.ndarray, screening: Screening) -> Any:
        """Look at a shot's frames, uint8 [F, H, W, 3], and return what :meth:`conclude` needs of them.

        All frames of a film do not fit into memory; what is returned must.
        """

    @abstractmethod
    def conclude(self, seen: Sequence[Any | None], screening: Screening) -> Scores:
        """The film's scores from what was seen of its shots, in order; None for each that is missing."""

    def settings(self) -> dict[str, Any]:
        """What decides the values beside the films: rules, names, hashes of weights; plain JSON types."""
        return {}


def weights_sha256(*networks: nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of all parameters and buffers, as they are in memory."""
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def in_chunks(frames: np.ndarray, size: int, run: Callable[[Tensor], Tensor]) -> np.ndarray:
    """``run`` over ``frames`` [N, H, W, 3], ``size`` at a time, so that few are float at once -> float64 [N, ...]."""
    results = [run(as_images(frames[start : start + size])) for start in range(0, len(frames), size)]
    return torch.cat(results).double().numpy()


def mean(values: Sequence[Value]) -> Value:
    """The mean, or None if there is no value or one is None."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present and len(present) == len(values) else None


def reasons_for(columns: Mapping[str, Value], screening: Screening) -> dict[str, str]:
    """Column -> which shots are missing, for columns without a value."""
    return {name: screening.missing for name, value in columns.items() if value is None and screening.missing}
