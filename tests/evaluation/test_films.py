"""Which film belongs to which story and which videos are its shots; what is ambiguous is refused with advice."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from pathlib import Path

import pytest

from storymem.evaluation import films
from storymem.evaluation.films import stories_of
from storymem.evaluation.layouts import FilmFiles
from storymem.evaluation.mapping import read_mapping
from storymem.film.manifest import FilmError
from storymem.media.video import write_video
from storymem.story import Story, load_story
from tests.evaluation import small

SHOTS = ("01_01.mp4", "01_02.mp4", "02_01.mp4")


@pytest.fixture
def stories(tmp_path: Path) -> list[Story]:
    return small.stories(tmp_path / "stories")


def find_films(folder: Path, stories: list[Story]) -> tuple[FilmFiles, ...]:
    return films.find_films(folder, stories).films


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"video")


def paths(film: FilmFiles) -> list[Path | None]:
    return [shot.path for shot in film.shots]


def follow(message: str, folder: Path) -> None:
    """Write into ``films.yaml`` the advice of a message."""
    (folder / "films.yaml").write_text(message[message.index("stories:") :])


def two_stories(folder: Path, *titles: str, stems: tuple[str, ...]) -> list[Story]:
    """Stories of two shots each, with these titles and file names."""
    folder.mkdir(parents=True, exist_ok=True)
    for title, stem in zip(titles, stems, strict=True):
        (folder / f"{stem}.yaml").write_text(small.TWO_SHOTS.replace("A Cat", title))
    return stories_of(folder)


# --- which film belongs to which story


@pytest.mark.parametrize("name", ["the_red_boat", "The Red Boat", "01_the_red_boat", "03-the-red-boat", "TheRedBoat"])
@pytest.mark.parametrize("below", ["", "shots/"])
def test_names_of_folders(tmp_path: Path, stories: list[Story], name: str, below: str) -> None:
    touch(tmp_path / "films" / name, *(f"{below}{shot}" for shot in SHOTS))
    boat, cat = find_films(tmp_path / "films", stories)
    assert paths(boat) == [tmp_path / "films" / name / f"{below}{shot}" for shot in SHOTS]
    assert cat.folder is None
    assert all("no film of this story" in str(shot.reason) for shot in cat.shots)


def test_folders_that_differ_only_in_their_number_belong_to_their_own_story(tmp_path: Path) -> None:
    stories = two_stories(tmp_path / "s", "The Tent", "The Fox", stems=("01_story", "02_story"))
    for name in ("01_story", "02_story"):
        touch(tmp_path / "films" / name, *SHOTS[:2])
    assert [film.folder.name for film in find_films(tmp_path / "films", stories) if film.folder] == [
        "01_story",
        "02_story",
    ]
    (tmp_path / "films" / "02_story").rename(tmp_path / "elsewhere")
    assert find_films(tmp_path / "films", stories)[1].folder is None
    assert [story.title for story in stories_of(tmp_path / "s", ["02_story"])] == ["The Fox"]
    with pytest.raises(ValueError, match="'story' names 0 stories"):
        stories_of(tmp_path / "s", ["story"])


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["1_story"], "1_story could be the film of 'The Tent' or 'The Fox'"),
        (["the_tent", "The Tent"], r"films/The Tent and .*films/the_tent could both be the film of 'The Tent'"),
        (["the_tent", "01_story"], r"films/01_story and .*films/the_tent could both be the film of 'The Tent'"),
        (["9_the_tent", "THE-TENT"], r"films/9_the_tent and .*films/THE-TENT could both be the film of 'The Tent'"),
    ],
)
def test_a_name_that_could_mean_two_is_refused_and_the_advice_works(
    tmp_path: Path, folders: list[str], message: str
) -> None:
    stories = two_stories(tmp_path / "s", "The Tent", "The Fox", stems=("01_story", "02_story"))
    for name in folders:
        touch(tmp_path / "films" / name, *SHOTS[:2])
    with pytest.raises(ValueError, match=message) as caught:
        find_films(tmp_path / "films", stories)
    follow(str(caught.value), tmp_path / "films")
    chosen = find_films(tmp_path / "films", stories)[0].folder
    assert chosen is not None
    assert chosen.name in folders


def test_a_name_stays_ambiguous_if_the_other_story_has_a_film(tmp_path: Path) -> None:
    stories = two_stories(tmp_path / "s", "The Tent", "The Fox", stems=("01_story", "02_story"))
    small.own_film(tmp_path / "films" / "take", stories[0], shots=2)
    touch(tmp_path / "films" / "story", *SHOTS[:2])
    with pytest.raises(ValueError, match="story could be the film of 'The Tent' or 'The Fox'"):
        find_films(tmp_path / "films", stories)


def test_an_exact_name_is_preferred_to_a_similar_one(tmp_path: Path, stories: list[Story]) -> None:
    for name in ("the_red_boat", "07-The-Red-Boat"):
        touch(tmp_path / "films" / name, *SHOTS)
    found = films.find_films(tmp_path / "films", stories)
    assert found.films[0].folder == tmp_path / "films" / "the_red_boat"
    assert found.unused == ("07-The-Red-Boat",)


def test_names_are_compared_in_one_form_of_unicode(tmp_path: Path) -> None:
    (story,) = two_stories(tmp_path / "s", "Un Été", stems=("x",))
    touch(tmp_path / "films" / unicodedata.normalize("NFD", "Un Été"), *SHOTS[:2])
    assert find_films(tmp_path / "films", [story])[0].shots[1].path is not None


@pytest.mark.parametrize("place", ["", "any name"])
def test_our_own_films_are_found_by_their_manifest(tmp_path: Path, stories: list[Story], place: str) -> None:
    small.own_film(tmp_path / "films" / place, stories[0], shots=2)
    shots = find_films(tmp_path / "films", stories)[0].shots
    assert [shot.path is not None for shot in shots] == [True, True, False]
    assert shots[2].reason == "the film has only 2 finished shots"


@pytest.mark.parametrize("takes", [("the_red_boat", "a_first_take"), ("", "take2")])
def test_two_takes_of_one_story_are_refused(tmp_path: Path, stories: list[Story], takes: tuple[str, str]) -> None:
    for name in takes:
        small.own_film(tmp_path / "films" / name, stories[0])
    with pytest.raises(ValueError, match="could both be the film of 'The Red Boat'") as caught:
        find_films(tmp_path / "films", stories)
    follow(str(caught.value), tmp_path / "films")
    assert find_films(tmp_path / "films", stories)[0].folder == tmp_path / "films" / min(takes)


def test_a_film_of_ours_and_a_folder_named_like_its_story_are_refused(tmp_path: Path, stories: list[Story]) -> None:
    small.own_film(tmp_path / "films" / "take", stories[0])
    touch(tmp_path / "films" / "07-the-red-boat", "01_01.mp4")
    assert find_films(tmp_path / "films", stories)[0].folder == tmp_path / "films" / "take"
    touch(tmp_path / "films" / "the_red_boat", "01_01.mp4")
    with pytest.raises(ValueError, match=r"films/take and .*films/the_red_boat could both"):
        find_films(tmp_path / "films", stories)


def test_a_film_with_other_prompts_is_refused(tmp_path: Path, stories: list[Story]) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(small.THREE_SHOTS.replace("red boat into", "blue boat into"))
    small.own_film(tmp_path / "films" / "a_cat", load_story(other))
    with pytest.raises(FilmError, match="other prompts under the title 'The Red Boat'"):
        find_films(tmp_path / "films", stories)
    small.own_film(tmp_path / "films" / "b", stories[0])
    boat, cat = find_films(tmp_path / "films", stories)
    assert boat.folder == tmp_path / "films" / "b"
    assert cat.folder is None, "a film of another story is not found by its folder's name"


def test_stories_are_loaded_in_order_and_can_be_chosen(tmp_path: Path, stories: list[Story]) -> None:
    folder = tmp_path / "stories"
    assert [story.title for story in stories_of(folder)] == ["The Red Boat", "A Cat"]
    for name in ("A Cat", "a_cat", "02_a_cat", "02_a_cat.yaml"):
        assert [story.title for story in stories_of(folder, [name])] == ["A Cat"]
    with pytest.raises(ValueError, match="'dog' names 0 stories; known are: a_cat, the_red_boat"):
        stories_of(folder, ["a_cat", "dog"])
    (folder / "03.yaml").write_text(small.TWO_SHOTS)
    with pytest.raises(ValueError, match="two stories are called a_cat"):
        stories_of(folder)
    for name in ("03.yaml", "04.yaml"):
        (folder / name).write_text("title: 3\n")
    with pytest.raises(ValueError, match=r"03\.yaml.*\n(.*\n)*.*04\.yaml"):
        stories_of(folder)
    for name in ("nowhere", "nowhere.yaml", "films.yaml"):
        with pytest.raises((ValueError, FileNotFoundError), match="no such f"):
            find_films(tmp_path / name, stories)


# --- which videos are its shots


@pytest.mark.parametrize(
    "names",
    [
        ["01_01.mp4", "01_02.mp4", "02_01.mp4"],
        ["1_1.MOV", "1_2.MOV", "2_1.MOV"],
        ["01_00.mp4", "01_01.mp4", "02_00.mp4"],
        ["00_00.mp4", "00_01.mp4", "01_00.mp4"],
        ["shots/0/video.mp4", "shots/1/video.mp4", "shots/2/video.mp4"],
        ["shots/1/video.mp4", "shots/2/video.mp4", "shots/3/video.mp4"],
        ["scene_0/shots/0/video.mp4", "scene_0/shots/1/video.mp4", "scene_1/shots/0/video.mp4"],
        ["clip_000.mp4", "clip_001.mp4", "clip_002.mp4"],
        ["videos/scene 1 shot 1.webm", "videos/scene 1 shot 2.webm", "videos/scene 2 shot 1.webm"],
    ],
    ids=lambda names: names[0],
)
def test_numbers_in_names_are_those_of_the_shots(tmp_path: Path, stories: list[Story], names: list[str]) -> None:
    """Other videos, of ViMax and of StoryMem's official code, do not matter."""
    folder = tmp_path / "films" / "the_red_boat"
    others = ["final_video.mp4", "motion_frames.mp4", "the_red_boat.mp4"]
    others += ["shots/2/transition_video_from_shot_1.mp4"] if "shots" in names[0] else []
    touch(folder, *names, *others, "01_01_keyframe0.jpg", "last_frame.jpg")
    film = find_films(tmp_path / "films", stories)[0]
    assert paths(film) == [folder / name for name in names]
    assert set(film.ignored) == set(others)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["01_01.mp4", "02_01.mp4"], "01_02.mp4"),
        (["shots/0/video.mp4", "shots/2/video.mp4"], "shots/1/video.mp4"),
        (["clip_001.mp4", "clip_003.mp4"], "clip_002.mp4"),
    ],
)
def test_unambiguous_numbers_may_have_gaps(
    tmp_path: Path, stories: list[Story], names: list[str], missing: str
) -> None:
    touch(tmp_path / "films" / "the_red_boat", *names)
    shots = find_films(tmp_path / "films", stories)[0].shots
    assert [shot.reason for shot in shots] == [None, f"there is no file {missing}", None]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["clip_1.mp4", "clip_2.mp4"], r"in several ways: clip_# \(shot from 1\); clip_# \(shot from 0\)"),
        (["clip_0.mp4", "clip_1.mp4", "clip_2.mp4", "clip_3.mp4"], "not those of the 3 shots"),
        (["01_01.mp4", "01_02.mp4", "01_03.mp4", "02_01.mp4"], "not those of the 3 shots"),
        (["shot9_8.mp4", "shot9_9.mp4", "shot9_10.mp4"], "not those of the 3 shots"),
        (["a_1.mp4", "a_2.mp4", "a_3.mp4", "b_1.mp4", "b_2.mp4", "b_3.mp4"], "in several ways: a_#.*; b_#"),
        (["1_1.mp4", "01_01.mp4"], "01_01.mp4 and 1_1.mp4 have the same numbers"),
        (["first.mp4", "second.mp4", "third.mp4"], "not those of the 3 shots"),
    ],
)
def test_ambiguous_files_are_refused_and_the_advice_works(
    tmp_path: Path, stories: list[Story], names: list[str], message: str
) -> None:
    folder = tmp_path / "films"
    touch(folder / "the_red_boat", *names)
    with pytest.raises(ValueError, match=message) as caught:
        find_films(folder, stories)
    if len(names) > 2:
        listed = ", ".join(f"the_red_boat/{name}" for name in names[:3])
        follow(str(caught.value).replace("..., ..., ...", listed), folder)
        assert paths(find_films(folder, stories)[0]) == [folder / "the_red_boat" / name for name in names[:3]]


