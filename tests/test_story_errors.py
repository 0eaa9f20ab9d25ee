"""Every mistake in a story is reported with its line, its shot and what to write instead."""

import os
import re
import time
from pathlib import Path

import pytest

from storymem.story import StoryError, load_story
from tests.story_files import HEAD, SHOT_LINE, problem, problems, shot_problem, story_of, write

# The content


def test_all_mistakes_are_reported_together_in_the_order_of_lines(tmp_path: Path) -> None:
    text = """\
title: 1984
overview: A keeper finds a seal.
characters:
  - name: Tam
    reference: []
scenes:
  - shots:
      - prompt: "Tam climbs."
        cut: "yes"
      - prompt: ""
        frames: 80
  - shots:
      - prompt: Tam sleeps.
        characters: [Tim]
        sed: 4
  - shot: []
"""
    assert problems(tmp_path, text) == [
        'story.yaml:1: story: title is read as a number; expected text; write title: "1984" instead',
        "story.yaml:5: character 1: unknown key reference; expected name, references, description; "
        "write references instead",
        'story.yaml:9: shot 1 (scene 1, shot 1): cut is "yes"; expected true or false without quotes; '
        "write cut: true instead",
        'story.yaml:10: shot 2 (scene 1, shot 2): prompt is empty; expected text; write prompt: "..."',
        "story.yaml:11: shot 2 (scene 1, shot 2): frames is 80; expected 4n + 1, from 5; "
        "write frames: 77 or 81 instead",
        "story.yaml:14: shot 3 (scene 2, shot 1): Tim is not a character of this story; expected Tam; "
        "write Tam instead",
        "story.yaml:15: shot 3 (scene 2, shot 1): unknown key sed; expected prompt, cut, characters, frames, "
        "seed, negative_prompt, references; write seed instead",
        "story.yaml:16: scene 3: unknown key shot; expected shots; write shots instead",
    ]


@pytest.mark.parametrize(
    ("shot", "reported"),
    [
        ("{prompt: a, cut: false}", "the first shot of a film has nothing to continue; expected a cut"),
        ("{prompt: a, cut: off}", "the first shot of a film has nothing to continue; expected a cut"),
        ('{prompt: a, cut: "False"}', "expected true or false without quotes; write cut: false instead"),
        ("{prompt: a, cut: 1}", "cut is 1; expected true or false without quotes; write cut: true instead"),
        ("{prompt: a, cut: }", "cut is empty; expected true or false"),
        ("{prompt: a, cut: [true]}", "cut is [true]; expected true or false"),
        ("{cut: true}", "prompt is missing; expected prompt; write prompt: ..."),
        ("{promt: a}", "unknown key promt; expected prompt, cut, characters"),
        ("{prompt: a, colour: red}", "seed, negative_prompt, references; remove it"),
        ("{prompt: Tam climbs, a lamp lit}", "unknown key a lamp lit"),
        ("{prompt: Tam climbs, a lamp lit}", "put text that contains a comma in double quotes"),
        (
            "{prompt: a, prompt: b}",
            f"prompt is repeated, first on line {SHOT_LINE}; expected each key once",
        ),
        ('"Tam climbs."', 'found "Tam climbs."; expected a mapping of prompt, cut'),
        ('"Tam climbs."', 'write - {prompt: "Tam climbs."}'),
        ("[a, b]", "found [a, b]; expected a mapping of prompt, cut"),
        ("{prompt: {Tam climbs}}", "prompt is read as a mapping; expected text"),
        ("{prompt: [a, b]}", "prompt is read as a list; expected text"),
        ("{prompt: yes}", 'prompt is read as true or false; expected text; write prompt: "yes" instead'),
        ("{prompt: 2024-01-01}", "prompt is read as a date; expected text"),
        ("{prompt: !wow a}", 'write prompt: "!wow a" instead'),
        ("{prompt: }", 'prompt is read as empty; expected text; write prompt: "..." instead'),
        ('{prompt: " \\n "}', "prompt is empty; expected text"),
        ("{prompt: a, frames: 80}", "frames is 80; expected 4n + 1, from 5; write frames: 77 or 81 instead"),
        ("{prompt: a, seed: 1_000}", "seed is 1_000; expected a whole number from 0; write seed: 1000 instead"),
        ("{prompt: a, seed: 12:30}", "seed is 12:30; expected a whole number from 0; write a number or leave seed out"),
        ("{prompt: a, frames: 17.0}", "frames is 17.0; expected a whole number from 0; write frames: 17 instead"),
        ("{prompt: a, frames: 1}", "frames is 1; expected 4n + 1, from 5; write frames: 5 or more"),
        (
            '{prompt: a, frames: "81"}',
            'frames is "81"; expected a whole number from 0; write frames: 81 instead',
        ),
        ("{prompt: a, frames: 81.0}", "frames is 81.0; expected a whole number"),
        ("{prompt: a, frames: 1:21}", "frames is 1:21; expected a whole number"),
        (
            "{prompt: a, frames: long}",
            "frames is long; expected a whole number from 0; write a number or leave",
        ),
        ("{prompt: a, seed: -3}", "seed is -3; expected a whole number from 0; write a number or leave seed out"),
        ("{prompt: a, seed: true}", "seed is true; expected a whole number"),
        ("{prompt: a, seed: [1]}", "seed is [1]; expected a whole number"),
        ("{prompt: a, negative_prompt: 3}", "negative_prompt is read as a number; expected text"),
        (
            "{prompt: a, characters: Tam}",
            "characters is Tam; expected a list; write characters: [Tam] instead",
        ),
        ("{prompt: a, characters: }", "characters is empty; expected a list; leave the key out"),
        (
            "{prompt: a, characters: [tam]}",
            "tam is not a character of this story; expected Pebble, Tam; write Tam",
        ),
        ("{prompt: a, characters: [Rob]}", "add - {name: Rob} to the story's characters"),
        ("{prompt: a, characters: [7]}", 'characters is read as a number; expected text; write "7" instead'),
        ("{prompt: a, characters: [Tam, Tam]}", "Tam is listed twice; expected each character once"),
        ("{prompt: a, references: a.png}", "references is a.png; expected a list; write references: [a.png]"),
    ],
)
def test_a_mistake_in_a_shot_is_reported(tmp_path: Path, shot: str, reported: str) -> None:
    assert reported in shot_problem(tmp_path, shot)


