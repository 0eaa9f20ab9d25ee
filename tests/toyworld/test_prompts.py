"""Prompts of the toy world are read back, whatever their wording."""

from __future__ import annotations

import pytest

from toyworld.attributes import ACTIONS, FRAMINGS, PLACES, TIMES
from toyworld.words import Asked, left_to_right, read_prompt
from toyworld.world import HELD_OUT, story


@pytest.mark.parametrize("looks", [False, True])
def test_every_wording_of_the_world_is_read_back(looks: bool) -> None:
    said = []
    for seed in range(HELD_OUT, HELD_OUT + 60):
        for shot in story(seed, looks=looks).shots:
            said.append(read_prompt(shot.prompt))
            assert said[-1] == Asked(place=shot.place, time=shot.time, framing=shot.framing, action=shot.action)
    assert {one.place for one in said} == set(PLACES)
    assert {one.time for one in said} == set(TIMES)
    assert {one.framing for one in said} == set(FRAMINGS)
    assert {one.action for one in said} == set(ACTIONS)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Ada waits at noon. Wide shot.", "one place and names none; write for example 'on the beach'"),
        ("Ada waits on the moon at noon at night. Wide shot.", "one time and names night and noon"),
        ("Ada waits on the moon at noon.", "one framing and names none"),
        ("Ada sneezes on the moon at noon. Wide shot.", "one action and names none"),
    ],
)
def test_other_prompts_are_refused_with_what_they_lack(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_prompt(prompt)
    assert prompt in str(error.value)


def test_who_is_named_first_stands_on_the_left() -> None:
    assert left_to_right("Bo and Ada wait at dawn.", ["Ada", "Bo"]) == ("Bo", "Ada")
    pairs = 0
    for seed in range(HELD_OUT, HELD_OUT + 60):
        for shot in story(seed).shots:
            named = left_to_right(shot.prompt, [character.name for character in reversed(shot.cast)])
            by_place = sorted(zip(shot.poses, shot.cast, strict=True), key=lambda pair: float(pair[0].x[8]))
            assert list(named) == [character.name for _, character in by_place]
            pairs += len(named) == 2
    assert pairs > 20
