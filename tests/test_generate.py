"""From settings to films: which stories, their folders and modes, what a film records, policies of the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storymem.commands.cli import main
from storymem.config import build_settings
from storymem.film.differences import differences
from storymem.film.folder import Film
from storymem.film.generate import build_storyteller, generate, generate_films, recorded_config
from storymem.film.settings import GIVEN_FRAMES, GenerateSettings, check_lengths, mode_of
from storymem.story import Character, Scene, Shot, Story, load_story
from tests.composing import SMALL, composed

TWO = """\
title: {title}
overview: A boat.
scenes:
  - shots:
      - prompt: A boat.
      - prompt: A boat at night.
"""


@pytest.fixture
def two_stories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder ``stories`` with a red and a blue one, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stories").mkdir()
    for title in ("Red", "Blue"):
        (tmp_path / "stories" / f"{title}.yaml").write_text(TWO.format(title=title))
    return tmp_path


def several(*overrides: str, story: str = "[stories/Red.yaml,stories/Blue.yaml]") -> list[Film]:
    return generate_films(composed(f"story={story}", *SMALL, *overrides))


def test_several_stories_are_several_films_in_one_folder(two_stories: Path) -> None:
    films = several("output=out")
    assert [film.folder for film in films] == [Path("out/red"), Path("out/blue")]
    assert all(len(film.shots) == 2 and film.video is not None for film in films)


def test_a_folder_means_all_its_stories(two_stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert several("dry_run=true", story="stories") == []
    printed = capsys.readouterr().out
    assert printed.index("films/blue") < printed.index("films/red")
    assert [path.name for path in two_stories.iterdir()] == ["stories"]


def test_all_stories_are_checked_before_the_first_film_is_generated(two_stories: Path) -> None:
    for name in ("Green", "Grey"):
        (two_stories / "stories" / f"{name}.yaml").write_text(f"title: {name}\nscenes: 3\n")
    with pytest.raises(ValueError, match=r"(?s)Green\.yaml.*Grey\.yaml"):
        several(story="stories")
    (two_stories / "stories" / "Green.yaml").write_text(TWO.format(title="Red"))
    (two_stories / "stories" / "Grey.yaml").unlink()
    with pytest.raises(ValueError, match=r"two stories are called red \(.*Green.yaml, .*Red.yaml\)"):
        several(story="stories")
    with pytest.raises(ValueError, match="resume=from_shot:2 is for one story, not for 2"):
        several("resume=from_shot:2")
    with pytest.raises(ValueError, match="no story is given"):
        several(story="[]")
    assert not (two_stories / "films").exists()


def test_there_must_be_a_film_for_every_team(two_stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="makes 3 films at once, and there are 2 stories"):
        several("runtime.processes_per_film=1", "dry_run=true")


def test_a_film_is_generated_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "red.yaml"
    text.write_text(TWO.format(title="Red"))
    film = generate(text, model="tiny", output=tmp_path / "film", overrides=SMALL[1:], progress=False)
    assert (len(film.shots), film.video) == (2, tmp_path / "film" / "film.mp4")
    again = generate(load_story(text), model="tiny", output=tmp_path / "film", overrides=SMALL[1:], progress=False)
    assert again.shots == film.shots
    choice = [*SMALL[1:], "shot=1", "take=1"]
    generate(text, model="tiny", output=tmp_path / "film", overrides=choice, progress=False)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match=r"sampler\.step: unknown key; did you mean 'steps'"):
        generate(text, overrides=["+sampler.step=3"])


POLICY = """
from dataclasses import dataclass

@dataclass
class Newest:
    most: int

    @property
    def capacity(self):
        return self.most

    def recall(self, keyframes, shot):
        return keyframes[-self.most:]

class Unfinished:
    def recall(self, keyframes, shot):
        return keyframes
