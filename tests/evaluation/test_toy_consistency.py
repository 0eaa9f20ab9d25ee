"""Consistency of the toy world's films: exact on what is known, and never better for what cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from storymem.evaluation.metric import FilmInfo, Scores
from storymem.evaluation.stbench import evaluate
from storymem.media.video import write_video
from storymem.story import Story, load_story
from tests.composing import composed
from tests.evaluation import small
from toyworld.attributes import LOOKS, UNKNOWN, Character, Look, Scenery, Seen
from toyworld.consistency import CHANCE, ToyConsistency, things_of
from toyworld.places import draw_place
from toyworld.reader import ShotSeen, read_shot
from toyworld.stories import benchmark
from toyworld.world import HELD_OUT, ToyShot, ToyStory, story

FOLDER = Path(__file__).parents[2] / "st_bench" / "toy"
CHARACTERS, PLACES = (1 / 4 + 1 / 7 + 1 / 5 + 1 / 4) / 4, (1 / 6 + 1 / 2 + 1 / 6) / 3
Change = Callable[[int, ShotSeen], ShotSeen | None]


@cache
def stories() -> list[tuple[Story, ToyStory]]:
    return [(load_story(FOLDER / name), true) for name, true in benchmark().items()]


def toy_story(number: int) -> tuple[Story, ToyStory]:
    """A story of the benchmark (from 1): the file, and the world's own."""
    return stories()[number - 1]


def shown(shot: ToyShot) -> ShotSeen:
    """What a perfect reader reads of a shot as the world draws it."""
    seen = Seen(
        place=shot.place,
        time=shot.time,
        framing=shot.framing,
        **vars(shot.scenery),
        looks=tuple(character.look for character in shot.cast),
    )
    return ShotSeen(seen=seen, action=shot.action)


def scores(number: int, change: Change = lambda index, shot: shot) -> Scores:
    """Scores of the true film of a story, with changes."""
    file, true = toy_story(number)
    seen = [change(index, shown(shot)) for index, shot in enumerate(true.shots)]
    film = FilmInfo(story=file, lengths=tuple(None if shot is None else 17 for shot in seen))
    return ToyConsistency().compute(seen, film)


def with_look(shot: ShotSeen, position: int, **parts: str) -> ShotSeen:
    looks = list(shot.seen.looks)
    looks[position] = replace(looks[position], **parts)
    return replace(shot, seen=replace(shot.seen, looks=tuple(looks)))


@pytest.mark.parametrize("number", [1, 14, 30])
def test_the_true_film_keeps_everything(number: int) -> None:
    found = scores(number).columns
    lone = {"lone_character_consistency": 1.0, "characters_apart": None}
    several = {"lone_character_consistency": None, "characters_apart": 1.0}
    assert found == {
        "attribute_consistency": 1.0,
        "attribute_chance": found["attribute_chance"],
        "character_consistency": 1.0,
        "place_consistency": 1.0,
        "attributes_unread": 0.0,
        "prompt_attributes": 1.0,
        "characters_present": 1.0,
        **dict.fromkeys(("character_gap_1", "character_gap_2", "character_gap_3_4", "character_gap_5"), 1.0),
        **(lone if number == 1 else several),
    }


def test_things_are_those_of_the_world() -> None:
    for number in range(1, 31):
        file, true = toy_story(number)
        things = {thing.name: thing for thing in things_of(file)}
        assert list(things) == [c.name for c in true.cast] + list(dict.fromkeys(shot.place for shot in true.shots))
        for character in true.cast:
            thing = things[character.name]
            assert thing.shots == tuple(i for i, shot in enumerate(true.shots) if character in shot.cast)
            at = [true.shots[i].cast[position] for i, (position, _) in zip(thing.shots, thing.stands, strict=True)]
            assert set(at) == {character}


def test_one_wrong_hat_costs_one_of_all_attributes() -> None:
    # Story 1: Cleo in all 8 shots, the beach in 6, the moon in 2.
    found = scores(1, lambda index, shot: with_look(shot, 0, hat=UNKNOWN + "?") if index == 3 else shot)
    characters, places = 7 * 4, 5 * 3 + 1 * 3
    assert found.columns["character_consistency"] == pytest.approx(1 - 1 / characters)
    assert found.columns["attribute_consistency"] == pytest.approx(1 - 1 / (characters + places))
    assert found.columns["place_consistency"] == 1
    assert found.shots["attribute_consistency"][:4] == (None, 1.0, 1.0, pytest.approx(1 - 1 / 7))
    assert found.details["kept"] == {"Cleo": pytest.approx(1 - 1 / characters), "beach": 1.0, "moon": 1.0}
    low = {(i, j) for i, j, value in found.pairs["attribute_consistency"] if value < 1}
    assert low == {(0, 3), (1, 3), (2, 3), (3, 4), (3, 5), (3, 6), (3, 7)}


def test_the_first_appearance_is_what_counts() -> None:
    found = scores(1, lambda index, shot: with_look(shot, 0, hat="another") if index == 0 else shot)
    assert found.columns["character_consistency"] == pytest.approx(3 / 4)


