"""Panels of one image: windows over long stories, images of FLUX and of the base model, given panels, seams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storymem.methods.in_context import FluxPanels, InContext, chained_windows, cut_panels, weak_seams, windows
from storymem.methods.keyframes import make_images
from storymem.story import Story, load_story
from storymem.wan.settings import RuntimeSettings
from tests.evaluation.test_methods import generate
from tests.methods import tiny

SETTINGS: dict[str, Any] = {
    "weights": {"name": "FLUX", "source": "x/y"},
    "lora": {"name": "LoRA", "source": "x/z"},
    "steps": 2,
    "height": 32,
    "width": 64,
}


@pytest.fixture
def story(tmp_path: Path) -> Story:
    who = ["ann", "bob", "ann", "bob", "ann"]
    shots = "".join(f"      - {{prompt: {name} runs {n}., characters: [{name}]}}\n" for n, name in enumerate(who))
    (tmp_path / "s.yaml").write_text(
        "title: T\noverview: ann and bob run.\nstyle: ink.\n"
        "characters: [{name: ann, description: a fox.}, {name: bob, description: a hen}]\n"
        f"scenes:\n  - shots:\n{shots}"
    )
    return load_story(tmp_path / "s.yaml")


def maker(tmp_path: Path, **changed: Any) -> InContext:
    method = InContext(generate=generate(), in_context={**SETTINGS, **changed})
    method.painter = FluxPanels(method.in_context, RuntimeSettings(device="cpu"), pipe=tiny.flux(tmp_path))
    return method


def test_windows_over_a_story(story: Story) -> None:
    assert [(w.shots, w.new) for w in windows(10)][2:] == [((6, 7, 8), (6, 7, 8)), ((7, 8, 9), (9,))]
    assert windows(2)[0][:2] == ((0, 1, 1), (0, 1))
    assert [w[:2] for w in windows(4)] == [((0, 1, 2), (0, 1, 2)), ((1, 2, 3), (3,))]
    assert chained_windows(story)[1] == ((0, 3, 4), (3, 4), True), "the first of those with most of the characters"


def test_the_prompt_describes_all_characters_of_the_story(story: Story, tmp_path: Path) -> None:
    plan = maker(tmp_path).plan(story, tmp_path)
    assert plan[1].recipe["prompt"] == (
        "[MOVIE-SHOTS] ink. <ann> and <bob> run. <ann>: a fox. <bob>: a hen. [SCENE-1] <ann> runs 2. "
        "[SCENE-2] <bob> runs 3. [SCENE-3] <ann> runs 4."
    )
    assert [group.names for group in plan] == [("01_01", "01_02", "01_03"), ("01_04", "01_05")]


def test_images_of_flux_are_kept_and_a_given_panel_is_kept_in_the_image(story: Story, tmp_path: Path) -> None:
    film = tmp_path / "film"
    film.mkdir()
    size: dict[str, Any] = {"height": 32, "width": 48, "settings": {}}
    chained = maker(tmp_path, chained=True)
    make_images(chained, story, film, **size)
    images = sorted((film / "keyframe_images").iterdir())
    assert [path.name for path in images] == [f"01_0{n}.png" for n in range(1, 6)]
    content = [path.read_bytes() for path in images]
    chained = maker(tmp_path, chained=True)
    images[4].unlink()
    make_images(chained, story, film, **size)
    assert [path.read_bytes() for path in images] == content, "the missing image is the same"
    given = (np.random.default_rng(0).random((32, 64, 3)) * 255).astype(np.uint8)
    chained = maker(tmp_path)
    made = [chained.painter.panels("x", given, seed) for seed in (1, 2)]
    difference = [np.abs(one.astype(int) - two).mean() for one, two in zip(*made, strict=True)]
    assert difference[0] < 0.3 * difference[1], "only the others change with the noise"
    chained.painter.free()
    with pytest.raises(FileNotFoundError, match="FLUX: x/y is not in the local"):
        chained.check(story)


def test_panels_are_cut_at_the_seams() -> None:
    image = np.repeat(np.arange(3, dtype=np.uint8)[:, None, None] * 60, 100, axis=0).repeat(20, 1).repeat(3, 2)
    image = image + np.random.default_rng(0).integers(0, 6, image.shape, dtype=np.uint8)
    assert [panel.shape for panel in cut_panels(image, 0.02)] == [(98, 20, 3), (96, 20, 3), (98, 20, 3)]
    assert weak_seams(image) == []
    image[100:200] = image[:100]
    assert weak_seams(image) == [100]