def test_the_results_folder_of_the_official_code_is_a_film(tmp_path: Path, stories: list[Story]) -> None:
    """It writes the shots of its one story into the folder itself."""
    results = tmp_path / "results"
    touch(results, *SHOTS, "motion_frames.mp4", "results.mp4", "01_01_keyframe0.jpg")
    assert paths(find_films(results, stories[:1])[0]) == [results / name for name in SHOTS]
    with pytest.raises(ValueError, match=r"holds the shots of one film, and there are 2 stories.*stbench\.only"):
        find_films(results, stories)
    results.rename(tmp_path / "the_red_boat")
    assert find_films(tmp_path, stories)[0].shots[2].path == tmp_path / "the_red_boat" / "02_01.mp4"


def test_links_are_followed_once(tmp_path: Path, stories: list[Story]) -> None:
    touch(tmp_path / "disk", *SHOTS)
    (tmp_path / "films" / "the_red_boat").mkdir(parents=True)
    (tmp_path / "films" / "the_red_boat" / "shots").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "up").symlink_to(tmp_path / "films" / "the_red_boat")
    assert [shot.reason for shot in find_films(tmp_path / "films", stories)[0].shots] == [None] * 3


@pytest.mark.parametrize("linked", ["a_cat", "a_cat/01_01.mp4"])
def test_shots_of_two_stories_in_one_file_are_refused(tmp_path: Path, stories: list[Story], linked: str) -> None:
    touch(tmp_path / "films" / "the_red_boat", *SHOTS[:2])
    link, target = tmp_path / "films" / linked, tmp_path / "films" / linked.replace("a_cat", "the_red_boat")
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target)
    with pytest.raises(ValueError, match=r"shots of 'The Red Boat' and 'A Cat' are the same frames of .*01_01\.mp4"):
        find_films(tmp_path / "films", stories)
    (cat,) = find_films(tmp_path / "films", films.only_named(stories, ["A Cat"]))
    assert paths(cat)[0] == tmp_path / "films" / "a_cat" / "01_01.mp4"


