"""Which keyframes a shot is given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from storymem.memory import CharacterFirst, ComingShot, Keyframe, MemoryBank, SinkAndRecent


def keyframes(count: int) -> list[Keyframe]:
    return [keyframe(f"k{number}", shot=number + 1) for number in range(count)]


def keyframe(id: str, *, shot: int | None = None, character: str | None = None) -> Keyframe:
    image, embedding = np.zeros((2, 2, 3), np.uint8), np.ones(1, np.float32)
    return Keyframe(id=id, image=image, embedding=embedding, shot=shot, character=character)


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


@pytest.mark.parametrize("policy", [SinkAndRecent, CharacterFirst])
def test_a_sink_larger_than_the_memory_is_refused(policy: type[SinkAndRecent] | type[CharacterFirst]) -> None:
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
    bank = MemoryBank([*CAST, *keyframes(6)], policy=CharacterFirst(capacity=7, sink=1, references=2))
    assert ids(bank.recall(ComingShot(characters=("seal",)))) == "seal1 sky k1 k2 k3 k4 k5"
    assert ids(bank.recall(ComingShot(characters=("Tam", "seal")))) == "tam1 seal1 sky k2 k3 k4 k5"
    assert ids(bank.recall(ComingShot(characters=("another",)))) == "sky k0 k1 k2 k3 k4 k5"
    published = MemoryBank([*CAST, *keyframes(6)], policy=SinkAndRecent(capacity=7, sink=1))
    assert ids(bank.recall()) == ids(published.recall()), "for a shot without characters"


@pytest.mark.parametrize("capacity", range(8))
def test_characters_never_make_the_memory_overflow(capacity: int) -> None:
    policy = CharacterFirst(capacity=capacity, sink=min(3, capacity), references=4)
    recalled = MemoryBank([*CAST, *keyframes(9)], policy=policy).recall(ComingShot(characters=("Tam", "seal")))
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
