"""Which keyframes a shot is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from storymem.memory import ComingShot, Keyframe, MemoryBank, Relevant, SinkAndRecent


def keyframes(count: int) -> list[Keyframe]:
    return [keyframe(f"k{number}", shot=number + 1) for number in range(count)]


def keyframe(id: str, *, embedding: Sequence[float] = (1, 0), **origin: Any) -> Keyframe:
    return Keyframe(id=id, image=np.zeros((2, 2, 3), np.uint8), embedding=np.array(embedding, np.float32), **origin)


def ids(recalled: list[Keyframe]) -> str:
    return " ".join(keyframe.id for keyframe in recalled)


@pytest.mark.parametrize(
    ("count", "capacity", "sink", "expected"),
    [
        (0, 10, 3, ""),
        (4, 10, 3, "k0 k1 k2 k3"),
        (10, 10, 3, "k0 k1 k2 k3 k4 k5 k6 k7 k8 k9"),
        (13, 10, 3, "k0 k1 k2 k6 k7 k8 k9 k10 k11 k12"),
        (13, 4, 0, "k9 k10 k11 k12"),
        (13, 3, 3, "k0 k1 k2"),
        (13, 0, 3, ""),
    ],
)
def test_the_sink_stays_and_the_newest_fill_the_rest(count: int, capacity: int, sink: int, expected: str) -> None:
    bank = MemoryBank(keyframes(count), policy=SinkAndRecent(capacity=capacity, sink=sink))
    assert ids(bank.recall()) == expected
    assert len(bank) == count, "recalling removes nothing"


def test_keyframes_for_a_later_shot_wait_for_it() -> None:
    assert ids(MemoryBank(keyframes(3)).recall(ComingShot(number=2))) == "k0 k1"


@pytest.mark.parametrize("policy", [SinkAndRecent, Relevant])
def test_a_sink_larger_than_the_memory_is_refused(policy: type[SinkAndRecent] | type[Relevant]) -> None:
    with pytest.raises(ValueError, match="sink=3 does not fit into capacity=2: write sink=2 or less"):
        policy(capacity=2)
    with pytest.raises(ValueError, match="negative"):
        policy(capacity=-1)


CAST = [
    *(keyframe(f"tam{k}", character="Tam") for k in (1, 2, 3)),
    keyframe("seal1", character="seal"),
    keyframe("sky"),
]


def test_only_the_images_of_the_shots_characters_are_recalled() -> None:
    characters = Relevant(capacity=7, sink=1, references=2, relevant=0)
    bank = MemoryBank([*CAST, *keyframes(6)], policy=characters)
    assert ids(bank.recall(ComingShot(characters=("seal",)))) == "seal1 sky k1 k2 k3 k4 k5"
    assert ids(bank.recall(ComingShot(characters=("Tam", "seal")))) == "tam1 seal1 sky k2 k3 k4 k5"
    assert ids(bank.recall(ComingShot(characters=("another",)))) == "sky k0 k1 k2 k3 k4 k5"
    published = MemoryBank([*CAST, *keyframes(6)], policy=SinkAndRecent(capacity=7, sink=1))
    assert ids(bank.recall()) == ids(published.recall()), "for a shot without characters"
    alone = [keyframe(f"a{number}", frame=number, character="Ada") for number in range(1, 9)]
    alone.insert(4, keyframe("b5", frame=5, character="Bo"))
    recalled = MemoryBank(alone, policy=characters).recall(ComingShot(characters=("Ada",)))
    assert ids(recalled) == "a1 a2 a4 a5 a6 a7 a8", "a film of one character uses the whole memory"


def test_the_last_places_are_for_what_is_relevant_and_not_there_yet() -> None:
    # The prompt is about the beach, the first axis.
    beach = (1.0, 0.0, 0.0)
    images = {"forest": (0, 1, 0), "moon": (0, 0.6, 0.8), "beach": beach, "beach_again": beach, "hut": (0.8, 0.6, 0)}
    bank = [keyframe(id, embedding=row) for id, row in (images | {"city": (0, 0, 1)}).items()]
    shot = ComingShot(prompt="The beach.", embed_text=lambda text: np.array([2.0, 0, 0]))

    def recalled(**settings: float) -> str:
        policy = Relevant(capacity=4, sink=1, relevant=2, **settings)  # type: ignore[arg-type]
        return ids(MemoryBank(bank, policy=policy).recall(shot))

    assert recalled(balance=1) == "forest beach beach_again city"
    assert recalled(balance=0.4) == "forest beach_again hut city"
    with pytest.raises(ValueError, match="no text encoder"):
        MemoryBank(bank, policy=Relevant(capacity=4, sink=1)).recall()
    with pytest.raises(ValueError, match="balance=2: must be between 0 and 1"):
        Relevant(balance=2)


@pytest.mark.parametrize("relevant", [0, 2])
@pytest.mark.parametrize("capacity", range(8))
def test_characters_never_make_the_memory_overflow(capacity: int, relevant: int) -> None:
    policy = Relevant(capacity=capacity, sink=min(3, capacity), references=4, relevant=relevant)
    shot = ComingShot(characters=("Tam", "seal"), embed_text=lambda text: np.ones(2))
    recalled = MemoryBank([*CAST, *keyframes(9)], policy=policy).recall(shot)
    assert len(recalled) == len(set(ids(recalled).split())) == capacity


@dataclass
class Returning:
    """A policy that returns these."""

    indices: list[int]
    capacity: int = 2

    def recall(self, keyframes: list[Keyframe], shot: ComingShot) -> list[Keyframe]:
        return [keyframes[index] for index in self.indices]


@pytest.mark.parametrize("indices", [[0, 1, 2], [1, 0], [0, 0]])
def test_a_policy_that_breaks_its_contract_is_reported(indices: list[int]) -> None:
    with pytest.raises(ValueError, match=r"Returning\(.*must return at most 2 \(its capacity\) of the given keyframes"):
        MemoryBank(keyframes(4), policy=Returning(indices)).recall()