def test_characters_by_distance_and_presence() -> None:
    # Cleo, in all 8 shots of story 1, has another colour from the fifth on, and is not seen in the last.
    def change(index: int, shot: ShotSeen) -> ShotSeen:
        if index == 7:
            return replace(shot, seen=replace(shot.seen, looks=()))
        return with_look(shot, 0, colour="another") if index >= 4 else shot

    found = scores(1, change).columns
    assert found["characters_present"] == 7 / 8
    for name, gaps in {"1": [1], "2": [2], "3_4": [3, 4], "5": [5, 6, 7]}.items():
        pairs = [(i, i + gap) for gap in gaps for i in range(8 - gap)]
        same = [0.0 if j == 7 else 0.75 if i < 4 <= j else 1.0 for i, j in pairs]
        assert found[f"character_gap_{name}"] == pytest.approx(np.mean(same))


@pytest.mark.parametrize("index", [0, 2])
def test_what_cannot_be_read_counts_as_different(index: int) -> None:
    found = scores(1, lambda at, shot: with_look(shot, 0, colour=UNKNOWN) if at == index else shot)
    lost = 7 if index == 0 else 1  # nothing can be compared with a first appearance that is not read
    assert found.columns["character_consistency"] == pytest.approx(1 - lost / 28)
    assert found.columns["attributes_unread"] == pytest.approx(1 / (8 * 4 + 8 * 3))
    nothing = scores(1, lambda at, shot: with_look(shot, 0, colour=UNKNOWN))
    assert nothing.columns["character_consistency"] == pytest.approx(3 / 4), "unknown twice is not the same"


def test_with_one_person_too_many_nobody_is_recognised() -> None:
    def crowded(index: int, shot: ShotSeen) -> ShotSeen:
        return replace(shot, seen=replace(shot.seen, looks=(*shot.seen.looks, LOOKS[0]))) if index == 5 else shot

    found = scores(1, crowded)
    assert found.columns["character_consistency"] == pytest.approx(6 / 7)
    assert found.columns["attributes_unread"] == pytest.approx(4 / 56)


def test_two_who_change_places_are_taken_for_each_other() -> None:
    file, true = toy_story(14)
    (together, *_) = [index for index, shot in enumerate(true.shots) if len(shot.cast) == 2 and index > 0]

    def swapped(index: int, shot: ShotSeen) -> ShotSeen:
        return replace(shot, seen=replace(shot.seen, looks=shot.seen.looks[::-1])) if index == together else shot

    assert scores(14, swapped).columns["character_consistency"] < 1
    assert len(file.shots[together].characters) == 2


def test_a_film_of_one_look_is_consistent_but_tells_nobody_apart() -> None:
    def alike(index: int, shot: ShotSeen) -> ShotSeen:
        return replace(shot, seen=replace(shot.seen, looks=(LOOKS[7],) * len(shot.seen.looks)))

    found = scores(30, alike).columns
    assert (found["character_consistency"], found["characters_apart"]) == (1.0, 0.0)


def test_chance_is_what_films_of_independent_shots_reach() -> None:
    drawn = [shot for seed in range(HELD_OUT, HELD_OUT + 200) for shot in story(seed).shots]
    looks = [character.look for shot in drawn for character in shot.cast]
    sceneries = [shot.scenery for shot in drawn]
    rng = np.random.default_rng(5)

    def independent(index: int, shot: ShotSeen) -> ShotSeen:
        people = tuple(looks[i] for i in rng.integers(len(looks), size=len(shot.seen.looks)))
        return replace(shot, seen=replace(shot.seen, looks=people, **vars(sceneries[rng.integers(len(sceneries))])))

    films = [scores(number, independent).columns for number in range(1, 31) for _ in range(6)]
    of = {
        name: float(np.mean([film[name] for film in films])) for name in ("attribute_consistency", "attribute_chance")
    }
    assert of["attribute_consistency"] == pytest.approx(of["attribute_chance"], abs=0.02)
    apart = [film["characters_apart"] for film in films if film["characters_apart"] is not None]
    assert np.mean(apart) > 0.98
    assert pytest.approx({"shape": 1 / 4, "colour": 1 / 7, "hat": 1 / 5, "eyes": 1 / 4}) == {
        part: CHANCE[part] for part in vars(LOOKS[0])
    }
    assert CHANCE.keys() == set(Look.__dataclass_fields__) | set(Scenery.__dataclass_fields__)


def test_a_missing_shot_is_no_value_and_has_a_reason() -> None:
    found = scores(1, lambda index, shot: None if index == 7 else shot)
    reason = "missing: shot 8 (scene 2, shot 2)"
    assert {name for name, value in found.columns.items() if value is not None} == {"attribute_chance"}
    assert found.reasons["attribute_consistency"] == reason
    assert found.details["kept"] == {"Cleo": None, "beach": 1.0, "moon": None}
    assert found.shots["prompt_attributes"][7] is None
    assert set(found.undefined) == {"characters_apart"}


