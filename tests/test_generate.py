"""From a configuration to films: which stories, where they go, and what a film records of how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from storymem.config import build_settings
from storymem.film.folder import Film, differences
from storymem.film.generate import _recorded, build_storyteller, generate
from storymem.film.settings import GenerateSettings
from tests.composing import composed

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
    return generate(composed(f"story={story}", "model=tiny", "sampler.steps=1", "runtime=cpu", *overrides))


def test_several_stories_are_several_films_in_one_folder(two_stories: Path) -> None:
    films = several("output=out")
    assert [film.folder for film in films] == [Path("out/red"), Path("out/blue")]
    assert all(len(film.shots) == 2 and film.video is not None for film in films)


def test_a_folder_stands_for_its_stories(two_stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert several("dry_run=true", story="stories") == []
    said = capsys.readouterr().out
    assert said.index("films/blue") < said.index("films/red")
    assert [path.name for path in two_stories.iterdir()] == ["stories"]


def test_all_stories_are_checked_before_the_first_is_filmed(two_stories: Path) -> None:
    for name in ("Green", "Grey"):
        (two_stories / "stories" / f"{name}.yaml").write_text(f"title: {name}\nscenes: 3\n")
    with pytest.raises(ValueError, match=r"(?s)Green\.yaml.*Grey\.yaml"):
        several(story="stories")
    (two_stories / "stories" / "Green.yaml").write_text(TWO.format(title="Red"))
    (two_stories / "stories" / "Grey.yaml").unlink()
    with pytest.raises(ValueError, match=r"two stories are called red \(.*Green.yaml, .*Red.yaml\)"):
        several(story="stories")
    with pytest.raises(ValueError, match=r"resume=from_shot:2 is for one story, and 2 were named"):
        several("resume=from_shot:2")
    with pytest.raises(ValueError, match="no story was named"):
        several(story="[]")
    assert not (two_stories / "films").exists()


def test_there_must_be_a_film_for_every_team(two_stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="lets 3 films be made at once, and the stories are 2"):
        several("runtime.processes_per_film=1", "dry_run=true")


def recorded(*overrides: str) -> dict[str, Any]:
    return _recorded(composed("story=s.yaml", *overrides))


def test_where_a_film_is_computed_is_not_recorded() -> None:
    made = recorded()
    assert made == recorded("runtime.device=cpu", "runtime.threads=3", "runtime.compile=blocks", "output=elsewhere")
    assert "runtime" not in made
    assert made["model"]["name"] == "toy"


@pytest.mark.parametrize(
    "override", ["runtime.precision=int8", "runtime.cache=taylor", "runtime.attention=sage", "sampler.steps=3"]
)
def test_what_changes_the_picture_is_recorded(override: str) -> None:
    assert recorded(override) != recorded()


def test_other_weights_under_the_same_name_are_another_film(tmp_path: Path) -> None:
    file = tmp_path / "model" / "transformer" / "weights.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"old")

    def config() -> Mapping[str, Any]:
        made = composed("story=s.yaml", f"model.weights.source={tmp_path / 'model'}")
        return build_storyteller(build_settings(GenerateSettings, made), made).config

    before = config()
    (tmp_path / "model" / "README.md").write_text("says more")
    assert config() == before
    file.write_bytes(b"new")
    (line,) = differences(before, config())
    assert line.startswith("weights.toy models: ")
