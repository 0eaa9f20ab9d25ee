"""Results as files: JSON and CSV for programs, tables in Markdown and LaTeX, and a page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from storymem.evaluation.controls import CONTROLS
from storymem.evaluation.metric import Column, Pair
from storymem.evaluation.plots import gaps_plot, means_plot, story_plot
from storymem.evaluation.results import Results, Summary, marks
from storymem.evaluation.scoring import StoryResult
from storymem.evaluation.statistics import Comparison
from storymem.film.manifest import library_versions
from storymem.io import write_json, write_text
from storymem.media.video import READER

ABSENT = "–"
SECONDS = "Seconds per film"
COMPARED = ("difference", "interval", "relative", "higher / lower", "sign test p", "permutation p")
_LOWEST = 3  # pairs of shots shown
_SYMBOLS = "‡§¶#"  # of footnotes
_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", ABSENT: "--"}
_TEX |= {"†": r"$^\dagger$", "‡": r"$^\ddagger$", "§": r"\S{}", "¶": r"\P{}"} | {
    letter: f"\\{letter}" for letter in "&%$#_{}"
}


class Table(NamedTuple):
    """Rows of cells, the first row and the first cell of each row being headings, and notes below it."""

    title: str
    rows: list[list[str]]
    notes: list[str] = []  # noqa: RUF012

    @property
    def is_text(self) -> list[bool]:
        """Whether a column holds words, and not numbers."""
        columns = zip(*self.rows[1:], strict=True)
        return [
            place == 0 or not any(re.search(rf"\d|^{ABSENT}$", cell) for cell in of) for place, of in enumerate(columns)
        ]


def write_report(results: Results, output: Path) -> str:
    """Write ``results.json``, ``.csv``, ``.md``, ``.tex`` and ``index.html``; returns the Markdown."""
    write_json(output / "results.json", results.to_dict())
    rows = pd.DataFrame(results.values())
    write_text(output / "results.csv", rows.to_csv(index=False, float_format="%.6f", lineterminator="\n"))
    text = _render("results.md", results)
    write_text(output / "results.md", text)
    write_text(output / "results.tex", _render("results.tex", results))
    write_text(output / "index.html", _render("index.html", results, **_of_page(results, output / "stories")))
    return text


def _render(name: str, results: Results, **context: Any) -> str:
    """The template ``name`` filled in with the results."""
    means, *tables = _tables(results)
    return _ENVIRONMENT.get_template(f"{name}.jinja").render(results=results, means=means, tables=tables, **context)


def _of_page(results: Results, folder: Path) -> dict[str, Any]:
    """What only the page shows, with the images in ``folder/SYSTEM/STORY``."""
    titles, systems = results.benchmark["titles"], results.stories.items()
    pairs = [pair for stories in results.stories.values() for one in stories for pair in pairs_shown(one)]
    values = [value for *_, value in pairs if value is not None]
    bounds = min(values, default=0.0), max(values, default=1.0)
    columns = sorted(results.shown, key=lambda column: column.name != "consistency_overall")  # it is shown first
    plots = [
        (column.title, story_plot(titles, {name: [one.value(column.name) for one in found] for name, found in systems}))
        for column in columns
    ]
    return {
        "means_plot": means_plot(results),
        "gaps_plot": gaps_plot(results),
        "story_plots": plots,
        "images": lambda system, story: _images(folder / system / story.slug, story, folder.parent),
        "matrix": lambda story: _matrix(story, *bounds),
        "versions": library_versions(),
        "reader": READER,
    }


def number(value: float | None, digits: int = 4) -> str:
    """As in the paper: ``.5065``."""
    if value is None:
        return ABSENT
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def interval(bounds: tuple[float, float] | None, digits: int = 4) -> str:
    """``[.4900, .5200]``, or nothing."""
    return "" if bounds is None else f"[{number(bounds[0], digits)}, {number(bounds[1], digits)}]"


def mean_and_interval(summary: Summary) -> tuple[str, str]:
    """The mean and its interval; without a mean, that of the complete stories: ``(.5200 of 2/3)``."""
    if summary.mean is not None:
        return number(summary.mean), interval(summary.interval)
    if summary.mean_of_complete is None:
        return ABSENT, ""
    return ABSENT, f"({number(summary.mean_of_complete)} of {summary.complete}/{summary.expected})"


def _tables(results: Results) -> list[Table]:
    """All tables, the means first."""
    others = [
        Table(
            f"Published with other definitions: {other.source}",
            [["", *other.columns], *([name, *map(number, values)] for name, values in other.rows.items())],
            [f"These do not compare with ours: {other.note}."],
        )
        for other in results.others
    ]
    comparisons = [
        Table(
            f"{second} compared with {first}, paired by story",
            _filled([["", *COMPARED], *([one.title, *_comparison(columns[one.name])] for one in results.shown)]),
        )
        for (first, second), columns in results.comparisons.items()
    ]
    return [_means(results), *others, *_controls(results), *_agreement(results), *comparisons]


def _filled(rows: list[list[str]]) -> list[list[str]]:
    """``rows`` without the columns that are empty below their heading; the first stays."""
    known = [any(row[place] not in ("", ABSENT) for row in rows[1:]) for place in range(len(rows[0]))]
    places = [place for place, is_known in enumerate(known) if is_known or place == 0]
    return [[row[place] for place in places] for row in rows]


def _means(results: Results) -> Table:
    """The means, the paper's rows last; the films' cost in the last column, where it is known."""
    costs, symbols = results.costs, _symbols(results)
    rows = [["", *(column.heading for column in results.shown), *([SECONDS] if costs else [])]]
    for system, summaries in results.summaries.items():
        cells = [_cell(results.stories[system], summaries, column, symbols) for column in results.shown]
        rows.append([system, *cells, *([_seconds(costs.get(system))] if costs else [])])
    for name, known in results.published.items():
        plain = [number(known.get(column.name)) for column in results.shown]
        rows.append([f"{name} †", *plain, *([ABSENT] if costs else [])])
    statistics, texts, count = results.statistics, results.texts, len(results.benchmark["titles"])
    intervals = (
        f", with {100 * statistics.level:g} % bootstrap intervals ({statistics.resamples} resamples of the stories, "
        f"seed {statistics.seed})"
    )
    notes = [
        *_footnotes(rows, symbols),
        f"{'† ' if results.published else 'Note: '}{results.published_note}.",
        f"Means over {counted_stories(count)}{intervals if count > 1 else ''}. Where a story has no value there is no "
        "mean; the mean over the other stories stands in parentheses.",
    ]
    if texts["read"]:
        cut = f"{texts['truncated']} of {texts['read']} texts"
        notes.append(f"{cut} are longer than the text encoder's context and were truncated.")
    if costs:
        notes.append("Seconds per film are those in the films' manifests, of the machine that made them.")
    notes += [f"Not in the tables: {', '.join(of)} ({reason})." for reason, of in results.not_shown.items()]
    return Table("Means over stories", rows, notes)


def _controls(results: Results) -> list[Table]:
    """A row of cells for each column: its value for the films, for films made of them, and for independent shots.

    Where a control does not apply to all stories, the films' own value on these stories stands in parentheses.
    """
    every, symbols = len(results.benchmark["titles"]), _symbols(results)
    if not results.controls:
        return []
    partial = {name: found for name, found in results.controls.items() if len(found) < every}
    heads, titles = [""], {name: CONTROLS[name].title for name in results.controls}
    for name in results.control_summaries:
        some = f" ({len(partial[name])} of {every} stories)" if name in partial else ""
        heads.append(titles.get(name, name) + some)
    rows = [heads]
    for column in results.shown:
        rows.append([column.title])
        for name, summaries in results.control_summaries.items():
            stories = results.controls.get(name) or results.stories[name]
            cell = _cell(stories, summaries, column, symbols).partition(" [")[0]
            own = f" ({number(results.control_partner(name, column.name))})" if name in partial else ""
            rows[-1].append(cell + own)
    notes = [
        *_footnotes(rows, symbols),
        *(f"{CONTROLS[name].title}: {CONTROLS[name].expected}." for name in results.controls),
        f"Control films are made of the films of {results.controlled}, in the first column. A metric that does not "
        "rank them as expected is no evidence.",
    ]
    return [Table("What these metrics report of controls", rows, notes)]


def _agreement(results: Results) -> list[Table]:
    """A row of cells for each learned column: its rank correlation with each exact one."""
    titles = {column.name: column.title for column in results.shown}
    rows: list[list[str]] = []
    for one, row in results.agreement.items():
        rows = rows or [["", *(titles[truth] for truth in row)]]
        rows.append([titles[one]])
        for of in row.values():
            bounds = "" if of is None or of.interval is None else f" {interval(of.interval, 2)}"
            rows[-1].append(ABSENT if of is None else f"{number(of.rho, 2)}{bounds} ({of.films})")
    note = (
        "Spearman's rank correlation over films, its bootstrap interval over stories, and the number of films. What is "
        "drawn is known exactly, so a learned metric that does not follow it is no evidence on such films."
    )
    return [Table("Rank correlation of learned columns with exact ones", rows, [note])] if rows else []


def _symbols(results: Results) -> dict[str, str]:
    """Footnote -> its symbol."""
    count = len(_SYMBOLS)
    return {note: _SYMBOLS[place % count] * (1 + place // count) for place, note in enumerate(results.footnotes)}


def _footnotes(rows: Sequence[Sequence[str]], symbols: Mapping[str, str]) -> list[str]:
    """The footnotes whose symbols are in the cells."""
    used = {symbol for row in rows for cell in row for symbol in re.findall(rf"[\d{ABSENT}]([{_SYMBOLS}]+)", cell)}
    return [f"{symbol} {note}." for note, symbol in symbols.items() if any(symbol in one for one in used)]


def _cell(
    stories: Sequence[StoryResult], summaries: Mapping[str, Summary], column: Column, symbols: Mapping[str, str]
) -> str:
    """A mean with the symbols of its footnotes, and its interval."""
    summary = summaries[column.name]
    value, bounds = mean_and_interval(summary)
    marked = "".join(symbols[note] for note in marks(stories, summaries, column)) if summary.complete else ""
    return f"{value}{marked} {bounds}".strip()


def _seconds(summary: Summary | None) -> str:
    """Mean seconds per film and their interval."""
    if summary is None or summary.mean is None:
        return ABSENT
    bounds = "" if summary.interval is None else f" [{summary.interval[0]:.1f}, {summary.interval[1]:.1f}]"
    return f"{summary.mean:.1f}{bounds}"


def counted_stories(count: int) -> str:
    """``1 story``, ``2 stories``."""
    return f"{count} {'story' if count == 1 else 'stories'}"


def _comparison(found: Comparison | None) -> list[str]:
    """Cells under `COMPARED`; a single story has neither an interval nor a test."""
    if found is None:
        return [ABSENT] * len(COMPARED)
    return [
        number(found.difference),
        interval(found.interval),
        ABSENT if found.relative is None else f"{100 * found.relative:+.1f} %",
        f"{found.wins} / {found.losses} of {found.stories}",
        *([""] * 2 if found.stories < 2 else [f"{found.sign_p:.4f}", f"{found.permutation_p:.4f}"]),
    ]


def _described(metric: dict[str, Any]) -> str:
    """A metric's settings in a line; hashes are shortened."""
    shown = {key: value for key, value in metric.items() if key != "columns"}
    texts = {key: re.sub(r"^[0-9a-f]{64}$", lambda found: found[0][:12], str(value)) for key, value in shown.items()}
    return ", ".join(f"{key} {text}" for key, text in texts.items())