def test_text_that_a_colon_makes_a_key_is_reported(tmp_path: Path) -> None:
    found = problems(tmp_path, f"{HEAD}      - Tam whispers: look\n")
    assert [one.split("; ")[0].split(": ", 2)[2] for one in found] == [
        "unknown key Tam whispers",
        "prompt is missing",
    ]


def test_a_mapping_instead_of_text_is_quoted_in_the_advice(tmp_path: Path) -> None:
    text = f"{HEAD}      - cut: true\n        prompt:\n          Tam whispers: look\n"
    assert problem(tmp_path, text) == (
        f"story.yaml:{SHOT_LINE + 2}: shot 1 (scene 1, shot 1): prompt is read as a mapping; expected text; "
        'write prompt: "Tam whispers: look" instead'
    )


@pytest.mark.parametrize(
    ("old", "new", "line", "reported"),
    [
        ("title: The Keeper", "", 2, "story: title is missing; expected title, overview, scenes"),
        (
            "title:",
            "titel:",
            1,
            "story: unknown key titel; expected title, overview, style, genre, characters, scenes",
        ),
        ("title: The Keeper", "title: [a]", 1, "story: title is read as a list; expected text"),
        (
            "overview: A",
            "title: A",
            2,
            "story: title is repeated, first on line 1; expected each key once",
        ),
        ("overview: A keeper finds a seal.", "overview: ''", 2, "story: overview is empty; expected text"),
        ("{name: Tam}", "{}", 4, "character 1: name is missing; expected name"),
        (
            "{name: Tam}",
            "Tam",
            4,
            "character 1: found Tam; expected a mapping of name, references",
        ),
        (
            "{name: Tam}",
            "{name: 007}",
            4,
            'character 1: name is read as a number; expected text; write name: "007"',
        ),
        ("{name: Pebble}", "{name: No}", 5, "character 2: name is read as true or false"),
        (
            "{name: Pebble}",
            "{name: Tam}",
            5,
            "character 2: the name Tam is used twice; expected a different name",
        ),
        ("{name: Pebble}", "{name: tam}", 5, "character 2: the name tam is used twice"),
        (
            "{name: Tam}",
            "{name: Tam, references: tam.png}",
            4,
            "character 1: references is tam.png; expected a list",
        ),
        (
            "  - shots:",
            "  - Tam climbs.\n  - shots:",
            7,
            "scene 1: found Tam climbs.; expected a mapping",
        ),
        ("  - shots:", "  - {shots: []}\n  - shots:", 7, "scene 1: shots is empty; expected at least one"),
        ("  - shots:", "  - {}\n  - shots:", 7, "scene 1: shots is missing"),
        (
            "  - shots:",
            "  - {shots: a}\n  - shots:",
            7,
            "scene 1: shots is a; expected a list; write shots: [a]",
        ),
    ],
)
def test_a_mistake_outside_the_shots_is_reported(tmp_path: Path, old: str, new: str, line: int, reported: str) -> None:
    text = HEAD.replace(old, new) + "      - {prompt: Someone climbs.}\n"
    if reported.endswith("first on line 1; expected each key once"):
        first = problems(tmp_path, text)[1]
    else:
        first = problems(tmp_path, text)[0]
    assert first.startswith(f"story.yaml:{line}: {reported}")


