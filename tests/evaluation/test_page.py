"""The page: everything in one file, drawn by a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storymem.evaluation.plots import Mark, Scale, interval_plot, matrix, story_plot
from storymem.evaluation.stbench import evaluate
from storymem.media.video import write_video
from tests.composing import composed
from tests.evaluation import small

COLOURS = ((200, 30, 40), (30, 160, 60), (40, 60, 200))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two systems; of the second a shot is missing. The first shows plain colours."""
    folder = tmp_path_factory.mktemp("page")
    told = small.stories(folder / "stories")
    for system in ("one", "two"):
        small.write_films(folder / system, told)
    for shot, colour in zip(told[0].shots, COLOURS, strict=True):
        frames = np.broadcast_to(np.array(colour, np.uint8), (9, 32, 48, 3))
        write_video(folder / "one" / "the_red_boat" / f"{shot.scene:02d}_{shot.number:02d}.mp4", frames, 8)
    (folder / "two" / "a_cat" / "01_02.mp4").unlink()
    films = f"films={{one: {folder}/one, two: {folder}/two}}"
    where = (f"stbench.stories={folder}/stories", f"output={folder}/out", "metrics=[tiny]")
    evaluate(composed(*where, films, name="eval_stbench"))
    return folder / "out" / "index.html"


class _Tags(HTMLParser):
    """Every tag that is opened must be closed in order."""

    void = ("meta", "img", "br", "line", "rect", "circle")
    optional = ("html",)

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.void and tag not in self.optional:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag == "rect":  # those with a title
            return
        if tag not in self.void and tag not in self.optional:
            assert self.open.pop() == tag, self.getpos()


def test_the_page_is_whole_and_refers_to_nothing_outside(page: Path) -> None:
    text = page.read_text()
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.links
    assert all(link.startswith("data:image/jpeg;base64,") for link in tags.links)
    assert "<script" not in text
    assert not re.search(r"url\(|@import|https?://", text)


def test_the_page_shows_what_is_in_the_results(page: Path) -> None:
    text = page.read_text()
    assert text.count("<svg") == 7 + 7 + 4, "an interval plot and a plot of stories a column, a matrix a film"
    assert "two: 1 missing shots" in text
    assert "A Cat, shot 2 (scene 1, shot 2): there is no file 01_02.mp4" in text
    assert "<p class=banner>⚠ UNTRAINED SCORERS (aesthetic, viclip, identity)" in text
    assert ".banner { background: #b3261e" in text, "red"
    assert "†" not in text, "nothing of the paper stands beside them"
    assert "Pairs that pulled the score down" in text
    assert "Ada" in text
    assert text.count("data:image/jpeg") >= 9


@pytest.mark.slow
def test_a_browser_opens_it_from_disk(page: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --hide-scrollbars --force-color-profile=srgb"
    picture = tmp_path / "page.png"
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path}/profile", f"--screenshot={picture}"]
    alone = tmp_path / "elsewhere" / "sent.html"
    alone.parent.mkdir()
    shutil.copy(page, alone)
    subprocess.run([*command, "--window-size=1300,3000", alone.as_uri()], check=True, capture_output=True, timeout=120)
    shown = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    for colour in COLOURS:
        assert (np.abs(shown - colour).max(axis=-1) < 12).sum() > 10_000, "the strips of the first film are drawn"
    assert (np.abs(shown - (0, 114, 178)).max(axis=-1) < 12).sum() > 100, "and the dots of the first system"


def test_plots_put_larger_values_further_right() -> None:
    scale = Scale([0.2, 0.4], left=100, right=200)
    assert 100 < scale(0.2) < scale(0.3) < scale(0.4) < 200
    drawn = interval_plot([Mark(name="a", value=0.2, interval=(0.1, 0.3)), Mark(name="b", value=None)], label="x")
    assert drawn.count("<circle") == 1
    assert "no value" in drawn
    assert interval_plot([Mark(name="a", value=None)], label="x").count("<circle") == 0
    assert interval_plot([Mark(name="a", value=0.0)], label="x").count("<circle") == 1


def test_a_plot_of_stories_says_where_a_system_is_missing() -> None:
    drawn = story_plot(["A", "B"], {"one": [0.1, 0.2], "two": [0.3, None]}, label="x")
    assert drawn.count("<circle") == 3
    assert "1 missing" in drawn


def test_a_matrix_is_darker_where_shots_are_more_alike() -> None:
    drawn = matrix([[None, 0.9, 0.1], [0.9, None, None], [0.1, None, None]], bounds=(0.1, 0.9), label="x")
    assert drawn.count("rgb(8,69,148)") == drawn.count("rgb(237,244,252)") == 2
    assert drawn.count("class=absent") == 2
    assert "shots 1 and 2: 0.9000" in drawn