def pairs_shown(story: StoryResult) -> Sequence[Pair]:
    """The pairs of shots that the page shows: of ViCLIP's consistency, or else of the first metric that has any."""
    found = {name: pairs for scores in story.scores.values() for name, pairs in scores.pairs.items()}
    return found.get("consistency_overall") or next(iter(found.values()), ())


def _lowest(pairs: Sequence[Pair]) -> list[tuple[float, int, int, float]]:
    """The lowest values below the mean: value, both shots, and how far the value is below."""
    known = sorted((value, i, j) for i, j, value in pairs if value is not None)
    average = sum(value for value, *_ in known) / max(1, len(known))
    return [(value, i, j, average - value) for value, i, j in known[:_LOWEST] if value < average]


def _matrix(story: StoryResult, low: float, high: float) -> list[list[dict[str, Any] | None]]:
    """Rows of cells, one for each pair of shots: its value, and its share of the way from ``low`` to ``high``."""
    cells: dict[tuple[int, int], dict[str, Any]] = {}
    for i, j, value in pairs_shown(story):
        share = 0.5 if value is None or high <= low else min(1.0, max(0.0, (value - low) / (high - low)))
        cells[i, j] = cells[j, i] = {"value": value, "share": round(share, 2)}
    numbers = [shot.number for shot in story.shots]
    return [[cells.get((i, j)) for j in numbers] for i in numbers]