def test_a_misspelt_key_is_reported_once(tmp_path: Path) -> None:
    text = HEAD.replace("characters:", "charcters:") + "      - {prompt: Tam climbs., characters: [Tam]}\n"
    assert problem(tmp_path, text).startswith("story.yaml:3: story: unknown key charcters")


def test_a_shot_cannot_list_characters_that_the_story_does_not(tmp_path: Path) -> None:
    text = 'title: A\noverview: B\nscenes:\n  - shots: [{prompt: "Tam climbs.", characters: [Tam]}]\n'
    assert problem(tmp_path, text) == (
        "story.yaml:4: shot 1 (scene 1, shot 1): Tam is not a character of this story; expected none, because "
        "the story lists no characters; add - {name: Tam} to the story's characters"
    )


@pytest.mark.parametrize("scenes", ["", "[]", "{}", "a"])
def test_a_story_needs_scenes(tmp_path: Path, scenes: str) -> None:
    assert problem(tmp_path, f"title: A\noverview: B\nscenes: {scenes}\n").startswith("story.yaml:3: story: scenes is ")


@pytest.mark.parametrize("frames", [80, 1, 99999999997, 6])
def test_the_advice_for_frames_works(tmp_path: Path, frames: int) -> None:
    reported = shot_problem(tmp_path, f"{{prompt: a, frames: {frames}}}")
    advice = re.search(r"write (frames: \d+)", reported)
    assert advice is not None
    load_story(write(tmp_path, f"{HEAD}      - {{prompt: a, {advice[1]}}}\n"))


def test_all_mistakes_in_json_are_reported_with_their_lines(tmp_path: Path) -> None:
    text = """{
  "story_name": "A", /* a comment
  of two lines */ "story_overview": "",
  "scenes": [
    {"scene_num": 1, "video_prompts": ["a",
       7], "cut": ["False", "maybe",
       true]},
    {"scene_num": 1, "video_prompt": ["b"]}
  ]
}"""
    assert problems(tmp_path, text, "s.json") == [
        's.json:3: story: story_overview is empty; expected text; write story_overview: "..."',
        "s.json:6: scene 1: cut has 3 entries and video_prompts has 2; expected equal numbers of both; "
        "write one true or false for each prompt",
        "s.json:6: shot 1 (scene 1, shot 1): the first shot of a film has nothing to continue; "
        "expected a cut; write true instead",
        's.json:6: shot 2 (scene 1, shot 2): video_prompts is read as a number; expected text; write "7" instead',
        's.json:6: shot 2 (scene 1, shot 2): cut is "maybe"; expected true or false without quotes; write true instead',
        "s.json:8: scene 2: unknown key video_prompt; expected scene_num, video_prompts, "
        "first_frame_prompt, cut; write video_prompts instead",
        "s.json:8: scene 2: scene_num 1 comes after scene_num 1; expected increasing numbers; "
        "write scene_num: 2 instead",
    ]


# The file itself


