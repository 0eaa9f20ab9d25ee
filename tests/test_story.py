"""Stories are read as written, and a faulty one is told with its line, its shot and what to write instead."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from storymem.story import Character, Scene, Shot, Story, StoryError, load_stories, load_story

EXAMPLES = Path(__file__).parent.parent / "examples"

HEAD = """\
title: The Keeper
overview: A keeper finds a seal.
characters:
  - {name: Tam}
  - {name: Pebble}
scenes:
  - shots:
"""
SHOT_LINE = HEAD.count("\n") + 1

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


def write(folder: Path, content: str | bytes, name: str = "story.yaml") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def problems(folder: Path, content: str | bytes, name: str = "story.yaml") -> list[str]:
    """What load_story says about ``content``, with the folder taken out of the paths."""
    path = write(folder, content, name)
    with pytest.raises(StoryError) as caught:
        load_story(path)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return [problem.replace(f"{folder}/", "") for problem in caught.value.problems]


def problem(folder: Path, content: str | bytes, name: str = "story.yaml") -> str:
    found = problems(folder, content, name)
    assert len(found) == 1, found
    return found[0]


def shot_problem(folder: Path, shot: str) -> str:
    """The one problem of a story whose only shot is ``shot``; checks that it is told of that shot."""
    text = problem(folder, f"{HEAD}      - {shot}\n")
    where, label, rest = text.split(": ", 2)
    assert label == "shot 1 (scene 1, shot 1)"
    assert where == f"story.yaml:{SHOT_LINE}"
    return rest


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


def test_a_shot_is_a_cut_unless_the_story_says_not(tmp_path: Path) -> None:
    shots = ["{prompt: a}", "{prompt: b}", "{prompt: c, cut: no}", "{prompt: d, cut: true}"]
    story = load_story(write(tmp_path, HEAD + "".join(f"      - {shot}\n" for shot in shots)))
    assert [shot.cut for shot in story.shots] == [True, True, False, True]


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Character(name="Tam").name = "Sam"  # type: ignore[misc]


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


def test_the_dict_is_plain_json_and_tells_a_changed_story_from_a_moved_one(tmp_path: Path) -> None:
    text = (EXAMPLES / "with_references.yaml").read_text()
    homes = [tmp_path / "here", tmp_path / "there" / "deeper"]
    for home in homes:
        (home / "references").mkdir(parents=True)
        for picture in (EXAMPLES / "references").glob("*.png"):
            (home / "references" / picture.name).write_bytes(picture.read_bytes())
    here, there = (load_story(write(home, text)).to_dict() for home in homes)
    assert here == there == json.loads(json.dumps(here))
    assert here["characters"][0]["references"][0] == "references/mina_face.png"
    commented = load_story(write(homes[0], "# a remark\n" + text)).to_dict()
    assert commented == here
    for old, new in [("seed: 7", "seed: 8"), ("cut: false", "cut: true"), ("black bob", "red bob")]:
        assert load_story(write(homes[0], text.replace(old, new, 1))).to_dict() != here


def test_paths_are_absolute_though_the_story_was_named_relatively(
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


def test_reading_a_story_is_light() -> None:
    code = (
        "import sys, storymem.story as s; s.load_story(sys.argv[1]);"
        "print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(EXAMPLES / "the_keeper.yaml")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ST-Bench's JSON


def test_the_published_json_is_read(tmp_path: Path) -> None:
    story = load_story(write(tmp_path, json.dumps(BENCH), "story.json"))
    assert (story.title, story.overview) == ("The Keeper", "A keeper finds a seal.")
    assert [(shot.prompt, shot.cut, shot.label) for shot in story.shots] == [
        ("Tam climbs.", True, "shot 1 (scene 1, shot 1)"),
        ("Tam looks.", False, "shot 2 (scene 1, shot 2)"),
        ("A seal.", True, "shot 3 (scene 2, shot 1)"),
    ]


def test_json_that_circulates_is_read_alike(tmp_path: Path) -> None:
    text = """{
\t// where it came from: http://example.org
\t"story_name":"The Keeper",  /* a remark
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


def test_scene_numbers_are_kept_as_published(tmp_path: Path) -> None:
    content = json.loads(json.dumps(BENCH))
    content["scenes"][0]["scene_num"], content["scenes"][1]["scene_num"] = 3, 5
    story = load_story(write(tmp_path, json.dumps(content), "story.json"))
    assert [shot.scene for shot in story.shots] == [3, 3, 5]


def test_faults_in_json_are_all_told_with_their_lines(tmp_path: Path) -> None:
    text = """{
  "story_name": "A", /* a remark
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
        "s.json:6: scene 1: cut has 3 entries and video_prompts has 2; expected as many of each; "
        "write one true or false for each prompt",
        "s.json:6: shot 1 (scene 1, shot 1): the first shot of a film has nothing to continue; "
        "expected a cut; write true instead",
        's.json:6: shot 2 (scene 1, shot 2): video_prompts is read as a number; expected text; write "7" instead',
        's.json:6: shot 2 (scene 1, shot 2): cut is "maybe"; expected true or false without quotes; write true instead',
        "s.json:8: scene 2: unknown key video_prompt; expected scene_num, video_prompts, "
        "first_frame_prompt, cut; write video_prompts instead",
        "s.json:8: scene 2: scene_num 1 comes after scene_num 1; expected numbers that rise; "
        "write scene_num: 2 instead",
    ]


# What is wrong in a story


def test_every_mistake_is_told_at_once_in_the_order_of_the_lines(tmp_path: Path) -> None:
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
        "story.yaml:5: character 1: unknown key reference; expected name, references; write references instead",
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
    ("shot", "told"),
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
        ("{prompt: Tam climbs, a lamp lit}", "put text that holds a comma in double quotes"),
        (
            "{prompt: a, prompt: b}",
            f"prompt stands here again, first on line {SHOT_LINE}; expected each key once",
        ),
        ('"Tam climbs."', '"Tam climbs." stands here alone; expected a mapping of prompt, cut'),
        ('"Tam climbs."', 'write - {prompt: "Tam climbs."}'),
        ("[a, b]", "[a, b] stands here alone; expected a mapping of prompt, cut"),
        ("{prompt: {Tam climbs}}", "prompt is read as a mapping; expected text"),
        ("{prompt: [a, b]}", "prompt is read as a list; expected text"),
        ("{prompt: yes}", 'prompt is read as true or false; expected text; write prompt: "yes" instead'),
        ("{prompt: 2024-01-01}", "prompt is read as a date; expected text"),
        ("{prompt: !wow a}", 'write prompt: "!wow a" instead'),
        ("{prompt: }", 'prompt is read as empty; expected text; write prompt: "..." instead'),
        ('{prompt: " \\n "}', "prompt is empty; expected text"),
        ("{prompt: a, frames: 80}", "frames is 80; expected 4n + 1, from 5; write frames: 77 or 81 instead"),
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
        ("{prompt: a, seed: -3}", "seed is -3; expected a whole number from 0; write seed: 3 instead"),
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
def test_a_faulty_shot_is_told(tmp_path: Path, shot: str, told: str) -> None:
    assert told in shot_problem(tmp_path, shot)


def test_text_that_a_colon_made_into_a_key_is_told(tmp_path: Path) -> None:
    found = problems(tmp_path, f"{HEAD}      - Tam whispers: look\n")
    assert [one.split("; ")[0].split(": ", 2)[2] for one in found] == [
        "unknown key Tam whispers",
        "prompt is missing",
    ]


def test_a_block_that_yaml_reads_as_a_mapping_is_given_back_as_text(tmp_path: Path) -> None:
    text = f"{HEAD}      - cut: true\n        prompt:\n          Tam whispers: look\n"
    assert problem(tmp_path, text) == (
        f"story.yaml:{SHOT_LINE + 2}: shot 1 (scene 1, shot 1): prompt is read as a mapping; expected text; "
        'write prompt: "Tam whispers: look" instead'
    )


@pytest.mark.parametrize(
    ("old", "new", "line", "told"),
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
            "story: title stands here again, first on line 1; expected each key once",
        ),
        ("overview: A keeper finds a seal.", "overview: ''", 2, "story: overview is empty; expected text"),
        ("{name: Tam}", "{}", 4, "character 1: name is missing; expected name"),
        (
            "{name: Tam}",
            "Tam",
            4,
            "character 1: Tam stands here alone; expected a mapping of name, references",
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
            "character 2: the name Tam is taken; expected a name of its own",
        ),
        ("{name: Pebble}", "{name: tam}", 5, "character 2: the name tam is taken"),
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
            "scene 1: Tam climbs. stands here alone; expected a mapping",
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
def test_a_faulty_head_is_told(tmp_path: Path, old: str, new: str, line: int, told: str) -> None:
    text = HEAD.replace(old, new) + "      - {prompt: Someone climbs.}\n"
    if told.endswith("first on line 1; expected each key once"):
        first = problems(tmp_path, text)[1]
    else:
        first = problems(tmp_path, text)[0]
    assert first.startswith(f"story.yaml:{line}: {told}")


def test_a_misspelt_key_is_one_problem_and_not_two(tmp_path: Path) -> None:
    text = HEAD.replace("characters:", "charcters:") + "      - {prompt: Tam climbs., characters: [Tam]}\n"
    assert problem(tmp_path, text).startswith("story.yaml:3: story: unknown key charcters")


def test_a_story_without_characters_can_list_none(tmp_path: Path) -> None:
    text = 'title: A\noverview: B\nscenes:\n  - shots: [{prompt: "Tam climbs.", characters: [Tam]}]\n'
    assert problem(tmp_path, text) == (
        "story.yaml:4: shot 1 (scene 1, shot 1): Tam is not a character of this story; expected none, for "
        "the story lists no characters; add - {name: Tam} to the story's characters"
    )


@pytest.mark.parametrize("scenes", ["", "[]", "{}", "a"])
def test_a_story_needs_scenes(tmp_path: Path, scenes: str) -> None:
    assert problem(tmp_path, f"title: A\noverview: B\nscenes: {scenes}\n").startswith("story.yaml:3: story: scenes is ")


# Reference images


def test_reference_images_are_checked_where_they_stand(tmp_path: Path) -> None:
    good = tmp_path / "tam.png"
    Image.effect_noise((64, 64), 50).save(good)
    (tmp_path / "note.png").write_text("no picture")
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
    assert found[-1].endswith("put the picture there or mend the path")


def test_a_missing_picture_of_one_shot_is_told_at_that_shot(tmp_path: Path) -> None:
    told = shot_problem(tmp_path, "{prompt: a, references: [gone.png]}")
    assert told.startswith("reference gone.png does not exist; expected an image at gone.png")


# The file itself


@pytest.mark.parametrize(
    ("shot", "line", "told"),
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
        ("prompt: @Tam", 0, "expected quotes around text that begins with this sign"),
        ("prompt: Tam\n\tcut: true", 1, "expected spaces at the start of lines; replace the tab by spaces"),
        ("prompt: Tam\n       cut: true", 1, "look for a wrong indent"),
        ('prompt: "Tam" runs', 0, "look for a wrong indent or quote here or above"),
        ('prompt: "Tam runs\n        cut: true', 0, "expected a closing quote; close the quote that opens"),
        ('prompt: "C:\\dir"', 0, "expected \\\\ for a backslash inside double quotes"),
        ("{prompt: Tam runs\n", 0, "look for a missing comma, colon, bracket or quote"),
        ("prompt: a\n        cut", 1, "expected key: value; look for a missing comma, colon"),
        ("prompt: a\n---\ntitle: B", 1, "expected one story in a file; remove the line ---"),
        ("prompt: a\n        seed: \x07", 1, "an invisible control character stands here"),
    ],
)
def test_broken_yaml_is_told_in_plain_words(tmp_path: Path, shot: str, line: int, told: str) -> None:
    text = problem(tmp_path, f"{HEAD}      - {shot}\n")
    assert text.startswith(f"story.yaml:{SHOT_LINE + line}: ")
    assert told in text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"story_name": "N"\n "story_overview": "O"}', 2),
        ('{\n"story_name": "N", "scenes": [\n1, 2', 2),
        ('{"story_name": "N,\n "story_overview": "O"}', 2),
        ('{"story_name": "N"}\n}', 2),
    ],
)
def test_broken_json_is_told_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    assert problem(tmp_path, text, "s.json").startswith(f"s.json:{line}: this is not valid JSON (")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "story.yaml:1: the file is empty; expected a story; write at least title, overview and scenes"),
        (b"# only a remark\n", "story.yaml:1: the file is empty"),
        (
            b"Once upon a time",
            "story.yaml:1: story: Once upon a time stands here alone; expected a mapping of title",
        ),
        (b"- a\n- b\n", "story.yaml:1: story: - a - b stands here alone"),
        (
            "title: A\noverview: é".encode("latin-1"),
            "story.yaml:2: the file is not UTF-8 text; expected UTF-8",
        ),
        ("title: A".encode("utf-16"), "story.yaml:1: the file is not UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n", "story.yaml:1: the file is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_story_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    assert problem(tmp_path, content).startswith(told)


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    text = HEAD + "      - prompt: Tam climbs.\n        frames: 80\n"
    windows = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
    assert problem(tmp_path, windows).startswith(f"story.yaml:{SHOT_LINE + 1}: shot 1 (scene 1, shot 1): frames")


def test_a_path_that_is_no_file_is_told(tmp_path: Path) -> None:
    write(tmp_path, HEAD, "keeper.yaml")
    cases = {
        tmp_path / "keeper.yml": f"the file does not exist; expected a story file; write {tmp_path}/keeper.yaml",
        tmp_path / "gone" / "a.yaml": "the file does not exist; expected a story file; check the path",
        tmp_path: "this is a folder; expected a story file; write the path of a file in it instead",
        write(tmp_path, HEAD, "keeper.txt"): "expected a name that ends in .yaml, .yml, .json; rename it",
    }
    for path, told in cases.items():
        with pytest.raises(StoryError) as caught:
            load_story(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert told in str(caught.value)


# Text that YAML would cut


@pytest.mark.parametrize(
    ("old", "new", "told"),
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
        ("overview: A keeper finds a seal.", "overview: A film, #1", "quotes around text that holds #"),
        ("{prompt: a}", "{prompt: Shot #1 of the tower}", "text that holds # needs double quotes"),
        ("{prompt: a}", "prompt: Shot #1 of\n          the tower", "text that holds # needs double quotes"),
    ],
)
def test_text_that_a_hash_would_cut_is_told(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert told in "\n".join(problems(tmp_path, (HEAD + "      - {prompt: a}\n").replace(old, new)))


def test_the_advice_for_a_hash_works_and_comments_stay_comments(tmp_path: Path) -> None:
    text = HEAD.replace("The Keeper", '"Take #2"  # a remark').replace("scenes:", "# more\nscenes: # and more")
    shots = '      - prompt: "Shot #1 of the tower" # again\n        cut: true # yes\n        frames: 9 # short\n'
    block = "      - prompt: |  # a remark\n          Shot #2 # of the tower\n      # last\n"
    story = load_story(write(tmp_path, text + shots + block))
    assert story.title == "Take #2"
    assert [shot.prompt for shot in story.shots] == ["Shot #1 of the tower", "Shot #2 # of the tower"]


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
def test_the_one_file_of_an_equal_name_is_taken_and_told(tmp_path: Path, name: str, written: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    path = write(tmp_path, HEAD + f'      - {{prompt: a, references: ["{written}"]}}\n')
    story = load_story(path)
    assert story.shots[0].references == (tmp_path / name,)
    (note,) = story.notes
    assert note.startswith(f"{path}:{SHOT_LINE}: shot 1 (scene 1, shot 1): reference ")
    shown = note.split(" is read from ")
    assert shown[0].split("reference ")[1] != shown[1], "what looks alike is told apart"


def test_of_several_alike_none_is_taken_and_the_advice_tells_them_apart(tmp_path: Path) -> None:
    for name in ("a\u00a0b.png", "a\u202fb.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    told = shot_problem(tmp_path, '{prompt: a, references: ["a b.png"]}')
    assert told.endswith('write "a\\u00a0b.png" or "a\\u202fb.png" instead')
    for advice in re.findall(r'"a\\\S+"', told):
        story = load_story(write(tmp_path, HEAD + f"      - {{prompt: a, references: [{advice}]}}\n"))
        assert story.shots[0].references[0].is_file()


def test_names_of_characters_are_equal_however_accents_are_encoded(tmp_path: Path) -> None:
    head = HEAD.replace("Tam", "Ren\u00e9").replace("Pebble", "Zoe")
    story = load_story(write(tmp_path, head + "      - {prompt: a, characters: [Rene\u0301]}\n"))
    assert story.shots[0].characters == ("Ren\u00e9",)
    twice = HEAD.replace("Tam", "Ren\u00e9").replace("Pebble", "Rene\u0301")
    assert "is taken" in problem(tmp_path, twice + "      - {prompt: a}\n")


# Damage


def story_of(shots: str) -> str:
    return f"title: A\noverview: B\nscenes:\n  - shots:\n{shots}"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("scenes:\n  - " + "[" * 20_000, "nested too deeply"),
        ("scenes:\n  - " + "[" * 600 + "]" * 600, "stands here alone; expected a mapping of shots"),
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
        (story_of('      - {prompt: "a\\0b"}\n'), "prompt holds the control character '\\x00'; expected plain text"),
        (story_of('      - {prompt: "\\e[31mred"}\n'), "prompt holds the control character '\\x1b'"),
        (story_of('      - {prompt: a, "\\e[31m": 1}\n'), "unknown key \\x1b[31m"),
        (story_of('      - {prompt: a, references: ["a\\0.png"]}\n'), "references holds the control character"),
        (story_of(f"      - {{prompt: a, references: [{'z' * 300}.png]}}\n"), "File name too long"),
        ("#" * 9_000_000, "9,000,000 bytes; at most 8,388,608 are read"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_what_is_too_large_or_damaged_is_told_at_once(tmp_path: Path, content: str, told: str) -> None:
    started = time.monotonic()
    assert told in "\n".join(problems(tmp_path, content))
    assert time.monotonic() - started < 30  # a second or two


@pytest.mark.parametrize("content", ['{"a": "' + '\\"' * 300_000, "/*" * 300_000, "[" * 20_000, '{"a": ' * 20_000])
def test_damaged_json_is_told_at_once(tmp_path: Path, content: str) -> None:
    started = time.monotonic()
    assert len(problems(tmp_path, content, "s.json")) == 1
    assert time.monotonic() - started < 30


def test_half_a_character_is_told(tmp_path: Path) -> None:
    assert "half of a character" in "\n".join(problems(tmp_path, '{"story_name": "a\\ud800"}', "s.json"))


def test_a_long_story_is_read_in_no_time(tmp_path: Path) -> None:
    path = write(tmp_path, story_of("".join(f"      - {{prompt: Shot {k}.}}\n" for k in range(4999))))
    started = time.monotonic()
    assert len(load_story(path).shots) == 4999
    assert time.monotonic() - started < 20


def test_what_is_no_regular_file_is_told_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "gone.yaml").symlink_to("nowhere")
    for name, told in (("fifo", "not a regular file"), ("zero", "not a regular file"), ("gone", "a link to nothing")):
        with pytest.raises(StoryError, match=rf"{name}\.yaml.* is {told}"):
            load_story(tmp_path / f"{name}.yaml")
    assert "not a regular file" in shot_problem(tmp_path, "{prompt: a, references: [fifo.png]}")


def test_invisible_line_separators_do_not_break_lines(tmp_path: Path) -> None:
    text = f"{HEAD}      - prompt: Tam\u2028climbs\u0085and looks.\n        frames: 80\n"
    assert problem(tmp_path, text).startswith(f"story.yaml:{SHOT_LINE + 1}: shot 1 (scene 1, shot 1): frames is 80")
    story = load_story(write(tmp_path, text.replace("80", "81")))
    assert story.shots[0].prompt == "Tam climbs and looks."


# Several stories


def test_stories_whose_films_would_share_a_folder_are_refused(tmp_path: Path) -> None:
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


def test_hidden_files_of_a_folder_are_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


@pytest.mark.parametrize("frames", [80, 1, 99999999997, 6])
def test_the_advice_for_frames_works(tmp_path: Path, frames: int) -> None:
    told = shot_problem(tmp_path, f"{{prompt: a, frames: {frames}}}")
    advice = re.search(r"write (frames: \d+)", told)
    assert advice is not None
    load_story(write(tmp_path, f"{HEAD}      - {{prompt: a, {advice[1]}}}\n"))