def test_published_scene_numbers_name_the_files(tmp_path: Path) -> None:
    content = {
        "story_name": "Two Scenes",
        "story_overview": "A walk.",
        "scenes": [{"scene_num": 2, "video_prompts": ["A dog."]}, {"scene_num": 5, "video_prompts": ["A cat."]}],
    }
    (tmp_path / "two.json").write_text(json.dumps(content))
    touch(tmp_path / "films" / "two", "02_01.mp4", "05_01.mp4")
    (film,) = find_films(tmp_path / "films", [load_story(tmp_path / "two.json")])
    assert [path.name for path in paths(film) if path] == ["02_01.mp4", "05_01.mp4"]


# --- films in one file


@pytest.fixture
def one_file(tmp_path: Path, stories: list[Story]) -> Path:
    """A folder with a film of 27 frames in one file, as HoloCine writes it."""
    folder = tmp_path / "films"
    folder.mkdir()
    write_video(folder / "the_red_boat.mp4", small.frames(0, 27), 8)
    return folder


def test_a_film_in_one_file_needs_its_cuts(one_file: Path, stories: list[Story], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds the whole film of 'The Red Boat', which has 3 shots") as caught:
        find_films(one_file, stories)
    message = str(caught.value)
    entry = message[message.index("stories:") : message.index("where cuts")]
    (one_file / "films.yaml").write_text(entry.replace("[...]", "[9, 14]"))
    film, cat = find_films(one_file, stories)
    assert [shot.frames for shot in film.shots] == [(0, 9), (9, 14), (14, 27)]
    assert cat.folder is None
    (one_file / "films.yaml").write_text(entry.replace("cuts: [...]", "frames: [[0, 9], [10, 14], [14, 20]]"))
    assert [shot.frames for shot in find_films(one_file, stories)[0].shots] == [(0, 9), (10, 14), (14, 20)]
    (one_file / "films.yaml").unlink()
    touch(one_file / "a_cat", "video7.mp4")
    with pytest.raises(ValueError, match=r"a_cat/video7\.mp4 holds the whole film of 'A Cat'"):
        find_films(one_file, stories[1:])
    (tmp_path / "one.yaml").write_text('title: The Red Boat\noverview: O.\nscenes: [{shots: [{prompt: "A boat."}]}]\n')
    (shot,) = find_films(one_file, [load_story(tmp_path / "one.yaml")])[0].shots
    assert (shot.path, shot.frames) == (one_file / "the_red_boat.mp4", None)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{file: the_red_boat.mp4, cuts: [9]}", "gives 1 cuts, so 2 shots, and the story has 3"),
        ("{file: the_red_boat.mp4, cuts: [14, 9]}", r"frames \[14, 9\] do not follow"),
        ("{file: the_red_boat.mp4, cuts: [9, 27]}", r"frames \[27, 27\]"),
        ("{file: the_red_boat.mp4, frames: []}", "gives 0 shots"),
        ("{file: the_red_boat.mp4, frames: [[0, 9], [8, 14], [14, 20]]}", r"frames \[8, 14\]"),
        ("{file: the_red_boat.mp4, frames: [[0, 9], [9, 14], [14, 28]]}", "end after the file's 27 frames"),
        ("{file: the_red_boat.mp4, frames: [[-1, 9], [9, 14], [14, 20]]}", r"frames \[-1, 9\]"),
        ("{file: the_red_boat.mp4}", "write either cuts or frames"),
        ("{file: nowhere.mp4, cuts: [9, 14]}", "there is no video file"),
        ("{file: the_red_boat.mp4, cut: [9, 14]}", "cut"),
        ("nowhere", "there is no folder or video"),
        ("3", "The Red Boat"),
    ],
)
def test_faulty_cuts(one_file: Path, stories: list[Story], entry: str, message: str) -> None:
    (one_file / "films.yaml").write_text(f"stories: {{The Red Boat: {entry}}}")
    with pytest.raises(ValueError, match=message) as caught:
        find_films(one_file, stories)
    assert str(one_file / "films.yaml") in str(caught.value)