@pytest.mark.parametrize(
    ("shot", "line", "reported"),
    [
        (
            "prompt: Tam says: hello",
            0,
            'expected no ": " inside text without quotes; put the whole text in double',
        ),
        ("{prompt: Tam says: hello}", 0, "look for a missing comma, colon, bracket or quote"),
        ("prompt: *Tam* runs", 0, "expected quotes around text that begins with * or &"),
        (
            "prompt: *Tam",
            0,
            "expected quotes around text that begins with *; put the whole text in double quotes",
        ),
        ("prompt: @Tam", 0, "expected quotes around text that begins with this character"),
        ("prompt: Tam\n\tcut: true", 1, "expected spaces at the start of lines; replace the tab with spaces"),
        ("prompt: Tam\n       cut: true", 1, "look for a wrong indent"),
        ('prompt: "Tam" runs', 0, "look for a wrong indent or quote here or above"),
        ('prompt: "Tam runs\n        cut: true', 0, "expected a closing quote; close the quote that opens"),
        ('prompt: "C:\\dir"', 0, "expected \\\\ for a backslash inside double quotes"),
        ("{prompt: Tam runs\n", 0, "look for a missing comma, colon, bracket or quote"),
        ("prompt: a\n        cut", 1, "expected key: value; look for a missing comma, colon"),
        ("prompt: a\n---\ntitle: B", 1, "expected one story in a file; remove the line ---"),
        ("prompt: a\n        seed: \x07", 1, "found an invisible control character"),
    ],
)
def test_invalid_yaml_is_reported_in_plain_words(tmp_path: Path, shot: str, line: int, reported: str) -> None:
    text = problem(tmp_path, f"{HEAD}      - {shot}\n")
    assert text.startswith(f"story.yaml:{SHOT_LINE + line}: ")
    assert reported in text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"story_name": "N"\n "story_overview": "O"}', 2),
        ('{\n"story_name": "N", "scenes": [\n1, 2', 2),
        ('{"story_name": "N,\n "story_overview": "O"}', 2),
        ('{"story_name": "N"}\n}', 2),
    ],
)
def test_invalid_json_is_reported_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    assert problem(tmp_path, text, "s.json").startswith(f"s.json:{line}: this is not valid JSON (")


@pytest.mark.parametrize(
    ("content", "reported"),
    [
        (b"", "story.yaml:1: the file is empty; expected a story; write at least title, overview and scenes"),
        (b"# only a comment\n", "story.yaml:1: the file is empty"),
        (
            b"Once upon a time",
            "story.yaml:1: story: found Once upon a time; expected a mapping of title",
        ),
        (b"- a\n- b\n", "story.yaml:1: story: found - a - b; expected a mapping"),
        (
            "title: A\noverview: é".encode("latin-1"),
            "story.yaml:2: the file is not UTF-8 text; expected UTF-8",
        ),
        ("title: A".encode("utf-16"), "story.yaml:1: the file is not UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n", "story.yaml:1: the file is not UTF-8 text"),
    ],
)
def test_a_file_that_is_not_a_story_is_reported(tmp_path: Path, content: bytes, reported: str) -> None:
    assert problem(tmp_path, content).startswith(reported)


