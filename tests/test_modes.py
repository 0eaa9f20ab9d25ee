"""How each shot is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from storymem.film.modes import GIVEN_FRAMES, check_lengths, mode_of
from storymem.story import Character, Scene, Shot, Story


def story(*, references: bool = False, shot_references: bool = False) -> Story:
    pictures = (Path("a.png"),)
    shots = tuple(
        Shot(
            prompt="A dog.",
            cut=cut,
            scene=1,
            number=index + 1,
            index=index,
            references=pictures if shot_references and index == 0 else (),
        )
        for index, cut in enumerate([True, False, True])
    )
    dog = Character(name="Dog", references=pictures if references else ())
    return Story(title="t", overview="o", characters=(dog,), scenes=(Scene(number=1, shots=shots),))


def modes(story: Story, continuity: str = "mi2v", first_shot: str = "auto") -> list[str]:
    return [mode_of(shot, story, continuity=continuity, first_shot=first_shot) for shot in story.shots]


@pytest.mark.parametrize(
    ("continuity", "expected"),
    [("none", ["t2v", "m2v", "m2v"]), ("mi2v", ["t2v", "mi2v", "m2v"]), ("mm2v", ["t2v", "mm2v", "m2v"])],
)
def test_only_shots_that_continue_are_given_frames(continuity: str, expected: list[str]) -> None:
    assert modes(story(), continuity) == expected


@pytest.mark.parametrize(
    ("first_shot", "references", "shot_references", "expected"),
    [
        ("auto", False, False, "t2v"),
        ("auto", True, False, "m2v"),
        ("auto", False, True, "m2v"),
        ("t2v", True, True, "t2v"),
        ("m2v", False, False, "m2v"),
    ],
)
def test_the_first_shot(first_shot: str, references: bool, shot_references: bool, expected: str) -> None:
    told = story(references=references, shot_references=shot_references)
    assert modes(told, first_shot=first_shot) == [expected, "mi2v", "m2v"]


def test_given_frames_are_those_of_the_paper() -> None:
    assert GIVEN_FRAMES == {"t2v": 0, "m2v": 0, "mi2v": 1, "mm2v": 5}


def test_every_shot_too_short_is_named() -> None:
    """Two shots of five frames: enough after one given frame, too few after five."""
    told = story()
    short = replace(told, scenes=(replace(told.scenes[0], shots=tuple(replace(s, frames=5) for s in told.shots)),))
    check_lengths(short, frames=9, continuity="mi2v", first_shot="auto")
    with pytest.raises(ValueError, match=r"shot 2 \(scene 1, shot 2\) has 5 frames.*mm2v.*at least 9") as error:
        check_lengths(short, frames=9, continuity="mm2v", first_shot="auto")
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match=r"(?s)shot 1 .*shot 2 .*shot 3 ") as error:
        check_lengths(told, frames=1, continuity="none", first_shot="auto")
    assert len(str(error.value).splitlines()) == 3