# --- films.yaml


def test_a_mapping_file_locates_shots(tmp_path: Path, stories: list[Story]) -> None:
    folder = tmp_path / "films"
    touch(folder, "boat/clip_001.mp4", "boat/clip_002.mp4", "x/a.mp4", "y.mp4")
    mapping = 'shots: "{story}/clip_{index:03d}.mp4"\nstories: {The Red Boat: boat, A Cat: [x/a.mp4, y.mp4]}\n'
    (folder / "films.yaml").write_text(mapping)
    boat, cat = find_films(folder, stories)
    assert paths(boat) == [folder / "boat" / "clip_001.mp4", folder / "boat" / "clip_002.mp4", None]
    assert boat.shots[2].reason == "there is no file clip_003.mp4"
    assert paths(cat) == [folder / "x" / "a.mp4", folder / "y.mp4"]


def test_a_mapping_file_may_be_elsewhere_and_name_some_stories(tmp_path: Path, stories: list[Story]) -> None:
    touch(tmp_path / "films", "boat/clip_0.mp4", "boat/clip_1.mp4", "boat/clip_2.mp4", "a_cat/01_01.mp4")
    (tmp_path / "vimax.yaml").write_text("\ufefffolder: films\nstories:\n  The Red Boat: boat\n  The Dog: dog\n")
    found = films.find_films(tmp_path / "vimax.yaml", stories)
    assert paths(found.films[0]) == [tmp_path / "films" / "boat" / f"clip_{i}.mp4" for i in range(3)]
    assert found.films[1].folder == tmp_path / "films" / "a_cat"
    assert found.unused == ("'The Dog' in vimax.yaml",)


