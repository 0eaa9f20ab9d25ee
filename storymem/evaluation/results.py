"""Means over stories with intervals, comparisons of systems, and how everything was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from pydantic_core import to_jsonable_python

from storymem.evaluation.metric import Column
from storymem.evaluation.motion import NEARLY_STILL
from storymem.evaluation.published import OTHERS, PUBLISHED, PUBLISHED_COLUMNS, OtherTable
from storymem.evaluation.scoring import ShotResult, StoryResult
from storymem.evaluation.statistics import (
    Comparison,
    Correlation,
    StatisticsSettings,
    bootstrap_interval,
    compare,
    rank_correlation,
)
from storymem.film.manifest import library_versions
from storymem.media.video import READER

INDEPENDENT = "independent"
"""The method whose films are a control: nothing but the prompt is common to its shots."""


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
    lacking: dict[str, str] = field(default_factory=dict)


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
        controlled: the system whose films the control films are made of.
        controls: control -> a result for each story to which it applies.
    """

    columns: tuple[Column, ...]
    stories: dict[str, tuple[StoryResult, ...]]
    metrics: dict[str, Any]
    statistics: StatisticsSettings
    benchmark: dict[str, Any]
    systems: dict[str, Any]
    controlled: str | None = None
    controls: dict[str, tuple[StoryResult, ...]] = field(default_factory=dict)

    @cached_property
    def summaries(self) -> dict[str, dict[str, Summary]]:
        """System -> column -> its mean over stories."""
        return self._summaries(self.stories)

    def _summaries(self, rows: Mapping[str, Sequence[StoryResult]]) -> dict[str, dict[str, Summary]]:
        return {
            name: {column.name: summarise(stories, column.name, self.statistics) for column in self.columns}
            for name, stories in rows.items()
        }

    @cached_property
    def comparisons(self) -> dict[tuple[str, str], dict[str, Comparison | None]]:
        """(first system, second) -> column -> how the second differs from the first; None without common stories.

        These are the pairs with the first of all systems, and with ``storymem``.
        """
        references = {next(iter(self.stories)), "storymem"}
        return {
            pair: {column.name: self._compared(*pair, column.name) for column in self.columns}
            for pair in combinations(self.stories, 2)
            if references.intersection(pair)
        }

    @cached_property
    def shown(self) -> tuple[Column, ...]:
        """The columns that some story can have: those of the tables."""
        results = [result for stories in self.stories.values() for result in stories]
        return tuple(column for column in self.columns if any(one.is_defined(column.name) for one in results))

    @cached_property
    def not_shown(self) -> dict[str, list[str]]:
        """Reason -> headings of the columns that no story can have."""
        found: dict[str, list[str]] = {}
        first = next(iter(self.stories.values()))[0]
        for column in self.columns:
            if column not in self.shown:
                found.setdefault(first.reason(column.name) or "not defined", []).append(column.heading)
        return found

    @cached_property
    def control_summaries(self) -> dict[str, dict[str, Summary]]:
        """Row of the table of controls -> column -> its mean: the films themselves first, independent shots last."""
        rows = {} if self.controlled is None else {self.controlled: self.stories[self.controlled]}
        rows |= self.controls
        if self.controls and INDEPENDENT in self.stories:
            rows[INDEPENDENT] = self.stories[INDEPENDENT]
        return self._summaries(rows)

    def control_partner(self, control: str, column: str) -> float | None:
        """The mean of a column over the unaltered films that a control was made of."""
        slugs = {result.slug for result in self.controls[control]}
        own = [result for result in self.stories[self.controlled or ""] if result.slug in slugs]
        return summarise(own, column, self.statistics).mean

    @cached_property
    def agreement(self) -> dict[str, dict[str, Correlation | None]]:
        """Learned column -> exact column -> their rank correlation over all films; empty without an exact column."""
        exact = [column.name for column in self.shown if column.exact]
        beside = [set(metric["columns"]) for metric in self.metrics.values() if set(exact) & set(metric["columns"])]
        learned = [column.name for column in self.shown if column.name not in set().union(*beside)] if exact else []
        return {
            one: {truth: rank_correlation(self._films(one, truth), self.statistics) for truth in exact}
            for one in learned
        }

    def _films(self, one: str, other: str) -> list[list[tuple[float, float]]]:
        """For each story, both columns of every system's film that has them."""
        return [
            [(a, b) for film in films if (a := film.value(one)) is not None and (b := film.value(other)) is not None]
            for films in zip(*self.stories.values(), strict=True)
        ]

    @cached_property
    def costs(self) -> dict[str, Summary]:
        """System -> seconds to make a film, by its manifest; only for systems whose films all state it."""
        return {
            system: _mean_of([result.seconds for result in results], self.statistics)
            for system, results in self.stories.items()
            if all(result.seconds is not None for result in results)
        }

    @cached_property
    def footnotes(self) -> tuple[str, ...]:
        """All footnotes, in the order of the tables."""
        rows = [(self.stories[name], found) for name, found in self.summaries.items()]
        rows += [(self.controls[name], self.control_summaries[name]) for name in self.controls]
        return tuple(
            dict.fromkeys(note for stories, found in rows for one in self.shown for note in marks(stories, found, one))
        )

    def _compared(self, first: str, second: str, column: str) -> Comparison | None:
        """The comparison of a column over the stories for which both systems have a value."""
        both = zip(self.stories[first], self.stories[second], strict=True)
        values = [(before.value(column), after.value(column)) for before, after in both]
        complete = [(one, other) for one, other in values if one is not None and other is not None]
        return compare([one for one, _ in complete], [other for _, other in complete], self.statistics)

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
        rows = {name: zip(PUBLISHED_COLUMNS, row, strict=True) for name, row in PUBLISHED.items()}
        found = {name: {column: value for column, value in row if column in comparable} for name, row in rows.items()}
        return found if comparable and not self.untrained else {}

    @property
    def others(self) -> tuple[OtherTable, ...]:
        """Tables of others, where the paper's rows are shown too."""
        return OTHERS if self.published else ()

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
            notes = {"missing": missing, "not_finite": faults, "reading_notes": converted}
            systems[name] = {**self.systems[name], "columns": self.summaries[name], **notes, "stories": stories}
        content = {
            "benchmark": self.benchmark,
            "metrics": self.metrics,
            "statistics": self.statistics,
            "untrained": self.untrained,
            "reader": READER,
            "texts": self.texts,
            "columns": {column.name: column.title for column in self.columns},
            "systems": systems,
            "comparisons": [
                {"first": first, "second": second, "columns": columns}
                for (first, second), columns in self.comparisons.items()
            ],
            "agreement": self.agreement,
            "controls": {"system": self.controlled, "rows": self.control_summaries, "stories": self.controls},
            "seconds_per_film": self.costs,
            "published": {"note": self.published_note, "rows": self.published},
            "versions": library_versions(),
        }
        return to_jsonable_python(content)

    def values(self) -> Iterator[dict[str, Any]]:
        """A row for each value of a film, a shot, a pair of shots or a character; shots are counted from 1."""
        for system, stories in self.stories.items():
            for result in stories:
                for metric, weights in ((name, self.metrics[name]["weights"]) for name in result.scores):
                    for row in _values(result, metric):
                        yield {"system": system, "story": result.title, **row, "weights": weights}


