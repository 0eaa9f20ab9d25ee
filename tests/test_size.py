"""The size of a film: aspect=9:16, size=480x832."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from storymem.config import ConfigError
from storymem.film.folder import Film
from storymem.film.generate import generate_films
from storymem.film.manifest import FilmError
from storymem.media.video import probe
from storymem.story import StoryError
from storymem.wan.spec import SPECS, TRAINED_SIZES, ModelSpec
from tests.composing import SMALL, composed, generate_settings
from tests.stories import TWO_SHOTS, story


def size(*overrides: str) -> str:
    video = generate_settings(*overrides).model.video
    return f"{video.width}x{video.height}"


@pytest.mark.parametrize(
    ("model", "aspect", "expected"),
    [
        *(("wan2.2-a14b", "9:16", "480x832"), ("wan2.2-a14b", "16:9", "832x480"), ("wan2.2-a14b", "1:1", "624x624")),
        *(("wan2.2-ti2v-5b", "16:9", "1280x704"), ("wan2.2-ti2v-5b", "9:16", "704x1280"), ("toy", "9:16", "64x96")),
    ],
)
def test_an_aspect_at_the_models_usual_number_of_pixels(model: str, aspect: str, expected: str) -> None:
    assert size(f"model={model}", f"aspect='{aspect}'") == expected
    assert expected in TRAINED_SIZES[model] or aspect == "1:1" or model == "toy"
    assert size(f"model={model}", f"size={expected}") == expected
    width, height = expected.split("x")
    shaped = (f"model.video.width={width}", f"model.video.height={height}", f"aspect='{aspect}'")
    assert size(f"model={model}", *shaped) == expected, "of its own result an aspect makes the same"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("aspect", [1 / 8, 9 / 16, 1, 2.39, 8])
def test_the_nearest_size_fits_the_model_and_its_pixels(spec: ModelSpec, aspect: float) -> None:
    height, width = spec.nearest_size(aspect, 480 * 832)
    spec.latent_size(height, width)
    assert 0.85 * 480 * 832 < height * width <= 480 * 832
    assert abs(math.log(width / height / aspect)) < 0.1


@pytest.mark.parametrize(
    ("override", "cure"),
    [
        *((f"aspect='{text}'", "write width:height, such as 16:9 or") for text in ("9x16", "0:1", "1:9", "²:1")),
        ("size=480*832", "write WIDTHxHEIGHT in pixels, such as 832x480 or 480x832"),
        ("size=500x830", "width and height must be multiples of 16; write size=496x832"),
        ("size=0x16", "width and height must be multiples of 16; write size=16x16"),
        ("size=16000x16", "width must be 8192 or less, not 16000"),
    ],
)
def test_other_sizes_are_refused_with_what_to_write(override: str, cure: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(cure)):
        generate_settings(override)


def test_aspect_and_size_exclude_each_other_and_yaml_needs_quotes() -> None:
    with pytest.raises(ConfigError, match="aspect=1:1 and size=96x64 exclude each other"):
        generate_settings("aspect='1:1'", "size=96x64")
    read = OmegaConf.create("aspect: 9:16")["aspect"]
    with pytest.raises(ConfigError, match='aspect: write it in quotes: "9:16"'):
        generate_settings(f"aspect={read}")


def test_a_story_has_no_aspect(tmp_path: Path) -> None:
    with pytest.raises(StoryError, match=r"unknown key aspect; .*; remove it, and add aspect=9:16 to the command"):
        story(tmp_path, f"aspect: 9:16\n{TWO_SHOTS}")


def test_a_film_of_an_aspect_is_planned_made_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = story(tmp_path, TWO_SHOTS).source
    config = composed(f"story={source}", f"output={tmp_path / 'film'}", *SMALL, "model.name=toy", "aspect='9:16'")
    generate_films(config | {"dry_run": True})
    plan = capsys.readouterr().out
    assert "Two: 2 shots in 1 scene, 32x48," in plan
    assert "size     32x48 for aspect=9:16, 19 % wider, in multiples of 16" in plan
    assert "note     toy was trained at 96x64: 32x48 may look worse" in plan
    (film,) = generate_films(config)
    assert film.video is not None
    made = [probe(path) for path in (film.video, film.folder / film.shots[1].file)]
    assert {(info.width, info.height) for info in made} == {(32, 48)}
    for dry in (True, False):
        with pytest.raises(FilmError, match=r"model\.video\.height: 48 before, 32 now") as error:
            generate_films(config | {"aspect": None, "dry_run": dry})
    advice = str(error.value).partition("add to the command:\n")[2]
    assert re.findall(r"^  (\S+=\S+(?: \S+=\S+)?)  to", advice, re.MULTILINE) == [
        *("resume=from_shot:1", "output=FOLDER", "aspect=null size=32x48")
    ]
    generate_films(config | {"aspect": None, "size": "32x48"})
    assert Film.open(film.folder).shots == film.shots, "nothing is made again"