def _reasons(story: StoryResult, results: Results) -> dict[str, list[Column]]:
    """Reason -> the columns that have no value for it."""
    found: dict[str, list[Column]] = {}
    for column in results.shown:
        if (reason := story.reason(column.name)) is not None:
            found.setdefault(reason, []).append(column)
    return found


def _images(folder: Path, story: StoryResult, page: Path) -> dict[int, str | None]:
    """Number of each shot -> the URL of its image, relative to the folder ``page``."""
    found: dict[int, str | None] = {}
    for shot in story.shots:
        path = folder / f"{shot.number:02d}.jpg"
        shown = path.name in story.images and path.is_file()
        found[shot.number] = quote(path.relative_to(page).as_posix()) if shown else None
    return found


def _value_and_rest(cell: str) -> tuple[str, str]:
    """A cell's value, and what follows in brackets, for a line of its own."""
    value, *rest = re.split(r" (?=[\[(])", cell, maxsplit=1)
    return value, "".join(rest)


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


_ENVIRONMENT = Environment(
    loader=PackageLoader("storymem.evaluation"),
    autoescape=select_autoescape(["html.jinja"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {
    "described": _described,
    "lowest": _lowest,
    "markdown": _markdown,
    "counted_stories": counted_stories,
    "number": number,
    "pairs_shown": pairs_shown,
    "reasons": _reasons,
    "tex": _tex,
    "value_and_rest": _value_and_rest,
}