@pytest.mark.parametrize(
    ("template", "names", "message"),
    [
        ("{story}/shots/{index}/video.mp4", ["shots/0/video.mp4", "shots/1/video.mp4"], "count from 1"),
        ("{story}/{scene}_{shot}.mp4", ["1_0.mp4", "1_1.mp4"], "count from 1"),
        ("{story}/{scene}_{shot}.mp4", ["0_0.mp4", "0_1.mp4"], "{index} count from 1"),
        (
            "{story}/clip_{index:03d}.mp4",
            ["clip_001.mp4", "clip_002.mp4", "clip_003.mp4"],
            "no shot of 'A Cat' has these",
        ),
        ("{story}/film.mp4", ["film.mp4"], "are the same frames of"),
        *(
            (template, ["1.mp4"], "cannot be filled in; known are: {story}")
            for template in ("{story.__class__}/{index}.mp4", "{index:999999999d}.mp4", "{story:03d}/{index}.mp4")
        ),
        *(
            (template, ["1.mp4"], "cannot be filled in; known are: {story}")
            for template in ("{film}/x.mp4", "{index", "{}", "{0}", "{index!r}", "{index:{shot}}")
        ),
    ],
)
def test_faulty_templates(tmp_path: Path, stories: list[Story], template: str, names: list[str], message: str) -> None:
    touch(tmp_path / "films" / "a_cat", *names)
    mapping = tmp_path / "films" / "films.yaml"
    mapping.write_text(f'shots: "{template}"\n')
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        find_films(tmp_path / "films", stories[1:])
    assert str(mapping) in str(caught.value)
    if "count from 1" in message:
        counted = template.replace("index}", "index0}").replace("shot}", "shot0}")
        mapping.write_text(f'shots: "{counted.replace("{scene}", "{scene0}") if names[0][0] == "0" else counted}"\n')
        found = find_films(tmp_path / "films", stories[1:])[0]
        assert paths(found) == [tmp_path / "films" / "a_cat" / name for name in names]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("shots: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("stories: &a {x: *a}", "films.yaml"),
        ("a: &a [1]\nshots: *a", "alias"),
        ("stories: {The Red Boat: a, The Red Boat: b}", "is written twice"),
        ("[" * 3000, "nested too deeply"),
        ("shots: [", "not valid YAML"),
        ("folder: nowhere", "there is no folder"),
        ("folder: ''", "folder"),
        ("1: 2", "unknown key"),
        ("null", "expected a mapping"),
        ("- x", "expected a mapping"),
        ("shot: x", "unknown key; did you mean 'shots'"),
        ("stories: {The Blue Boat: b}", "names none of these stories"),
        ("stories: {The Red Boat: [a.mp4]}", "lists 1 shots and the story has 3"),
    ],
)
def test_faulty_mapping_files(tmp_path: Path, stories: list[Story], content: str, message: str) -> None:
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "films.yaml").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        find_films(tmp_path / "films", stories)
    assert "films.yaml" in str(caught.value)


def test_a_mapping_in_a_fifo(tmp_path: Path, stories: list[Story]) -> None:
    (tmp_path / "films").mkdir()
    os.mkfifo(tmp_path / "films" / "films.yaml")
    with pytest.raises(ValueError, match="not a regular file"):
        find_films(tmp_path / "films", stories)


def test_the_mapping_file_in_the_datasheet_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "st_bench" / "README.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "films.yaml").write_text(block.replace(", ...", "").replace("/data/films", str(tmp_path)))
    mapping, folder = read_mapping(tmp_path / "films.yaml")
    assert folder == tmp_path
    titles = {story.title for story in stories_of(Path(__file__).parents[2] / "st_bench" / "stories")}
    assert mapping.stories.keys() < titles
