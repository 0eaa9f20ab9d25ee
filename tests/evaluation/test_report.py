"""Tables and page: what was measured, the paper's rows only beside the paper's scorers, everything escaped."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from storymem.evaluation.metric import Column, Scores
from storymem.evaluation.report import mean_and_interval, number, write_report
from storymem.evaluation.results import PUBLISHED, Results, Summary, summarise
from storymem.evaluation.scoring import ShotResult, StoryResult
from storymem.evaluation.statistics import StatisticsSettings
from storymem.evaluation.stbench import evaluate
from storymem.media.video import write_video
from tests.composing import composed
from tests.evaluation import small

COLUMNS = (
    Column(name="consistency_overall", title="Cross-shot consistency, overall", heading="Consist., overall"),
    Column(name="cut_accuracy", title="Shot-cut accuracy", heading="Cuts"),
)
COLOURS = ((200, 30, 40), (30, 160, 60), (40, 60, 200))


def result(title: str, value: float | None, *, undefined: bool = False, prompt: str = "A dog.") -> StoryResult:
    shot = ShotResult(
        number=1,
        label="shot 1 (scene 1, shot 1)",
        prompt=prompt,
        characters=(),
        cut=True,
        file=None,
        sha256=None,
        frames=None,
        missing="it is gone" if value is None else None,
    )
    scores = Scores(
        columns={"consistency_overall": value, "cut_accuracy": None if undefined else 1.0},
        reasons={"consistency_overall": "missing: shot 1"} if value is None else {},
        undefined=("cut_accuracy",) if undefined else (),
    )
    return StoryResult(key="k", title=title, slug=title.lower(), style=None, shots=(shot,), scores={"m": scores})


def results(weights: str = "published", **systems: list[StoryResult]) -> Results:
    columns = [column.name for column in COLUMNS]
    return Results(
        columns=COLUMNS,
        stories={name: tuple(found) for name, found in systems.items()},
        metrics={"m": {"version": 1, "weights": weights, "columns": columns, "weights_sha256": "f" * 64}},
        statistics=StatisticsSettings(resamples=200),
        benchmark={"folder": "s", "titles": [one.title for one in next(iter(systems.values()))]},
        systems={name: {} for name in systems},
    )


@pytest.fixture
def two() -> Results:
    return results(
        plain_shots=[result("A", 0.40), result("B", 0.42), result("C", 0.44)],
        StoryMem=[result("A", 0.50), result("B", None), result("C", 0.54)],
    )


def test_a_mean_needs_all_stories_that_define_the_column(two: Results) -> None:
    whole, partial = (two.summaries[name]["consistency_overall"] for name in ("plain_shots", "StoryMem"))
    assert whole.mean == pytest.approx(0.42)
    assert partial.mean is None
    assert partial.mean_of_complete == pytest.approx(0.52)
    assert (partial.complete, partial.expected, partial.lacking) == (2, 3, {"B": "missing: shot 1"})
    found = summarise([result("A", 0.4, undefined=True), result("B", 0.5)], "cut_accuracy", StatisticsSettings())
    assert (found.mean, found.complete, found.expected) == (1.0, 1, 1)


def test_comparisons_are_over_the_stories_that_both_have(two: Results) -> None:
    found = two.comparisons["plain_shots", "StoryMem"]["consistency_overall"]
    assert found is not None
    assert (found.stories, found.wins) == (2, 2)
    assert found.difference == pytest.approx(0.10)
    assert found.relative == pytest.approx(0.10 / 0.42)


def test_all_systems_are_compared_with_the_first_and_with_storymem() -> None:
    found = results(**{name: [result("A", 0.4)] for name in ("base", "other", "storymem", "ablation", "more")})
    assert [*found.comparisons] == [
        *(("base", name) for name in ("other", "storymem", "ablation", "more")),
        ("other", "storymem"),
        *(("storymem", name) for name in ("ablation", "more")),
    ]


def test_tables(two: Results, tmp_path: Path) -> None:
    text = write_report(two, tmp_path)
    assert text == (tmp_path / "results.md").read_text()
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables[: 4 + len(PUBLISHED)]}) == 1
    assert "| plain_shots | .4200 [" in text
    assert "| StoryMem | – (.5200 of 2/3) | 1.0000" in text
    assert "| StoryMem † | .5065 | – |" in text
    assert "published numbers: the paper's own films, stories and weights" in text
    assert "+23.8 %" in text
    assert "- B, shot 1 (scene 1, shot 1): it is gone" in text
    assert "weights_sha256 ffffffffffff" in text
    latex = (tmp_path / "results.tex").read_text()
    assert {line.count("&") for line in latex.splitlines() if line.endswith("\\\\")} == {2}
    assert "plain\\_shots & .4200 [" in latex
    assert "StoryMem & -- (.5200 of 2/3)" in latex
    assert "HoloCine $^\\dagger$ & .4631 & -- \\\\" in latex
    assert latex.count("{") == latex.count("}")


def test_a_single_story_has_neither_intervals_nor_tests(tmp_path: Path) -> None:
    text = write_report(results("own", one=[result("A", 0.4)], two=[result("A", 0.5)]), tmp_path)
    assert "|  | difference | relative | higher / lower |" in text
    assert not re.search("bootstrap|interval", text)


@pytest.mark.parametrize("weights", ["own", "untrained"])
def test_published_rows_stand_only_beside_the_papers_scorers(weights: str, tmp_path: Path) -> None:
    write_report(results(weights, one=[result("A", 0.4)]), tmp_path)
    for name in ("results.md", "results.tex", "results.json", "index.html"):
        text = (tmp_path / name).read_text()
        assert "HoloCine" not in text
        assert ".4631" not in text
        if name != "results.json":
            assert ("UNTRAINED SCORERS (m): these numbers mean nothing" in text) == (weights == "untrained")
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["untrained"] == (["m"] if weights == "untrained" else [])
    with (tmp_path / "results.csv").open() as file:
        assert {line["weights"] for line in csv.DictReader(file)} == {weights}


def test_values_that_are_not_finite_have_a_reason_everywhere(tmp_path: Path) -> None:
    one = replace(result("A", None), faults=("m: consistency_overall is not a finite number",))
    text = write_report(results(one=[replace(one, shots=(replace(one.shots[0], missing=None),))]), tmp_path)
    assert "- A: m: consistency_overall is not a finite number" in text
    written = json.loads((tmp_path / "results.json").read_text())["systems"]["one"]
    assert written["not_finite"] == ["A: m: consistency_overall is not a finite number"]
    assert written["columns"]["consistency_overall"]["mean"] is None
    with (tmp_path / "results.csv").open() as file:
        first = next(csv.DictReader(file))
    assert (first["value"], first["reason"]) == ("", "missing: shot 1")


def test_everything_is_escaped(tmp_path: Path) -> None:
    odd = "<script>alert(1)</script> 林 $x^$ & \"'"
    write_report(results(**{f"{odd}|_": [result(odd, 0.4, prompt=odd)]}), tmp_path)
    page, plots = (tmp_path / "index.html").read_text(), plots_of(tmp_path / "index.html")
    assert not re.search(r"<script", page + "".join(plots))
    assert any("&lt;script" in plot and "$x^$" in plot for plot in plots)
    assert "\\|\\_" in (tmp_path / "results.md").read_text().replace("|_", "|\\_")
    assert "\\$x\\textasciicircum{}\\$ \\&" in (tmp_path / "results.tex").read_text()


def test_numbers_are_printed_as_in_the_paper() -> None:
    values = (0.50654, -0.0031, 1.0, 0.99996, None)
    assert [number(value) for value in values] == [".5065", "-.0031", "1.0000", "1.0000", "–"]
    empty = Summary(mean=None, interval=None, mean_of_complete=None, complete=0, expected=2, lacking={})
    assert mean_and_interval(empty) == ("–", "")
    full = replace(empty, mean=0.5, mean_of_complete=0.5, interval=(0.4, 0.6))
    assert mean_and_interval(full) == (".5000", "[.4000, .6000]")
    gain = PUBLISHED["StoryMem"][3] / PUBLISHED["Wan2.2, independent shots"][3] - 1
    assert gain == pytest.approx(0.287, abs=5e-4), "the gain that the paper states"


# --- the page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two systems. The first shows plain colours; the second lacks a shot."""
    folder = tmp_path_factory.mktemp("page")
    stories = small.stories(folder / "stories")
    for system in ("one", "two"):
        small.write_films(folder / system, stories)
    for shot, colour in zip(stories[0].shots, COLOURS, strict=True):
        frames = np.broadcast_to(np.array(colour, np.uint8), (9, 32, 48, 3))
        write_video(folder / "one" / "the_red_boat" / f"{shot.scene:02d}_{shot.number:02d}.mp4", frames, 8)
    (folder / "two" / "a_cat" / "01_02.mp4").unlink()
    films = f"films={{one: {folder}/one, two: {folder}/two}}"
    where = (f"stbench.stories={folder}/stories", f"output={folder}/out", "metrics=[tiny]")
    evaluate(composed(*where, films, name="eval_stbench"))
    return folder / "out" / "index.html"