def test_a_wrong_time_of_day_shows_in_the_shot_that_has_it() -> None:
    def late(index: int, shot: ShotSeen) -> ShotSeen:
        return replace(shot, seen=replace(shot.seen, time=UNKNOWN), action="waits ") if index == 1 else shot

    found = scores(1, late)
    assert found.shots["prompt_attributes"] == (1, 0.5, 1, 1, 1, 1, 1, 1)
    assert found.columns["prompt_attributes"] == pytest.approx(7.5 / 8)
    assert found.columns["attribute_consistency"] == 1


def test_scores_are_plain_json() -> None:
    found = scores(14)
    again = json.loads(json.dumps(asdict(found)))
    assert again["details"] == found.details
    assert found.details["read"][0]["looks"][0].keys() == set(LOOKS[0].__dataclass_fields__)


def test_attributes_are_read_from_pixels() -> None:
    file, true = toy_story(1)
    metric, film = ToyConsistency(every=8), FilmInfo(story=file, lengths=(17,) * 8)
    seen = [metric.measure_shot(file.shots[i], true.shots[i].frames, film) for i in (0, 6)]
    assert [one.seen.looks for one in seen] == [(true.cast[0].look,)] * 2
    assert seen[0].seen == shown(true.shots[0]).seen
    between = [seen[0], *(shown(shot) for shot in true.shots[1:6]), seen[1], shown(true.shots[7])]
    assert metric.compute(between, film).columns["attribute_consistency"] == 1


def test_stories_and_films_of_another_world_are_refused(tmp_path: Path) -> None:
    boat = small.stories(tmp_path)[0]
    with pytest.raises(ValueError, match=r"The Red Boat, shot 1 \(scene 1, shot 1\): 'Ada pushes .* st_bench/toy"):
        ToyConsistency().check(boat)
    file, _ = toy_story(1)
    with pytest.raises(ValueError, match=f"{file.title}, shot 1 .* films of 96x64, and this one is 48x32"):
        ToyConsistency().measure_shot(
            file.shots[0], np.zeros((17, 32, 48, 3), np.uint8), small.film_info(file, [17] * 8)
        )
    with pytest.raises(ValueError, match="every=0"):
        ToyConsistency(every=0)


TWO_SHOTS = """\
title: Cleo
overview: Cleo on the beach.
characters: [{name: Cleo}]
scenes:
  - shots:
      - {prompt: "Cleo jumps on the beach in bright daylight. Close-up.", characters: [Cleo]}
  - shots:
      - {prompt: "Cleo jumps on the beach at dusk. Close-up.", characters: [Cleo]}
"""


def test_films_are_told_apart_by_the_whole_command(tmp_path: Path) -> None:
    """A film that keeps its character and one that does not, as ordinary files, next to the other toy metrics."""
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "cleo.yaml").write_text(TWO_SHOTS)
    shots = stories()[0][1].shots
    first, second = shots[0], replace(shots[6], place="beach", time="dusk", scenery=shots[0].scenery)
    other = Look(shape="round", colour="green", hat="crown", eyes="one eye")
    assert not set(vars(other).values()) & set(vars(first.cast[0].look).values())
    films = {"kept": second, "changed": replace(second, cast=(Character(name="Cleo", look=other),))}
    for name, shot in films.items():
        (tmp_path / name / "cleo").mkdir(parents=True)
        write_video(tmp_path / name / "cleo" / "01_01.mp4", first.frames, 8)
        write_video(tmp_path / name / "cleo" / "02_01.mp4", shot.frames, 8)
    folders = ",".join(f"{name}:{tmp_path / name}" for name in films)
    overrides = [f"films={{{folders}}}", f"stbench.stories={tmp_path}/stories", f"output={tmp_path}/out"]
    results = evaluate({"label": None, **composed("metrics=[toy]", *overrides, name="eval_stbench")})
    assert results is not None
    kept, changed = (results.summaries[name] for name in films)
    assert (kept["character_consistency"].mean, changed["character_consistency"].mean) == (1.0, 0.0)
    assert kept["place_consistency"].mean == changed["place_consistency"].mean == 1.0
    assert kept["attribute_consistency"].mean == 1.0
    assert kept["attribute_chance"].mean == pytest.approx((4 * CHARACTERS + 3 * PLACES) / 7, abs=1e-6)
    assert kept["characters_apart"].expected == 0
    assert all(found["consistency_overall"].mean is not None for found in (kept, changed))
    assert "chance_of_characters 0.210714" in (tmp_path / "out" / "results.md").read_text()


def test_the_control_without_characters_is_the_place_alone() -> None:
    file, true = toy_story(14)
    metric, film = ToyConsistency(), FilmInfo(story=file, lengths=(17,) * 8)
    shot = true.shots[2]
    empty = metric.without_characters(file.shots[2], shot.frames, film)
    drawn = draw_place(shot.place, shot.time, shot.framing, shot.scenery).transpose(1, 2, 0) * 255
    assert empty.shape == shot.frames.shape
    assert np.abs(empty - drawn).max() <= 1
    assert read_shot(empty).seen.looks == ()
    nothing = np.zeros((3, 64, 96, 3), np.uint8)
    assert metric.without_characters(file.shots[2], nothing, film).shape == nothing.shape, "of no place that is known"
