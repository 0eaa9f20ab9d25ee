"""Means over stories with intervals, comparisons of systems, and how everything was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from storymem.evaluation.metric import Column
from storymem.evaluation.scoring import ShotResult, StoryResult
from storymem.evaluation.statistics import Comparison, StatisticsSettings, bootstrap_interval, compare
from storymem.film.manifest import library_versions
from storymem.media.video import READER

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


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One column of one system.

    Args:
        mean: over all stories that define the column; None if one of them has no value.
        interval: bootstrap interval of ``mean_of_complete``.
        mean_of_complete: over the stories that have a value; equals ``mean`` if all have.
        complete: stories with a value.
        expected: stories that define the column.
        lacking: title -> reason, for stories without a value.
    """

    mean: float | None
    interval: tuple[float, float] | None
    mean_of_complete: float | None
    complete: int
    expected: int
    lacking: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Results:
    """Results of all systems.

    Args:
        columns: in the order of the tables.
        stories: system -> a result for each story, in one order.
        metrics: metric -> its version, weights, columns and rules.
        statistics: settings of intervals and tests.
        benchmark: folder and titles of the stories.
        systems: system -> the folder of its films and the method that made them.
    """

    columns: tuple[Column, ...]
    stories: dict[str, tuple[StoryResult, ...]]
    metrics: dict[str, Any]
    statistics: StatisticsSettings
    benchmark: dict[str, Any]
    systems: dict[str, Any]

    @cached_property
    def summaries(self) -> dict[str, dict[str, Summary]]:
        """System -> column -> its mean over stories."""
        return {
            system: {column.name: summarise(stories, column.name, self.statistics) for column in self.columns}
            for system, stories in self.stories.items()
        }

    @cached_property
    def comparisons(self) -> dict[tuple[str, str], dict[str, Comparison | None]]:
        """(first system, second) -> column -> how the second differs from the first; None without common stories."""
        return {
            (first, second): {
                column.name: compare(*self._pairs(first, second, column.name), self.statistics)
                for column in self.columns
            }
            for first, second in combinations(self.stories, 2)
        }

    def _pairs(self, first: str, second: str, column: str) -> tuple[list[float], list[float]]:
        before, after = (
            {result.slug: result.value(column) for result in self.stories[name]} for name in (first, second)
        )
        both = [(before[slug], after[slug]) for slug in sorted(before)]
        complete = [(one, other) for one, other in both if one is not None and other is not None]
        return [one for one, _ in complete], [other for _, other in complete]

    @property
    def untrained(self) -> tuple[str, ...]:
        """Metrics with untrained scorers, whose values mean nothing."""
        return tuple(name for name, metric in self.metrics.items() if metric["weights"] == "untrained")

    @property
    def banner(self) -> str | None:
        """A warning to show above all figures; None if the scorers are trained."""
        names = ", ".join(self.untrained)
        return f"UNTRAINED SCORERS ({names}): these numbers mean nothing." if names else None

    @property
    def published(self) -> dict[str, dict[str, float]]:
        """The paper's rows, for columns by the paper's own scorers; none if any scorer is untrained."""
        published = [metric for metric in self.metrics.values() if metric["weights"] == "published"]
        comparable = {column for metric in published for column in metric["columns"]} & set(PUBLISHED_COLUMNS)
        if self.untrained or not comparable:
            return {}
        rows = {name: zip(PUBLISHED_COLUMNS, row, strict=True) for name, row in PUBLISHED.items()}
        return {name: {column: value for column, value in row if column in comparable} for name, row in rows.items()}

    @property
    def published_note(self) -> str:
        """What the published rows are, or why there are none."""
        if self.published:
            return "published numbers: the paper's own films, stories and weights; not comparable row by row"
        return "no published numbers are shown: these scorers are not those of the paper"

    @property
    def texts(self) -> dict[str, int]:
        """How many texts a text encoder read, and truncated; for one system, as all have the same texts."""
        first = next(iter(self.stories.values()))
        details = [scores.details for result in first for scores in result.scores.values()]
        return {
            "read": sum(one.get("texts", 0) for one in details),
            "truncated": sum(one.get("texts_truncated", 0) for one in details),
        }

    def notes(self, system: str) -> dict[str, list[str]]:
        """Heading -> lines on missing shots, values that are not finite, and how videos were converted when read."""
        shots = [(result, shot) for result in self.stories[system] for shot in result.shots]
        converted: dict[str, list[str]] = {}
        for result, shot in shots:
            for note in shot.notes:
                converted.setdefault(note, []).append(f"{result.title}, {shot.label}")
        return {
            "missing shots": [
                f"{result.title}, {shot.label}: {shot.missing}" for result, shot in shots if shot.missing is not None
            ],
            "values that are not finite": [
                f"{result.title}: {fault}" for result in self.stories[system] for fault in result.faults
            ],
            "videos converted": [f"{note} ({len(where)} shots, first {where[0]})" for note, where in converted.items()],
        }

    def to_dict(self) -> dict[str, Any]:
        """The content of ``results.json``; shots are counted from 1, frames from 0."""
        systems = {}
        for name, stories in self.stories.items():
            missing, faults, converted = self.notes(name).values()
            systems[name] = {
                **self.systems[name],
                "columns": {column: asdict(summary) for column, summary in self.summaries[name].items()},
                "missing": missing,
                "not_finite": faults,
                "reading_notes": converted,
                "stories": [asdict(result) for result in stories],
            }
        return {
            "benchmark": self.benchmark,
            "metrics": self.metrics,
            "statistics": asdict(self.statistics),
            "untrained": list(self.untrained),
            "reader": READER,
            "texts": self.texts,
            "columns": {column.name: column.title for column in self.columns},
            "systems": systems,
            "comparisons": [
                {
                    "first": first,
                    "second": second,
                    "columns": {name: None if found is None else asdict(found) for name, found in columns.items()},
                }
                for (first, second), columns in self.comparisons.items()
            ],
            "published": {"note": self.published_note, "rows": self.published},
            "versions": library_versions(),
        }

    def values(self) -> Iterator[dict[str, Any]]:
        """A row for each value of a film, a shot, a pair of shots or a character; shots are counted from 1."""
        for system, stories in self.stories.items():
            for result in stories:
                for metric, weights in ((name, self.metrics[name]["weights"]) for name in result.scores):
                    for row in _values(result, metric):
                        yield {"system": system, "story": result.title, **row, "weights": weights}


def summarise(results: Sequence[StoryResult], column: str, settings: StatisticsSettings) -> Summary:
    """The mean of a column over stories; the order of ``results`` makes no difference."""
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


def _values(result: StoryResult, metric: str) -> Iterator[dict[str, Any]]:
    scores, shots = result.scores[metric], result.shots

    def row(level: str, item: str, column: str, value: float | None, *shown: ShotResult) -> dict[str, Any]:
        reason = next((shot.missing for shot in shown if shot.missing), scores.reasons.get(column))
        return {
            "level": level,
            "item": item,
            "column": column,
            "value": value,
            "reason": reason if value is None else None,
        }

    for column, value in scores.columns.items():
        yield row("story", "", column, value)
    for column, values in scores.shots.items():
        for shot, value in zip(shots, values, strict=True):
            yield row("shot", str(shot.number), column, value, shot)
    for column, pairs in scores.pairs.items():
        for i, j, value in pairs:
            yield row("pair", f"{i}-{j}", column, value, shots[i - 1], shots[j - 1])
    for name, value in scores.details.get("characters", {}).items():
        yield row("character", name, "identity_consistency", value)
