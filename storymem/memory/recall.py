"""Which keyframes of the memory the next shot is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest
from typing import Protocol, runtime_checkable

import numpy as np

from storymem.memory.keyframes import Keyframe, normalised


@dataclass(frozen=True, kw_only=True)
class ComingShot:
    """The shot that is generated next, as a recall policy knows it.

    Args:
        number: place in the film, from 1; None: after all others.
        prompt: its text.
        characters: names of those who appear in it.
        embed_text: the encoder behind :attr:`text_embedding`: a text -> [D].
    """

    number: int | None = None
    prompt: str = ""
    characters: Sequence[str] = ()
    embed_text: Callable[[str], np.ndarray] | None = None

    @cached_property
    def text_embedding(self) -> np.ndarray:
        """CLIP's embedding of the prompt, computed on first use: float32 [D] of unit length.

        Its dot product with ``Keyframe.embedding`` is the cosine of text and image.
        """
        if self.embed_text is None:
            raise ValueError("this shot has no text encoder: pass embed_text")
        return normalised(self.embed_text(self.prompt)[None])[0]


@runtime_checkable
class RecallPolicy(Protocol):
    """Chooses keyframes for a shot. Any class like this can be the ``_target_`` of ``memory.recall``."""

    @property
    def capacity(self) -> int:
        """Most keyframes that :meth:`recall` returns; memory and operations are planned for so many."""
        ...

    def recall(self, keyframes: Sequence[Keyframe], shot: ComingShot) -> list[Keyframe]:
        """At most :attr:`capacity` of ``keyframes`` (the whole memory, oldest first), in this order, each once.

        The result must depend on the arguments only, so that a resumed film is the same film.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SinkAndRecent:
    """The published policy: the ``sink`` oldest keyframes, which always stay, and the newest of the others.

    Args:
        capacity: most keyframes recalled; 0 recalls nothing.
        sink: how many of the oldest always stay, at most ``capacity``.
    """

    capacity: int = 10
    sink: int = 3

    def __post_init__(self) -> None:
        _check_size(self.capacity, self.sink)

    def recall(self, keyframes: Sequence[Keyframe], shot: ComingShot) -> list[Keyframe]:
        """See :meth:`RecallPolicy.recall`; ``shot`` makes no difference."""
        return _sink_and_recent(keyframes, self.capacity, self.sink)


@dataclass(frozen=True, kw_only=True)
class CharacterFirst:
    """Images of the characters in the shot, then sink and recent keyframes. Not part of the published method.

    Images of a character are its reference images, and frames of shots with that character alone; the oldest come
    first. Those of characters that are not in the shot are left out, so that many references do not displace the
    shots before. For a shot without characters this is :class:`SinkAndRecent`.

    Args:
        capacity: most keyframes recalled; 0 recalls nothing.
        sink: as in :class:`SinkAndRecent`, counted among keyframes that are of no single character.
        references: most images of characters recalled, shared evenly by the characters of the shot.
    """

    capacity: int = 10
    sink: int = 3
    references: int = 5

    def __post_init__(self) -> None:
        _check_size(self.capacity, self.sink)
        if self.references < 0:
            raise ValueError(f"references={self.references}: must not be negative")

    def recall(self, keyframes: Sequence[Keyframe], shot: ComingShot) -> list[Keyframe]:
        """See :meth:`RecallPolicy.recall`."""
        if not shot.characters:
            return _sink_and_recent(keyframes, self.capacity, self.sink)
        of_each = [[k for k in keyframes if k.character == name] for name in shot.characters]
        in_turn = [k for k in chain.from_iterable(zip_longest(*of_each)) if k is not None]
        references = in_turn[: min(self.references, self.capacity)]
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
