"""Which part of the memory the next shot looks back at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Protocol

from storymem.memory.keyframes import Keyframe


class ShotToCome(Protocol):
    """What a policy may know of the shot that is about to be generated."""

    @property
    def characters(self) -> Sequence[str]: ...


class RecallPolicy(Protocol):
    """Picks keyframes for one shot. Any class with this method can be a ``_target_`` in the configuration."""

    def recall(self, keyframes: Sequence[Keyframe], shot: ShotToCome | None) -> list[Keyframe]:
        """Some of ``keyframes`` (the whole bank, oldest first), in the bank's order, each once.

        Must depend on its arguments only: a resumed film recalls what the uninterrupted one would have.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SinkAndRecent:
    """The published policy: the first ``sink`` keyframes, which never leave, and the newest of the others.

    Args:
        capacity: most keyframes recalled; 0 recalls nothing, whatever the sink.
        sink: how many of the oldest always stay, at most ``capacity``.
    """

    capacity: int = 10
    sink: int = 3

    def __post_init__(self) -> None:
        _check_size(self.capacity, self.sink)

    def recall(self, keyframes: Sequence[Keyframe], shot: ShotToCome | None = None) -> list[Keyframe]:
        """See :meth:`RecallPolicy.recall`; ``shot`` does not matter."""
        return _sink_and_recent(keyframes, self.capacity, self.sink)


@dataclass(frozen=True, kw_only=True)
class CharacterFirst:
    """Pictures of the characters in the shot, then sink and recent keyframes in the room that is left.

    Pictures of a character are reference images, and frames of shots with that character alone; the oldest come
    first. Those of characters that the shot does not name are left out: so several references per character do not
    crowd out the shots before, and no one is given another's looks. For a shot that names no character this is
    :class:`SinkAndRecent`. Not part of the published method.

    Args:
        capacity: most keyframes recalled; 0 recalls nothing.
        sink: as in :class:`SinkAndRecent`, counted among keyframes that are of no single character.
        references: most pictures of characters recalled, shared evenly by the characters of the shot.
    """

    capacity: int = 10
    sink: int = 3
    references: int = 5

    def __post_init__(self) -> None:
        _check_size(self.capacity, self.sink)
        if self.references < 0:
            raise ValueError(f"references={self.references}: must not be negative")

    def recall(self, keyframes: Sequence[Keyframe], shot: ShotToCome | None) -> list[Keyframe]:
        """See :meth:`RecallPolicy.recall`."""
        if shot is None or not shot.characters:
            return _sink_and_recent(keyframes, self.capacity, self.sink)
        of_each = [[k for k in keyframes if k.character == name] for name in shot.characters]
        by_turns = [k for k in chain.from_iterable(zip_longest(*of_each)) if k is not None]
        references = by_turns[: min(self.references, self.capacity)]
        room = self.capacity - len(references)
        others = _sink_and_recent([k for k in keyframes if k.character is None], room, min(self.sink, room))
        recalled = {k.id for k in references + others}
        return [k for k in keyframes if k.id in recalled]


def _sink_and_recent(keyframes: Sequence[Keyframe], capacity: int, sink: int) -> list[Keyframe]:
    if len(keyframes) <= capacity:
        return list(keyframes)
    if capacity == 0:
        return []
    return [*keyframes[:sink], *keyframes[len(keyframes) - (capacity - sink) :]]


def _check_size(capacity: int, sink: int) -> None:
    if capacity < 0 or sink < 0:
        raise ValueError(f"capacity={capacity}, sink={sink}: neither may be negative")
    if 0 < capacity < sink:
        raise ValueError(f"sink={sink} does not fit into capacity={capacity}: write sink={capacity} or less")
