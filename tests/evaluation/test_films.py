"""Where shots are found, and what is said of those that are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from storymem.evaluation.films import find_films, stories_of
from storymem.film import Film, FilmError, ShotRecord
from storymem.story import Story, load_story
from tests.evaluation import small


@pytest.fixture
def stories(tmp_path: Path) -> list[Story]:
    return small.stories(tmp_path / "stories")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"video")


def found(folder: Path, story: Story) -> list[str | None]:
    """Paths below ``folder``, or reasons."""
    shots = find_films(folder, [story])[0].shots
    return [shot.reason if shot.path is None else str(shot.path.relative_to(folder)) for shot in shots]


@pytest.mark.parametrize("name", ["the_red_boat", "The Red Boat", "01_the_red_boat", "03-the-red-boat", "TheRedBoat"])
@pytest.mark.parametrize("beneath", ["", "shots/"])
def test_folders_as_others_name_them(tmp_path: Path, stories: list[Story], name: str, beneath: str) -> None:
    touch(tmp_path / "films" / name, *(f"{beneath}{shot}.mp4" for shot in ("01_01", "01_02", "02_01")))
    assert found(tmp_path / "films", stories[0]) == [f"{name}/{beneath}{s}.mp4" for s in ("01_01", "01_02", "02_01")]


def test_missing_shots_and_films_have_a_reason(tmp_path: Path, stories: list[Story]) -> None:
    touch(tmp_path / "films" / "the_red_boat", "01_01.mp4", "02_01.mp4")
    boat, cat = find_films(tmp_path / "films", stories)
    assert [shot.reason for shot in boat.shots] == [None, "there is no file 01_02.mp4", None]
    assert cat.folder is None
    assert all("no film of this story" in str(shot.reason) for shot in cat.shots)
    assert all(shot.path is None for shot in cat.shots)


def test_published_scene_numbers_name_the_files(tmp_path: Path) -> None:
    written = {
        "story_name": "Two Scenes",
        "story_overview": "A walk.",
        "scenes": [{"scene_num": 2, "video_prompts": ["A dog."]}, {"scene_num": 5, "video_prompts": ["A cat."]}],
    }
    (tmp_path / "two.json").write_text(json.dumps(written))
    touch(tmp_path / "films" / "two", "02_01.mp4", "05_01.mp4")
    assert found(tmp_path / "films", load_story(tmp_path / "two.json")) == ["two/02_01.mp4", "two/05_01.mp4"]


def own_film(folder: Path, story: Story, shots: int) -> Film:
    film = Film(folder, story=story.to_dict(), config={})
    for shot in story.shots[:shots]:
        file = film.write_shot(shot, np.zeros((5, 32, 48, 3), np.uint8), repeated=0, fps=8)
        rest = {"mode": "m2v", "seed": 0, "frames": 5, "repeated": 0, "memory": (), "keyframes": (), "config_hash": ""}
        film.add(
            ShotRecord(index=shot.index, scene=shot.scene, number=shot.number, prompt=shot.prompt, file=file, **rest)  # type: ignore[arg-type]
        )
    return film


@pytest.mark.parametrize("place", ["", "any name"])
def test_our_own_films_are_known_by_their_manifest(tmp_path: Path, stories: list[Story], place: str) -> None:
    own_film(tmp_path / "films" / place, stories[0], shots=2)
    shots = find_films(tmp_path / "films", stories)[0].shots
    assert [shot.path is not None for shot in shots] == [True, True, False]
    assert shots[2].reason == "the film has only 2 finished shots"


def test_a_film_of_another_text_is_refused(tmp_path: Path, stories: list[Story]) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(small.THREE_SHOTS.replace("red boat into", "blue boat into"))
    own_film(tmp_path / "films" / "boat", load_story(other), shots=3)
    with pytest.raises(FilmError, match="another text under the title 'The Red Boat'"):
        find_films(tmp_path / "films", stories)


def test_a_mapping_file_says_where_shots_lie(tmp_path: Path, stories: list[Story]) -> None:
    films = tmp_path / "films"
    touch(films, "boat/clip_001.mp4", "boat/clip_002.mp4", "x/a.mp4", "y.mp4")
    mapping = 'shots: "{story}/clip_{index:03d}.mp4"\nstories: {The Red Boat: boat, A Cat: [x/a.mp4, y.mp4]}\n'
    (films / "films.yaml").write_text(mapping)
    assert found(films, stories[0]) == ["boat/clip_001.mp4", "boat/clip_002.mp4", "there is no file clip_003.mp4"]
    assert found(films, stories[1]) == ["x/a.mp4", "y.mp4"]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("shot: x", "unknown key; did you mean 'shots'"),
        ("- x", "expected a mapping"),
        ("stories: {The Blue Boat: b}", "names none of these stories"),
        ('shots: "{film}/x.mp4"', r"'film' cannot be filled in; known are: \{story\}"),
        ("stories: {The Red Boat: [a.mp4]}", "lists 1 shots and the story has 3"),
    ],
)
def test_faulty_mapping_files(tmp_path: Path, stories: list[Story], mapping: str, message: str) -> None:
    touch(tmp_path, "films/films.yaml")
    (tmp_path / "films" / "films.yaml").write_text(mapping)
    with pytest.raises(ValueError, match=message):
        find_films(tmp_path / "films", stories)


def test_stories_are_loaded_in_order_and_can_be_chosen(tmp_path: Path, stories: list[Story]) -> None:
    folder = tmp_path / "stories"
    assert [story.title for story in stories_of(folder)] == ["The Red Boat", "A Cat"]
    for name in ("A Cat", "a_cat", "02_a_cat", "02_a_cat.yaml"):
        assert [story.title for story in stories_of(folder, [name])] == ["A Cat"]
    with pytest.raises(ValueError, match="no story 'dog'; known are: the_red_boat, a_cat"):
        stories_of(folder, ["a_cat", "dog"])


def test_faulty_and_double_stories_are_told(tmp_path: Path, stories: list[Story]) -> None:
    (tmp_path / "stories" / "03.yaml").write_text(small.TWO_SHOTS)
    with pytest.raises(ValueError, match="two stories are called a_cat"):
        stories_of(tmp_path / "stories")
    for name in ("03.yaml", "04.yaml"):
        (tmp_path / "stories" / name).write_text("title: 3\n")
    with pytest.raises(ValueError, match=r"03\.yaml.*\n(.*\n)*.*04\.yaml"):
        stories_of(tmp_path / "stories")
    with pytest.raises(ValueError, match="there are no stories"):
        stories_of(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no such folder"):
        find_films(tmp_path / "nowhere", stories)
