"""What a shot sees of the memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from storymem.memory import CharacterFirst, Keyframe, MemoryBank, SinkAndRecent


@dataclass
class Shot:
    characters: tuple[str, ...] = ()


def keyframes(count: int) -> list[Keyframe]:
    return [picture(f"k{number}", shot=number) for number in range(count)]


def picture(id: str, *, shot: int | None = None, character: str | None = None) -> Keyframe:
    return Keyframe(
        id=id,
        image=np.zeros((2, 2, 3), np.uint8),
        embedding=np.ones(1, np.float32),
        shot=shot,
        character=character,
    )


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
    assert len(bank) == count, "recalling forgets nothing"
    assert ids(bank.recall(Shot())) == expected


@pytest.mark.parametrize("policy", [SinkAndRecent, CharacterFirst])
def test_a_sink_larger_than_the_memory_is_refused(
    policy: type[SinkAndRecent] | type[CharacterFirst],
) -> None:
    with pytest.raises(ValueError, match="sink=3 does not fit into capacity=2: write sink=2 or less"):
        policy(capacity=2)
    with pytest.raises(ValueError, match="negative"):
        policy(capacity=-1)


CAST = [
    picture("tam1", character="Tam"),
    picture("tam2", character="Tam"),
    picture("tam3", character="Tam"),
    picture("seal1", character="seal"),
    picture("style"),
]


def test_only_the_references_of_the_shots_characters_are_recalled() -> None:
    bank = MemoryBank([*CAST, *keyframes(6)], policy=CharacterFirst(capacity=7, sink=1, references=2))
    assert ids(bank.recall(Shot(("seal",)))) == "seal1 style k1 k2 k3 k4 k5"
    assert ids(bank.recall(Shot(("Tam", "seal")))) == "tam1 seal1 style k2 k3 k4 k5"
    assert ids(bank.recall(Shot(("somebody",)))) == "style k0 k1 k2 k3 k4 k5"


def test_without_named_characters_it_is_sink_and_recent() -> None:
    content = [*CAST, *keyframes(9)]
    characters_first = MemoryBank(content, policy=CharacterFirst(capacity=6, sink=2))
    published = MemoryBank(content, policy=SinkAndRecent(capacity=6, sink=2))
    for shot in (None, Shot()):
        assert ids(characters_first.recall(shot)) == ids(published.recall(shot))


@pytest.mark.parametrize("capacity", range(8))
def test_characters_never_make_the_memory_overflow(capacity: int) -> None:
    policy = CharacterFirst(capacity=capacity, sink=min(3, capacity), references=4)
    recalled = MemoryBank([*CAST, *keyframes(9)], policy=policy).recall(Shot(("Tam", "seal")))
    assert len(recalled) == len(set(ids(recalled).split())) == capacity
