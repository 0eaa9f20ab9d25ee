"""Stories are read as written: YAML and ST-Bench's JSON, reference images, several files."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from storymem.story import Character, Scene, Shot, Story, StoryError, load_stories, load_story
from tests.story_files import HEAD, SHOT_LINE, problem, problems, shot_problem, story_of, write

EXAMPLES = Path(__file__).parent.parent / "examples"

BENCH = {
    "story_name": "The Keeper",
    "story_overview": "A keeper finds a seal.",
    "scenes": [
        {
            "scene_num": 1,
            "video_prompts": ["Tam climbs.", "Tam looks."],
            "first_frame_prompt": ["Tam stands."],
            "cut": [True, False],
        },
        {"scene_num": 2, "video_prompts": ["A seal."], "first_frame_prompt": [], "cut": [True]},
    ],
}


# What is read


def test_a_story_is_read_as_written(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "tam.png")
    text = """\
title: "Tam's  Lamp: a story"
overview: >
  A keeper finds
  a seal.
style: realistic
characters:
  - {name: Tam, references: [tam.png]}
  - name: Pebble
scenes:
  - shots:
      - {prompt: "Tam climbs.", characters: [Tam], frames: 49, seed: 0}
      - prompt: |
          Tam opens the door
          and looks out.
        cut: false
        negative_prompt: ""
        references: [./tam.png]
  - shots:
      - {prompt: Pebble swims., characters: [Pebble, Tam]}