class _Tags(HTMLParser):
    """Checks that every tag is closed in order, and collects links."""

    void = ("!doctype", "meta", "img", "br", "html")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.open += [] if tag in self.void else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.void or self.open.pop() == tag, (tag, self.getpos())


def plots_of(page: Path) -> list[str]:
    """The SVG images of a page."""
    found = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page.read_text())
    return [base64.b64decode(content).decode() for content in found]


def test_the_page_is_complete_and_refers_to_nothing_outside_its_folder(page: Path) -> None:
    text, tags = page.read_text(), _Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.links
    shots = [link for link in tags.links if not link.startswith("data:image/svg")]
    assert len(set(shots)) == 9, "5 shots of one system, 4 of the other"
    assert all((page.parent / unquote(link)).is_file() for link in shots)
    assert not re.search(r"<script|url\(|@import|https?://", text)
    shown = json.loads((page.parent / "results.json").read_text())["systems"]["one"]["columns"].values()
    assert len(plots_of(page)) == 2 + sum(one["expected"] > 0 for one in shown), "means, gaps, and stories by column"
    assert "Not in the tables: References, Count, Copy margin (no character in a shot has reference images)" in text
    assert text.count("<table class=matrix>") == 4
    assert "two: 1 missing shots" in text
    assert "A Cat, shot 2 (scene 1, shot 2): there is no file 01_02.mp4" in text
    assert "<p class=banner>⚠ UNTRAINED SCORERS (aesthetic, viclip, identity, entities, references, joins)" in text
    assert "†" not in text, "nothing of the paper stands beside them"
    assert "Pairs of shots with the lowest similarity" in text
    assert "Ada" in text
    assert any("no value" in plot for plot in plots_of(page))
    assert any("1 missing" in plot for plot in plots_of(page))


@pytest.mark.slow
def test_a_browser_opens_it_from_disk(page: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --hide-scrollbars --force-color-profile=srgb"
    image = tmp_path / "page.png"
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path}/profile", f"--screenshot={image}"]
    copy = shutil.copytree(page.parent, tmp_path / "elsewhere") / page.name
    subprocess.run([*command, "--window-size=1300,3000", copy.as_uri()], check=True, capture_output=True, timeout=120)
    shown = np.asarray(Image.open(image).convert("RGB")).astype(int)
    for colour in COLOURS:
        assert (np.abs(shown - colour).max(axis=-1) < 12).sum() > 10_000, "the images of the first film are drawn"
    assert (np.abs(shown - (0, 114, 178)).max(axis=-1) < 12).sum() > 100, "and the dots of the first system"