def test_a_path_that_is_not_a_story_file_is_reported(tmp_path: Path) -> None:
    write(tmp_path, HEAD, "keeper.yaml")
    cases = {
        tmp_path / "keeper.yml": f"the file does not exist; expected a story file; write {tmp_path}/keeper.yaml",
        tmp_path / "gone" / "a.yaml": "the file does not exist; expected a story file; check the path",
        tmp_path: "this is a folder; expected a story file; write the path of a file in it instead",
        write(tmp_path, HEAD, "keeper.txt"): "expected a name that ends in .yaml, .yml, .json; rename it",
    }
    for path, reported in cases.items():
        with pytest.raises(StoryError) as caught:
            load_story(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert reported in str(caught.value)


# Text that YAML would truncate


@pytest.mark.parametrize(
    ("old", "new", "reported"),
    [
        ("{prompt: a}", "prompt: Shot #1 of the tower, colour #ff0000", "prompt ends before #"),
        ("{prompt: a}", "prompt: Shot #1\n        cut: true", 'write prompt: "Shot #1" instead'),
        ("{prompt: a}", "prompt: #1 of the tower", 'write prompt: "#1 of the tower" instead'),
        ("{prompt: a}", "prompt: 7 #1", 'write prompt: "7 #1" instead'),
        ("{prompt: a}", "prompt: a dog\n          and a cat #2", "#2 would not be read"),
        ("{prompt: a}", "prompt: a\n        negative_prompt: no #hashtags", "negative_prompt ends before #"),
        ("{prompt: a}", "prompt: a\n        characters:\n          - Tam #1", 'write "Tam #1" instead'),
        ("{prompt: a}", "prompt: a\n        references:\n          - take #1.png", 'write "take #1.png" instead'),
        ("title: The Keeper", "title: Take #2", 'write title: "Take #2" instead'),
        ("overview: A keeper finds a seal.", "overview: A film, #1", "quotes around text that contains #"),
        ("{prompt: a}", "{prompt: Shot #1 of the tower}", "text that contains # needs double quotes"),
        ("{prompt: a}", "prompt: Shot #1 of\n          the tower", "text that contains # needs double quotes"),
    ],
)
def test_text_that_a_hash_would_truncate_is_reported(tmp_path: Path, old: str, new: str, reported: str) -> None:
    assert reported in "\n".join(problems(tmp_path, (HEAD + "      - {prompt: a}\n").replace(old, new)))


def test_the_advice_for_a_hash_works_and_comments_stay_comments(tmp_path: Path) -> None:
    text = HEAD.replace("The Keeper", '"Take #2"  # a comment').replace("scenes:", "# more\nscenes: # and more")
    shots = '      - prompt: "Shot #1 of the tower" # again\n        cut: true # yes\n        frames: 9 # short\n'
    block = "      - prompt: |  # a comment\n          Shot #2 # of the tower\n      # last\n"
    story = load_story(write(tmp_path, text + shots + block))
    assert story.title == "Take #2"
    assert [shot.prompt for shot in story.shots] == ["Shot #1 of the tower", "Shot #2 # of the tower"]


# Files that are too large or damaged


@pytest.mark.parametrize(
    ("content", "reported"),
    [
        ("scenes:\n  - " + "[" * 20_000, "nested too deeply"),
        ("scenes:\n  - " + "[" * 600 + "]" * 600, "[...; expected a mapping of shots"),
        ("a: &a [" + "x," * 9 + "]\n" + "".join(f"{k}: &{k} [{'*a,' * 9}]\n" for k in "bcdefg"), "unknown key a"),
        (story_of("      - {prompt: a}\n" * 6000), "more than 5,000 shots; expected a shorter story"),
        (
            "title: A\noverview: B\nscenes:\n  - &s {shots: [&x {prompt: a}" + ", *x" * 999 + "]}\n" + "  - *s\n" * 999,
            "5,000",
        ),
        (
            "title: A\noverview: B\ncharacters: [" + ",".join(f"{{name: n{k}}}" for k in range(900)) + "]\nscenes:\n"
            "  - shots: [&x {prompt: a, characters: ["
            + ",".join(f"n{k}" for k in range(900))
            + "]}"
            + ", *x" * 3000
            + "]\n",
            "more than 100,000 values (those of an alias *name count at every use)",
        ),
        (
            "characters: [" + "{name: a}," * 1500 + "]\ntitle: A\noverview: B\nscenes: [{shots: [{prompt: a}]}]",
            "at most 1,000",
        ),
        (story_of("      - {promt: a}\n" * 3000), "reading stopped here, at 100 problems"),
        (story_of(f"      - {{prompt: {'word ' * 9000}}}\n"), "prompt has 44,999 characters; expected at most 20,000"),
        (f"title: {'x' * 5000}\noverview: B\nscenes: [{{shots: [{{prompt: a}}]}}]", "title has 5,000 characters"),
        (story_of("      - {prompt: a, frames: 99999999997}\n"), "expected at most"),
        (story_of('      - {prompt: "a\\0b"}\n'), "prompt contains the control character '\\x00'; expected plain text"),
        (story_of('      - {prompt: "\\e[31mred"}\n'), "prompt contains the control character '\\x1b'"),
        (story_of('      - {prompt: a, "\\e[31m": 1}\n'), "unknown key \\x1b[31m"),
        (story_of('      - {prompt: a, references: ["a\\0.png"]}\n'), "references contains the control character"),
        (story_of(f"      - {{prompt: a, references: [{'z' * 300}.png]}}\n"), "File name too long"),
        ("#" * 9_000_000, "9,000,000 bytes; at most 8,388,608 are read"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_too_large_or_damaged_files_are_reported_quickly(tmp_path: Path, content: str, reported: str) -> None:
    started = time.monotonic()
    assert reported in "\n".join(problems(tmp_path, content))
    assert time.monotonic() - started < 30  # a second or two


@pytest.mark.parametrize("content", ['{"a": "' + '\\"' * 300_000, "/*" * 300_000, "[" * 20_000, '{"a": ' * 20_000])
def test_damaged_json_is_reported_quickly(tmp_path: Path, content: str) -> None:
    started = time.monotonic()
    assert len(problems(tmp_path, content, "s.json")) == 1
    assert time.monotonic() - started < 30


def test_half_a_character_is_reported(tmp_path: Path) -> None:
    assert "half of a character" in "\n".join(problems(tmp_path, '{"story_name": "a\\ud800"}', "s.json"))


def test_files_that_are_not_regular_are_reported_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "gone.yaml").symlink_to("nowhere")
    for name, reported in (("fifo", "not a regular file"), ("zero", "not a regular file"), ("gone", "a broken link")):
        with pytest.raises(StoryError, match=rf"{name}\.yaml.* is {reported}"):
            load_story(tmp_path / f"{name}.yaml")
    assert "not a regular file" in shot_problem(tmp_path, "{prompt: a, references: [fifo.png]}")
