"""Tables say what was measured, beside the published rows, and never more."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest

from storymem.evaluation.metric import Column, Scores
from storymem.evaluation.results import PUBLISHED, Results, Summary, summarise, summary_of
from storymem.evaluation.scoring import ShotResult, StoryResult
from storymem.evaluation.statistics import StatisticsSettings
from storymem.evaluation.tables import csv_lines, latex, markdown, mean_and_interval, number, results_json

COLUMNS = (
    Column(name="consistency_overall", title="Cross-shot consistency, overall", heading="Consist., overall"),
    Column(name="cut_accuracy", title="Shot-cut accuracy", heading="Cuts"),
)


def result(title: str, value: float | None, *, undefined: bool = False) -> StoryResult:
    shot = ShotResult(
        index=0,
        label="shot 1 (scene 1, shot 1)",
        prompt="A dog.",
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
    return summarise(
        systems,
        metrics={
            "m": {
                "version": 1,
                "weights": weights,
                "columns": [column.name for column in COLUMNS],
                "weights_sha256": "f" * 64,
            }
        },
        columns=COLUMNS,
        settings=StatisticsSettings(resamples=200),
        stories={"folder": "s", "titles": [one.title for one in next(iter(systems.values()))]},
        systems={name: {} for name in systems},
    )


@pytest.fixture
def two() -> Results:
    return results(
        plain_shots=[result("A", 0.40), result("B", 0.42), result("C", 0.44)],
        StoryMem=[result("A", 0.50), result("B", None), result("C", 0.54)],
    )


def test_a_mean_needs_all_its_stories(two: Results) -> None:
    whole, holed = two.summaries["plain_shots"]["consistency_overall"], two.summaries["StoryMem"]["consistency_overall"]
    assert whole.mean == pytest.approx(0.42)
    assert holed.mean is None
    assert holed.mean_of_complete == pytest.approx(0.52)
    assert (holed.complete, holed.expected, holed.lacking) == (2, 3, {"B": "missing: shot 1"})


def test_stories_that_do_not_have_a_column_do_not_count() -> None:
    found = summary_of([result("A", 0.4, undefined=True), result("B", 0.5)], "cut_accuracy", StatisticsSettings())
    assert (found.mean, found.complete, found.expected) == (1.0, 1, 1)


def test_comparisons_are_of_the_stories_that_both_have(two: Results) -> None:
    found = two.comparisons["plain_shots", "StoryMem"]["consistency_overall"]
    assert found is not None
    assert (found.stories, found.wins) == (2, 2)
    assert found.difference == pytest.approx(0.10)
    assert found.relative == pytest.approx(0.10 / 0.42)


def test_markdown(two: Results) -> None:
    text = markdown(two)
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table[: 4 + len(PUBLISHED)]}) == 1
    assert "| **plain_shots** | .4200 [" in text
    assert "| **StoryMem** | – (.5200 of 2/3) | 1.0000" in text
    assert "| StoryMem † | .5065 | – |" in text
    assert "published numbers: the paper's own films, stories and weights" in text
    assert "+23.8 %" in text
    assert "- B, shot 1 (scene 1, shot 1): it is gone" in text
    assert "weights_sha256 ffffffffffff" in text


def test_latex(two: Results) -> None:
    text = latex(two)
    rows = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert {row.count("&") for row in rows} == {2}
    assert "plain\\_shots & .4200 & 1.0000" in text
    assert "{\\scriptsize (.5200 of 2/3)}" in text
    assert "HoloCine$^\\dagger$ & .4631 & -- \\\\" in text
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize("weights", ["own", "untrained"])
def test_published_rows_stand_beside_values_of_the_papers_scorers_only(weights: str) -> None:
    found = results(weights, one=[result("A", 0.4)])
    for text in (markdown(found), latex(found), results_json(found)):
        assert "HoloCine" not in text
        assert ".4631" not in text
        assert ("UNTRAINED SCORERS (m): these numbers mean nothing" in text) == (
            weights == "untrained" and text[0] != "{"
        )
    assert json.loads(results_json(found))["untrained"] == (["m"] if weights == "untrained" else [])
    lines = list(csv.DictReader(io.StringIO(csv_lines(found))))
    assert {line["weights"] for line in lines} == {weights}


def test_values_that_are_no_numbers_have_a_reason_everywhere() -> None:
    one = replace(result("A", None), faults=("m: consistency_overall is not a finite number",))
    found = results(one=[replace(one, shots=(replace(one.shots[0], missing=None),))])
    assert "- A: m: consistency_overall is not a finite number" in markdown(found)
    written = json.loads(results_json(found))["systems"]["one"]
    assert written["not_finite"] == ["A: m: consistency_overall is not a finite number"]
    assert written["columns"]["consistency_overall"]["mean"] is None
    (line, _) = csv.DictReader(io.StringIO(csv_lines(found)))
    assert (line["value"], line["reason"]) == ("", "missing: shot 1")


def test_numbers_are_printed_as_the_paper_prints_them() -> None:
    assert [number(value) for value in (0.50654, -0.0031, 1.0, 0.99996, None)] == [
        ".5065",
        "-.0031",
        "1.0000",
        "1.0000",
        "–",
    ]
    empty = Summary(mean=None, interval=None, mean_of_complete=None, complete=0, expected=2, lacking={})
    assert mean_and_interval(empty) == ("–", "")
    assert mean_and_interval(replace(empty, mean=0.5, mean_of_complete=0.5, interval=(0.4, 0.6))) == (
        ".5000",
        "[.4000, .6000]",
    )


def test_published_rows_are_the_papers() -> None:
    gain = PUBLISHED["StoryMem"][3] / PUBLISHED["Wan2.2, independent shots"][3] - 1
    assert gain == pytest.approx(0.287, abs=5e-4), "the gain that the paper states"
    assert len(PUBLISHED) == 8
