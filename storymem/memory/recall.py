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
        choose: learned recall: keyframes, how many for the shot, how many for the whole film -> indices, ascending.
    """

    number: int | None = None
    prompt: str = ""
    characters: Sequence[str] = ()
    embed_text: Callable[[str], np.ndarray] | None = None
    choose: Callable[[Sequence[Keyframe], int, int], Sequence[int]] | None = None

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
        recent = len(keyframes) - (self.capacity - self.sink)
        if not self.capacity:
            return []
        return [*keyframes[: self.sink], *keyframes[max(recent, self.sink) :]]


@dataclass(frozen=True, kw_only=True)
class Relevant:
    """Keyframes for the coming shot: its characters, the sink, recent and relevant ones. Not the published method.

    1. At most ``references`` images of the shot's characters in turn, the oldest first: their reference images, and
       frames of shots in which they were alone.
    2. The ``sink`` oldest of the others.
    3. The newest of the others, but for the last ``relevant`` places.
    4. For each of these, the one of highest ``balance`` * relevance - (1 - ``balance``) * redundancy (maximal marginal
       relevance, Carbonell and Goldstein 1998): the cosine of image and prompt, and the highest cosine to an image
       chosen before. Both are scaled from 0 to 1 over the candidates.

    The others of a shot without characters are all keyframes. Else they are frames of no single character or of one in
    the shot: many references do not displace them, and nobody else's look is shown.

    Args:
        capacity: most keyframes recalled; 0 recalls nothing.
        sink: how many of the oldest others always stay, at most ``capacity``; some may be among the first step's.
        references: most images in the first step.
        relevant: most keyframes in the fourth step; 0: the prompt makes no difference.
        balance: 1: relevance alone; 0: only what differs from the chosen.
    """

    capacity: int = 10
    sink: int = 3
    references: int = 3
    relevant: int = 2
    balance: float = 0.5

    def __post_init__(self) -> None:
        _check_size(self.capacity, self.sink)
        if self.references < 0 or self.relevant < 0:
            raise ValueError(f"references={self.references}, relevant={self.relevant}: neither may be negative")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance={self.balance}: must be between 0 and 1")

    def recall(self, keyframes: Sequence[Keyframe], shot: ComingShot) -> list[Keyframe]:
        """See :meth:`RecallPolicy.recall`."""
        of_each = [[k for k in keyframes if k.character == name] for name in shot.characters]
        in_turn = [k for k in chain.from_iterable(zip_longest(*of_each)) if k is not None]
        chosen = in_turn[: min(self.references, self.capacity)]
        others = [k for k in keyframes if not shot.characters or _is_other(k, shot)]
        chosen += [k for k in others[: self.sink] if k not in chosen][: self.capacity - len(chosen)]
        others = [k for k in others if k not in chosen]
        recent = max(0, self.capacity - len(chosen) - self.relevant)
        split = max(0, len(others) - recent)
        chosen += others[split:]
        chosen += self._most_relevant(others[:split], chosen, self.capacity - len(chosen), shot)
        return [k for k in keyframes if k in chosen]

    def _most_relevant(
        self, candidates: list[Keyframe], chosen: Sequence[Keyframe], count: int, shot: ComingShot
    ) -> list[Keyframe]:
        """``count`` of the candidates by maximal marginal relevance; of equal ones the newest."""
        if count == 0 or len(candidates) <= count:
            return candidates[:count]
        images = np.stack([k.embedding for k in candidates])
        relevance = _scaled(images @ shot.text_embedding)
        cosines = _scaled(images @ np.stack([k.embedding for k in (*chosen, *candidates)]).T)
        redundancy = cosines[:, : len(chosen)].max(axis=1, initial=0)
        found: list[int] = []
        for _ in range(count):
            scores = self.balance * relevance - (1 - self.balance) * redundancy
            scores[found] = -np.inf
            found.append(len(scores) - 1 - int(scores[::-1].argmax()))
            redundancy = np.maximum(redundancy, cosines[:, len(chosen) + found[-1]])
        return [candidates[place] for place in found]


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Keyframes that a trained network scores highest for the coming shot, as Memento recalls (arXiv 2606.14667).

    The network (:class:`storymem.wan.keyframe_query.KeyframeQuery`) is part of the adapter's files.

    Args:
        capacity: most keyframes recalled.
        whole: how many of them are chosen by the caption of the whole film, the last ones; the others by the prompt.
        sink: how many of the oldest always stay; 0 as published.
    """

    capacity: int = 8
    whole: int = 2
    sink: int = 0

    def __post_init__(self) -> None:
        _check_size(self.capacity, self.sink)
        if self.whole < 1 or self.local < 1:
            raise ValueError(
                f"capacity={self.capacity}, sink={self.sink}, whole={self.whole}: beside the sink both groups of "
                "queries choose one or more"
            )

    @property
    def local(self) -> int:
        """How many keyframes are chosen by the prompt."""
        return self.capacity - self.sink - self.whole

    def recall(self, keyframes: Sequence[Keyframe], shot: ComingShot) -> list[Keyframe]:
        """See :meth:`RecallPolicy.recall`; up to :attr:`capacity` keyframes are all recalled."""
        if len(keyframes) <= self.capacity:
            return list(keyframes)
        if shot.choose is None:
            raise ValueError("learned recall needs the networks of a shot generator: pass choose")
        others = keyframes[self.sink :]
        return [*keyframes[: self.sink], *(others[index] for index in shot.choose(others, self.local, self.whole))]


def _is_other(keyframe: Keyframe, shot: ComingShot) -> bool:
    """Whether it shows nobody who is not in the shot, and is no reference image of a character."""
    return keyframe.character is None or (keyframe.character in shot.characters and keyframe.frame is not None)


def _scaled(values: np.ndarray) -> np.ndarray:
    """Values from 0 (the least) to 1; 0 if all are equal."""
    least, most = values.min(), values.max()
    return (values - least) / (most - least) if most > least else np.zeros_like(values)


def _check_size(capacity: int, sink: int) -> None:
    if capacity < 0 or sink < 0:
        raise ValueError(f"capacity={capacity}, sink={sink}: neither may be negative")
    if 0 < capacity < sink:
        raise ValueError(f"sink={sink} does not fit into capacity={capacity}: write sink={capacity} or less")
