"""Results as files for programs (JSON, CSV) and as tables for people (Markdown, LaTeX)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from storymem.evaluation.metric import Scores
from storymem.evaluation.results import Results, Summary
from storymem.evaluation.scoring import ShotResult
from storymem.evaluation.statistics import Comparison
from storymem.media.video import READER

ABSENT = "–"
COMPARED = ("difference", "relative", "higher / lower", "sign test p", "permutation p")
"""Headings of what a `Comparison` says of a column."""


def results_json(results: Results) -> str:
    """Everything, with every story's values; shots are counted from 0."""
    content = {
        "benchmark": results.benchmark,
        "metrics": results.metrics,
        "statistics": asdict(results.statistics),
        "untrained": list(results.untrained),
        "reader": READER,
        "texts": dict(zip(("read", "truncated"), results.texts, strict=True)),
        "columns": {column.name: column.title for column in results.columns},
        "systems": {
            name: {
                **results.systems[name],
                "columns": {column: asdict(summary) for column, summary in results.summaries[name].items()},
                "missing": results.missing(name),
                "not_finite": results.faults(name),
                "reading_notes": results.reading_notes(name),
                "stories": [asdict(result) for result in stories],
            }
            for name, stories in results.stories.items()
        },
        "comparisons": [
            {
                "first": first,
                "second": second,
                "columns": {name: None if found is None else asdict(found) for name, found in columns.items()},
            }
            for (first, second), columns in results.comparisons.items()
        ],
        "published": {"note": results.published_note, "rows": results.published},
        "versions": results.versions,
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def csv_lines(results: Results) -> str:
    """A line for each value of a film, a shot, a pair or a character; shots are counted from 1."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(["system", "story", "level", "item", "column", "value", "reason", "weights"])
    for system, stories in results.stories.items():
        for result in stories:
            for metric, found in result.scores.items():
                for level, item, column, value, reason in _values(found, result.shots):
                    number = "" if value is None else f"{value:.6f}"
                    weights = results.metrics[metric]["weights"]
                    writer.writerow([system, result.title, level, item, column, number, reason or "", weights])
    return written.getvalue()


def _values(found: Scores, shots: Sequence[ShotResult]) -> Iterator[tuple[str, str, str, float | None, str | None]]:
    for column, value in found.columns.items():
        yield "story", "", column, value, found.reasons.get(column)
    for column, values in found.shots.items():
        for shot, value in zip(shots, values, strict=True):
            yield "shot", str(shot.index + 1), column, value, _reason(value, found, column, shot)
    for column, pairs in found.pairs.items():
        for i, j, value in pairs:
            yield "pair", f"{i + 1}-{j + 1}", column, value, _reason(value, found, column, shots[i], shots[j])
    for name, value in found.details.get("characters", {}).items():
        yield "character", name, "identity_consistency", value, _reason(value, found, "identity_consistency")


def _reason(value: float | None, found: Scores, column: str, *shots: ShotResult) -> str | None:
    """Why there is no value: the shot that is missing, or else what the whole column lacks."""
    if value is not None:
        return None
    return next((shot.missing for shot in shots if shot.missing), found.reasons.get(column))


def number(value: float | None) -> str:
    """Four digits, as the paper prints them: ``.5065``."""
    if value is None:
        return ABSENT
    text = f"{value:.4f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def mean_and_interval(summary: Summary) -> tuple[str, str]:
    """The mean, and its interval as ``[.49, .52]``; without a mean, that of the complete stories in brackets."""
    interval = "" if summary.interval is None else f"[{number(summary.interval[0])}, {number(summary.interval[1])}]"
    if summary.mean is not None:
        return number(summary.mean), interval
    if summary.mean_of_complete is None:
        return ABSENT, ""
    return ABSENT, f"({number(summary.mean_of_complete)} of {summary.complete}/{summary.expected})"


def percent(comparison: Comparison) -> str:
    """The relative difference: ``+28.7 %``."""
    return ABSENT if comparison.relative is None else f"{100 * comparison.relative:+.1f} %"


# Markdown


def markdown(results: Results) -> str:
    """The table with the paper's rows beside it, comparisons, what is missing, and how it was measured."""
    banner = [] if results.banner is None else [f"**⚠ {results.banner}**", ""]
    parts = [*banner, _markdown_table(results), "", *_notes(results)]
    for (first, second), columns in results.comparisons.items():
        parts += ["", f"**{second} against {first}**, story by story", "", *_comparison_rows(results, columns)]
    for system in results.stories:
        if missing := results.missing(system):
            parts += ["", f"**Missing shots of {system}**", "", *(f"- {line}" for line in missing)]
        if notes := results.reading_notes(system):
            parts += ["", f"**How videos of {system} were read**", "", *(f"- {line}" for line in notes)]
        if faults := results.faults(system):
            parts += ["", f"**Values of {system} that are not finite**", "", *(f"- {line}" for line in faults)]
    return "\n".join(parts) + "\n"


def _markdown_table(results: Results) -> str:
    rows = [["", *(column.heading for column in results.columns)]]
    rows += [["---", *("---:" for _ in results.columns)]]
    for system, summaries in results.summaries.items():
        cells = [" ".join(filter(None, mean_and_interval(summaries[column.name]))) for column in results.columns]
        rows.append([f"**{system}**", *cells])
    for name, row in results.published.items():
        rows.append([f"{name} †", *(number(row.get(column.name)) for column in results.columns)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _notes(results: Results) -> list[str]:
    texts, cut = results.texts
    settings = results.statistics
    stories = len(results.benchmark["titles"])
    notes = [
        f"† {results.published_note}." if results.published else f"Note: {results.published_note}.",
        "",
        f"Means over {stories} stories, with {100 * settings.level:g} % bootstrap intervals ({settings.resamples} "
        f"resamples of the stories, seed {settings.seed}). Where a story lacks a value there is no mean; the one over "
        "the other stories stands in brackets.",
    ]
    if texts:
        notes.append(f"{cut} of {texts} texts are longer than the text encoder reads and were cut.")
    for name, metric in results.metrics.items():
        said = ", ".join(f"{key} {_short(value)}" for key, value in metric.items() if key != "columns")
        notes.append(f"- {name}: {said}")
    return notes


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _comparison_rows(results: Results, columns: dict[str, Comparison | None]) -> list[str]:
    rows = [f"| | {' | '.join(COMPARED)} |", "| --- " + "| ---: " * len(COMPARED) + "|"]
    for column in results.columns:
        found = columns[column.name]
        if found is None:
            rows.append(f"| {column.title} |" + f" {ABSENT} |" * 5)
            continue
        interval = f" [{number(found.interval[0])}, {number(found.interval[1])}]" if found.interval else ""
        cells = [
            f"{number(found.difference)}{interval}",
            percent(found),
            f"{found.wins} / {found.losses} of {found.stories}",
            f"{found.sign_p:.4f}",
            f"{found.permutation_p:.4f}",
        ]
        rows.append(f"| {column.title} | {' | '.join(cells)} |")
    return rows


# LaTeX


def latex(results: Results) -> str:
    """The table for a paper, with ``\\usepackage{booktabs}``; intervals stand under the means."""
    lines = [
        *([] if results.banner is None else [f"% {results.banner}"]),
        f"% {results.published_note}",
        f"\\begin{{tabular}}{{l{'c' * len(results.columns)}}}",
        "\\toprule",
        *_latex_banner(results),
        " & ".join(["", *(_escaped(column.heading) for column in results.columns)]) + " \\\\",
        "\\midrule",
    ]
    for system, summaries in results.summaries.items():
        measured = [mean_and_interval(summaries[column.name]) for column in results.columns]
        lines.append(" & ".join([_escaped(system), *(mean for mean, _ in measured)]) + " \\\\")
        lines.append(" & ".join(["", *(f"{{\\scriptsize {interval}}}" for _, interval in measured)]) + " \\\\")
    if results.published:
        lines.append("\\midrule")
    for name, row in results.published.items():
        cells = [number(row.get(column.name)) for column in results.columns]
        lines.append(" & ".join([f"{_escaped(name)}$^\\dagger$", *cells]) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join(lines).replace(ABSENT, "--") + "\n"


def _latex_banner(results: Results) -> list[str]:
    if results.banner is None:
        return []
    width = len(results.columns) + 1
    return [f"\\multicolumn{{{width}}}{{c}}{{\\textbf{{{_escaped(results.banner)}}}}} \\\\", "\\midrule"]


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)
