"""Results put together: means over stories with their intervals, comparisons of systems, and how all was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from storymem.evaluation.metric import Column
from storymem.evaluation.scoring import StoryResult
from storymem.evaluation.statistics import Comparison, StatisticsSettings, bootstrap_interval, compare
from storymem.film.folder import library_versions

PUBLISHED_COLUMNS = (
    "aesthetic_quality",
    "prompt_following_global",
    "prompt_following_shot",
    "consistency_overall",
    "consistency_top10",
)
PUBLISHED: dict[str, tuple[float, ...]] = {
    "Wan2.2, independent shots": (0.6097, 0.2114, 0.2335, 0.3934, 0.4357),
    "StoryDiffusion + Wan2.2": (0.6053, 0.2223, 0.2294, 0.4485, 0.4902),
    "IC-LoRA + Wan2.2": (0.6001, 0.2198, 0.2251, 0.4571, 0.5015),
    "HoloCine": (0.5471, 0.2104, 0.2155, 0.4631, 0.5122),
    "StoryMem": (0.6133, 0.2289, 0.2313, 0.5065, 0.5337),
    "StoryMem without semantic selection": (0.6076, 0.2257, 0.2295, 0.4878, 0.5287),
    "StoryMem without aesthetic filter": (0.6018, 0.2251, 0.2313, 0.4844, 0.5330),
    "StoryMem without sink": (0.6093, 0.2277, 0.2330, 0.4891, 0.5241),
}
"""Rows of the paper's tables 1 and 2 (arXiv 2512.19539), in the order of `PUBLISHED_COLUMNS`."""
PUBLISHED_NOTE = "published numbers: the paper's own films, stories and weights; not comparable row by row"
NOT_PUBLISHED_NOTE = "no published numbers stand here: these scorers are not those of the paper"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One column of one system.

    Args:
        mean: over all stories that define the column; None if one of them lacks a value.
        interval: bootstrap interval of the mean, or of ``mean_of_complete``.
        mean_of_complete: over the stories that have a value, for information; equals ``mean`` if all have.
        complete: stories with a value.
        expected: stories that define the column.
        lacking: title -> reason, for the others.
    """

    mean: float | None
    interval: tuple[float, float] | None
    mean_of_complete: float | None
    complete: int
    expected: int
    lacking: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that tables and page are made from.

    Args:
        columns: in the tables' order.
        stories: system -> a result for each story.
        summaries: system -> column -> its mean.
        comparisons: (first, second) -> column -> how the second differs from the first.
        metrics: metric -> `metric_settings`: version, weights, columns, rules.
        statistics: how intervals and tests were made.
        benchmark: which stories.
        systems: system -> where its films lie and what made them.
        versions: of libraries.
    """

    columns: tuple[Column, ...]
    stories: dict[str, tuple[StoryResult, ...]]
    summaries: dict[str, dict[str, Summary]]
    comparisons: dict[tuple[str, str], dict[str, Comparison | None]]
    metrics: dict[str, Any]
    statistics: StatisticsSettings
    benchmark: dict[str, Any]
    systems: dict[str, Any]
    versions: dict[str, str]

    @property
    def untrained(self) -> tuple[str, ...]:
        """Metrics whose scorers were never trained: their values mean nothing."""
        return tuple(name for name, metric in self.metrics.items() if metric["weights"] == "untrained")

    @property
    def banner(self) -> str | None:
        """What must stand above all figures; None if they are of trained scorers."""
        if not self.untrained:
            return None
        return f"UNTRAINED SCORERS ({', '.join(self.untrained)}): these numbers mean nothing."

    @property
    def published(self) -> dict[str, dict[str, float]]:
        """The paper's rows, column -> value, for columns by the paper's own scorers; none beside untrained ones."""
        papers = [metric for metric in self.metrics.values() if metric["weights"] == "published"]
        own = {column for metric in papers for column in metric["columns"]}
        if self.untrained or not own & set(PUBLISHED_COLUMNS):
            return {}
        rows = {name: dict(zip(PUBLISHED_COLUMNS, row, strict=True)) for name, row in PUBLISHED.items()}
        return {name: {column: row[column] for column in row if column in own} for name, row in rows.items()}

    @property
    def published_note(self) -> str:
        """What the published rows are, or why there are none."""
        return PUBLISHED_NOTE if self.published else NOT_PUBLISHED_NOTE

    @property
    def texts(self) -> tuple[int, int]:
        """Texts that a text encoder read, and how many of them it cut; of one system, for all have the same."""
        first = next(iter(self.stories.values()))
        details = [scores.details for result in first for scores in result.scores.values()]
        return sum(d.get("texts", 0) for d in details), sum(d.get("texts_truncated", 0) for d in details)

    def missing(self, system: str) -> list[str]:
        """A line for each shot of a system that could not be scored."""
        return [
            f"{result.title}, {shot.label}: {shot.missing}"
            for result in self.stories[system]
            for shot in result.shots
            if shot.missing is not None
        ]

    def reading_notes(self, system: str) -> list[str]:
        """A line for each way in which frames of a system were read otherwise than stored, with the first such shot."""
        noted: dict[str, list[str]] = {}
        for result in self.stories[system]:
            for shot in result.shots:
                for note in shot.notes:
                    noted.setdefault(note, []).append(f"{result.title}, {shot.label}")
        return [f"{note} ({len(shots)} shots, first {shots[0]})" for note, shots in noted.items()]

    def faults(self, system: str) -> list[str]:
        """A line for each value of a system that is not finite."""
        return [f"{result.title}: {fault}" for result in self.stories[system] for fault in result.faults]


def summarise(
    results: Mapping[str, Sequence[StoryResult]],
    *,
    metrics: Mapping[str, Any],
    columns: Sequence[Column],
    settings: StatisticsSettings,
    stories: Mapping[str, Any],
    systems: Mapping[str, Any],
) -> Results:
    """Means and comparisons of ``results`` (system -> a result for each story, in one order)."""
    names = [column.name for column in columns]
    return Results(
        columns=tuple(columns),
        stories={system: tuple(found) for system, found in results.items()},
        summaries={
            system: {name: summary_of(found, name, settings) for name in names} for system, found in results.items()
        },
        comparisons={
            (first, second): {name: _compared(results[first], results[second], name, settings) for name in names}
            for first, second in combinations(results, 2)
        },
        metrics=dict(metrics),
        statistics=settings,
        benchmark=dict(stories),
        systems=dict(systems),
        versions=library_versions(),
    )


def summary_of(results: Sequence[StoryResult], column: str, settings: StatisticsSettings) -> Summary:
    """The mean of a column over stories, in the order of their names."""
    defined = sorted((result for result in results if result.is_defined(column)), key=lambda result: result.slug)
    values = [value for result in defined if (value := result.value(column)) is not None]
    average = float(np.mean(values)) if values else None
    return Summary(
        mean=average if len(values) == len(defined) else None,
        interval=bootstrap_interval(values, settings),
        mean_of_complete=average,
        complete=len(values),
        expected=len(defined),
        lacking={r.title: r.reason(column) or "no value" for r in defined if r.value(column) is None},
    )


def _compared(
    first: Sequence[StoryResult], second: Sequence[StoryResult], column: str, settings: StatisticsSettings
) -> Comparison | None:
    values = {result.slug: result.value(column) for result in first}
    pairs = [
        (before, after)
        for result in sorted(second, key=lambda result: result.slug)
        if (before := values[result.slug]) is not None and (after := result.value(column)) is not None
    ]
    return compare([before for before, _ in pairs], [after for _, after in pairs], settings)