"""
    path = write(tmp_path, text)
    tam = tmp_path / "tam.png"
    climbs = Shot(prompt="Tam climbs.", cut=True, scene=1, number=1, characters=("Tam",), frames=49, seed=0, index=0)
    opens = Shot(
        prompt="Tam opens the door and looks out.",
        cut=False,
        scene=1,
        number=2,
        negative_prompt="",
        references=(tam,),
        index=1,
    )
    swims = Shot(prompt="Pebble swims.", cut=True, scene=2, number=1, characters=("Pebble", "Tam"), index=2)
    story = load_story(path)
    assert story == Story(
        title="Tam's Lamp: a story",
        overview="A keeper finds a seal.",
        style="realistic",
        characters=(Character(name="Tam", references=(tam,)), Character(name="Pebble")),
        scenes=(Scene(number=1, shots=(climbs, opens)), Scene(number=2, shots=(swims,))),
        source=path,
    )
    assert story.shots == (climbs, opens, swims)
    assert story.references == (tam,)
    assert story.slug == "tams_lamp_a_story"
    assert swims.label == "shot 3 (scene 2, shot 1)"


def test_descriptions_of_the_characters_in_a_shot_follow_its_prompt(tmp_path: Path) -> None:
    path = tmp_path / "story.yaml"
    path.write_text(
        "title: T\noverview: O\nstyle: ink\n"
        "characters: [{name: Ada, description: a girl in red.}, {name: Bo, description: an old dog}, {name: Cy}]\n"
        "scenes:\n  - shots:\n"
        "      - {prompt: Bo and Ada run., characters: [Bo, Ada, Cy]}\n"
        "      - {prompt: 'Ada, a girl in red., and Bo rest.', characters: [Ada]}\n"
    )
    story = load_story(path)
    assert story.prompt_of(story.shots[0]) == "ink: Bo and Ada run. Bo: an old dog. Ada: a girl in red."
    assert story.prompt_of(story.shots[1]) == "ink: Ada, a girl in red., and Bo rest."
    assert story.to_dict()["characters"][1:] == [
        {"name": "Bo", "references": [], "description": "an old dog"},
        {"name": "Cy", "references": []},
    ]


def test_a_shot_is_a_cut_by_default(tmp_path: Path) -> None:
    shots = ["{prompt: a}", "{prompt: b}", "{prompt: c, cut: no}", "{prompt: d, cut: true}"]
    story = load_story(write(tmp_path, HEAD + "".join(f"      - {shot}\n" for shot in shots)))
    assert [shot.cut for shot in story.shots] == [True, True, False, True]


@pytest.mark.parametrize(
    ("title", "slug"),
    [
        ("The Keeper!", "the_keeper"),
        ("../../etc", "etc"),
        ("灯台守", "灯台守"),
        ("?!", "story"),
        ("a" * 99, "a" * 60),
    ],
)
def test_the_slug_is_safe_as_a_folder(title: str, slug: str) -> None:
    assert Story(title=title, overview="o", scenes=()).slug == slug


def test_the_dict_is_plain_json_and_changes_with_the_story_but_not_with_its_folder(tmp_path: Path) -> None:
    text = (EXAMPLES / "with_references.yaml").read_text()
    homes = [tmp_path / "here", tmp_path / "there" / "deeper"]
    for home in homes:
        (home / "references").mkdir(parents=True)
        for image in (EXAMPLES / "references").glob("*.png"):
            (home / "references" / image.name).write_bytes(image.read_bytes())
    here, there = (load_story(write(home, text)).to_dict() for home in homes)
    assert here == there == json.loads(json.dumps(here))
    assert here["characters"][0]["references"][0] == "references/mina_face.png"
    commented = load_story(write(homes[0], "# a comment\n" + text)).to_dict()
    assert commented == here
    for old, new in [("seed: 7", "seed: 8"), ("cut: false", "cut: true"), ("black bob", "red bob")]:
        assert load_story(write(homes[0], text.replace(old, new, 1))).to_dict() != here


def test_paths_are_absolute_if_the_path_of_the_story_is_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "tam.png")
    write(tmp_path, HEAD.replace("name: Tam", "name: Tam, references: [tam.png]") + "      - {prompt: a}\n")
    monkeypatch.chdir(tmp_path)
    story = load_story("story.yaml")
    assert story.references == (tmp_path / "tam.png",)
    assert story.source == tmp_path / "story.yaml"


@pytest.mark.parametrize(
    ("name", "shots", "scenes"), [("ada_and_the_tent", 8, 4), ("the_keeper", 8, 3), ("with_references", 4, 2)]
)
def test_the_examples_are_stories(name: str, shots: int, scenes: int) -> None:
    story = load_story(EXAMPLES / f"{name}.yaml")
    assert (len(story.shots), len(story.scenes)) == (shots, scenes)
    assert any(not shot.cut for shot in story.shots)


def test_reading_a_story_imports_no_heavy_library() -> None:
    code = (
        "import sys, storymem.story as s; s.load_story(sys.argv[1]);"
        "print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(EXAMPLES / "the_keeper.yaml")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_long_story_is_read_quickly(tmp_path: Path) -> None:
    path = write(tmp_path, story_of("".join(f"      - {{prompt: Shot {k}.}}\n" for k in range(4999))))
    started = time.monotonic()
    assert len(load_story(path).shots) == 4999
    assert time.monotonic() - started < 20


def test_invisible_line_separators_do_not_break_lines(tmp_path: Path) -> None:
    text = f"{HEAD}      - prompt: Tam\u2028climbs\u0085and looks.\n        frames: 80\n"
    assert problem(tmp_path, text).startswith(f"story.yaml:{SHOT_LINE + 1}: shot 1 (scene 1, shot 1): frames is 80")
    story = load_story(write(tmp_path, text.replace("80", "81")))
    assert story.shots[0].prompt == "Tam climbs and looks."


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    text = HEAD + "      - prompt: Tam climbs.\n        frames: 80\n"
    windows = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
    assert problem(tmp_path, windows).startswith(f"story.yaml:{SHOT_LINE + 1}: shot 1 (scene 1, shot 1): frames")


# ST-Bench's JSON


def test_the_published_json_is_read(tmp_path: Path) -> None:
    story = load_story(write(tmp_path, json.dumps(BENCH), "story.json"))
    assert (story.title, story.overview) == ("The Keeper", "A keeper finds a seal.")
    assert [(shot.prompt, shot.cut, shot.label) for shot in story.shots] == [
        ("Tam climbs.", True, "shot 1 (scene 1, shot 1)"),
        ("Tam looks.", False, "shot 2 (scene 1, shot 2)"),
        ("A seal.", True, "shot 3 (scene 2, shot 1)"),
    ]


def test_json_with_comments_and_trailing_commas_is_read(tmp_path: Path) -> None:
    text = """{
\t// where it came from: http://example.org
\t"story_name":"The Keeper",  /* a comment
\tover "two lines, */
\t"story_overview": "A keeper finds a seal.",
\t"scenes": [
\t\t{"scene_num": 1, "video_prompts": ["Tam climbs.", "Tam looks.",], "cut": ["True", "False",],},
\t\t{"scene_num": 2, "video_prompts": ["A seal."], "first_frame_prompt": ["x", "y"], "cut": ["True"]},
\t],
}"""
    loose = load_story(write(tmp_path, text, "loose.json"))
    strict = load_story(write(tmp_path, json.dumps(BENCH), "strict.json"))
    assert loose.to_dict() == strict.to_dict()


@pytest.mark.parametrize("prompt", ["a // b /* c */", "emoji 🦭 ok", 'she says: "no", #1', "C:\\dir é", "comma, }]"])
def test_json_strings_survive(tmp_path: Path, prompt: str) -> None:
    content = json.loads(json.dumps(BENCH))
    content["scenes"][0]["video_prompts"][0] = prompt
    for ascii_only in (True, False):
        path = write(tmp_path, json.dumps(content, ensure_ascii=ascii_only, indent="\t"), "story.json")
        assert load_story(path).shots[0].prompt == prompt


def test_scene_numbers_are_preserved(tmp_path: Path) -> None:
    content = json.loads(json.dumps(BENCH))
    content["scenes"][0]["scene_num"], content["scenes"][1]["scene_num"] = 3, 5
    story = load_story(write(tmp_path, json.dumps(content), "story.json"))
    assert [shot.scene for shot in story.shots] == [3, 3, 5]


# Reference images


def test_reference_images_are_checked_and_reported_with_their_lines(tmp_path: Path) -> None:
    good = tmp_path / "tam.png"
    Image.effect_noise((64, 64), 50).save(good)
    (tmp_path / "note.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:2000])
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:1000])
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    (tmp_path / "folder.png").mkdir()
    names = ["tam.png", "tan.png", "note.png", "cut.png", "cut.jpg", "deep.png", "folder.png", "x/y.png"]
    listed = "".join(f"\n      - {name}" for name in names)
    found = problems(
        tmp_path, HEAD.replace("{name: Tam}", f"name: Tam\n    references:{listed}") + "      - prompt: a\n"
    )
    assert [re.split(r";| \(| as ", one)[0] for one in found] == [
        "story.yaml:7: character 1: reference tan.png does not exist",
        "story.yaml:8: character 1: reference note.png cannot be read",
        "story.yaml:9: character 1: reference cut.png cannot be read",
        "story.yaml:10: character 1: reference cut.jpg cannot be read",
        "story.yaml:11: character 1: reference deep.png has more than 8 bits per channel",
        "story.yaml:12: character 1: reference folder.png cannot be used: folder.png is a folder: name a file",
        "story.yaml:13: character 1: reference x/y.png does not exist",
    ]
    assert found[0].endswith("expected an image at tan.png; write tam.png instead")
    assert found[-1].endswith("put the image there or correct the path")


def test_a_missing_image_of_a_shot_is_reported_for_that_shot(tmp_path: Path) -> None:
    reported = shot_problem(tmp_path, "{prompt: a, references: [gone.png]}")
    assert reported.startswith("reference gone.png does not exist; expected an image at gone.png")


# Names that look alike

ODD_NAMES = (
    *("Screenshot 2026-11-20 at 9.22.20\u202fPM.png", "Sn\u00edmek v\u00a013.05.png", "two  spaces.png", " first.png"),
    *("Cafe\u0301.png", "tab\there.png", "\u3000wide.png", "#1, [x].png", 'it\'s "so".png', "\ud55c\uae00.png"),
)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_is_read_as_written(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    story = load_story(write(tmp_path, HEAD + f"      - {{prompt: a, references: [{json.dumps(name)}]}}\n"))
    assert story.shots[0].references == (tmp_path / name,)
    assert story.notes == ()


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("Shot 9.22.20\u202fPM.png", "Shot 9.22.20 PM.png"),
        ("two  spaces.png", "two spaces.png"),
        ("two spaces.png", "two  spaces.png"),
        ("v\u00a013.png", "v 13.png"),
        ("Cafe\u0301.png", "Caf\u00e9.png"),
        ("Caf\u00e9.png", "Cafe\u0301.png"),
        ("my\u00a0folder/a\u202fb.png", "my folder/a b.png"),
        ("a\u2028b.png", "a b.png"),
    ],
)
def test_a_file_with_an_equivalent_name_is_used_and_noted(tmp_path: Path, name: str, written: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    path = write(tmp_path, HEAD + f'      - {{prompt: a, references: ["{written}"]}}\n')
    story = load_story(path)
    assert story.shots[0].references == (tmp_path / name,)
    (note,) = story.notes
    assert note.startswith(f"{path}:{SHOT_LINE}: shot 1 (scene 1, shot 1): reference ")
    shown = note.split(" is read from ")
    assert shown[0].split("reference ")[1] != shown[1], "names that look alike are distinguished"


def test_several_files_with_equivalent_names_are_refused_and_the_advice_distinguishes_them(tmp_path: Path) -> None:
    for name in ("a\u00a0b.png", "a\u202fb.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    reported = shot_problem(tmp_path, '{prompt: a, references: ["a b.png"]}')
    assert reported.endswith('write "a\\u00a0b.png" or "a\\u202fb.png" instead')
    for advice in re.findall(r'"a\\\S+"', reported):
        story = load_story(write(tmp_path, HEAD + f"      - {{prompt: a, references: [{advice}]}}\n"))
        assert story.shots[0].references[0].is_file()


def test_names_of_characters_are_compared_independently_of_unicode_normalization(tmp_path: Path) -> None:
    head = HEAD.replace("Tam", "Ren\u00e9").replace("Pebble", "Zoe")
    story = load_story(write(tmp_path, head + "      - {prompt: a, characters: [Rene\u0301]}\n"))
    assert story.shots[0].characters == ("Ren\u00e9",)
    twice = HEAD.replace("Tam", "Ren\u00e9").replace("Pebble", "Rene\u0301")
    assert "is used twice" in problem(tmp_path, twice + "      - {prompt: a}\n")


# Several stories


def test_stories_with_the_same_film_folder_are_refused(tmp_path: Path) -> None:
    long = "A very long title that goes on and on and on until nobody reads it to its end"
    titles = {"a": "Red!", "b": "Red?", "c": f"{long}, part one", "d": f"{long}, part two", "e": "Green"}
    paths = [
        write(tmp_path, story_of("      - {prompt: a}\n").replace("A", f'"{titles[k]}"', 1), f"{k}.yaml")
        for k in titles
    ]
    with pytest.raises(StoryError) as caught:
        load_stories(paths)
    assert len(caught.value.problems) == 2
    assert f"two stories are called red ({tmp_path}/a.yaml, {tmp_path}/b.yaml)" in caught.value.problems[0]
    assert 'not "Red!" and "Red?"' in caught.value.problems[0]
    assert [story.title for story in load_stories(paths[1:3])] == ["Red?", f"{long}, part one"]


def test_a_story_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path, story_of("      - {prompt: a}\n"), "a.yaml")
    assert [story.title for story in load_stories([path, tmp_path, path])] == ["A"]


def test_hidden_files_are_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "stories"
    (folder / "more").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    write(folder, story_of("      - {prompt: a}\n"), "a.yaml")
    write(folder / "more", story_of("      - {prompt: b}\n").replace("A", "B", 1), "B.YAML")
    write(folder, b"\x00\x05\x16\x07", "._a.yaml")
    write(folder / ".hidden", "no story", "c.yaml")
    (folder / "more" / "back").symlink_to(folder)
    assert [story.title for story in load_stories([folder])] == ["A", "B"]
    assert "hidden files are not read as stories: ._a.yaml" in caplog.text