def marks(stories: Sequence[StoryResult], summaries: Mapping[str, Summary], column: Column) -> list[str]:
    """Footnotes of a column of one row of the tables: those of its films, and whether the films hardly move."""
    found = list(dict.fromkeys(mark for result in stories if (mark := result.mark(column.name)) is not None))
    motion = summaries["motion"].mean_of_complete if column.consistency and "motion" in summaries else None
    still = f"these films hardly move (motion below {NEARLY_STILL}): their consistency means nothing"
    return found if motion is None or motion >= NEARLY_STILL else [*found, still]


def summarise(results: Sequence[StoryResult], column: str, settings: StatisticsSettings) -> Summary:
    """The mean of a column over stories; the order of ``results`` makes no difference."""
    defined = sorted((result for result in results if result.is_defined(column)), key=lambda result: result.slug)
    lacking = {r.title: r.reason(column) or "no value" for r in defined if r.value(column) is None}
    return replace(_mean_of([result.value(column) for result in defined], settings), lacking=lacking)


def _mean_of(values: Sequence[float | None], settings: StatisticsSettings) -> Summary:
    known = [value for value in values if value is not None]
    average = float(np.mean(known)) if known else None
    return Summary(
        mean=average if len(known) == len(values) else None,
        interval=bootstrap_interval(known, settings),
        mean_of_complete=average,
        complete=len(known),
        expected=len(values),
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
    for name, values in scores.details.get("entities", {}).items():
        for part in ("presence", "same", "strict"):
            yield row("character", name, f"entity_{part}", values.get(part)) | {"reason": values.get("reason")}