"""


def test_a_policy_replaces_another_and_inherits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(POLICY)
    (tmp_path / "conf" / "memory" / "recall").mkdir(parents=True)
    (tmp_path / "conf" / "memory" / "recall" / "mine.yaml").write_text("_target_: mine.Newest\nmost: 2\n")
    (tmp_path / "story.yaml").write_text(TWO.format(title="Red"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def dry_run(*choice: str) -> str:
        monkeypatch.setattr("sys.argv", ["storymem", "story.yaml", "dry_run=true", *choice])
        main("generate")
        return capsys.readouterr().out.split("\n\n")[1].splitlines()[-1]

    for choice in (["memory.recall={_target_: mine.Newest, most: 2}"], ["--config-dir=conf", "memory/recall=mine"]):
        assert dry_run(*choice).split()[4] == "2", "keyframes of the second shot"
    with pytest.raises(SystemExit):
        dry_run("memory.recall._target_=mine.Unfinished")
    assert "memory.recall: mine.Unfinished has no capacity; see docs/extending.md" in capsys.readouterr().err


def recorded(*overrides: str) -> dict[str, Any]:
    return recorded_config(composed("story=s.yaml", *overrides))


def test_where_a_film_is_computed_is_not_recorded() -> None:
    made = recorded()
    assert made == recorded("runtime.device=cpu", "runtime.threads=3", "runtime.compile=blocks", "output=elsewhere")
    assert "runtime" not in made
    assert made["model"]["name"] == "toy"


@pytest.mark.parametrize(
    "override", ["runtime.precision=fp8_storage", "runtime.cache=taylor", "runtime.attention=sage", "sampler.steps=3"]
)
def test_runtime_settings_that_change_the_film_are_recorded(override: str) -> None:
    assert recorded(override) != recorded()


def test_other_weights_under_the_same_name_are_another_film(tmp_path: Path) -> None:
    file = tmp_path / "model" / "transformer" / "weights.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"old")

    def config() -> Mapping[str, Any]:
        made = composed("story=s.yaml", f"model.weights.source={tmp_path / 'model'}")
        return build_storyteller(build_settings(GenerateSettings, made), made).config

    before = config()
    (tmp_path / "model" / "README.md").write_text("a longer text")
    assert config() == before
    file.write_bytes(b"new")
    (line,) = differences(before, config())
    assert line.startswith("weights.toy models: ")


# How each shot is made


def moving(*, references: bool = False, shot_references: bool = False) -> Story:
    images = (Path("a.png"),)
    shots = tuple(
        Shot(
            prompt="A dog.",
            cut=cut,
            scene=1,
            number=index + 1,
            index=index,
            references=images if shot_references and index == 0 else (),
        )
        for index, cut in enumerate([True, False, True])
    )
    dog = Character(name="Dog", references=images if references else ())
    return Story(title="t", overview="o", characters=(dog,), scenes=(Scene(number=1, shots=shots),))


def modes(story: Story, continuity: str = "mi2v", first_shot: str = "auto") -> list[str]:
    return [mode_of(shot, story, continuity=continuity, first_shot=first_shot) for shot in story.shots]


@pytest.mark.parametrize(
    ("continuity", "expected"),
    [("none", ["t2v", "m2v", "m2v"]), ("mi2v", ["t2v", "mi2v", "m2v"]), ("mm2v", ["t2v", "mm2v", "m2v"])],
)
def test_only_shots_that_continue_are_given_frames(continuity: str, expected: list[str]) -> None:
    assert modes(moving(), continuity) == expected


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
    loaded = moving(references=references, shot_references=shot_references)
    assert modes(loaded, first_shot=first_shot) == [expected, "mi2v", "m2v"]


def test_given_frames_are_those_of_the_paper() -> None:
    assert GIVEN_FRAMES == {"t2v": 0, "i2v": 0, "m2v": 0, "mi2v": 1, "mm2v": 5}


def test_every_shot_too_short_is_named() -> None:
    """Two shots of five frames: enough after one given frame, too few after five."""
    loaded = moving()
    shots = tuple(replace(shot, frames=5) for shot in loaded.shots)
    short = replace(loaded, scenes=(replace(loaded.scenes[0], shots=shots),))
    check_lengths(short, frames=9, continuity="mi2v", first_shot="auto")
    with pytest.raises(ValueError, match=r"shot 2 \(scene 1, shot 2\) has 5 frames.*mm2v.*at least 9") as error:
        check_lengths(short, frames=9, continuity="mm2v", first_shot="auto")
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match=r"(?s)shot 1 .*shot 2 .*shot 3 ") as error:
        check_lengths(loaded, frames=1, continuity="none", first_shot="auto")
    assert len(str(error.value).splitlines()) == 3
