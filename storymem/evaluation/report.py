"""Results as files: JSON and CSV for programs, tables in Markdown and LaTeX, and a page that is one file."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from storymem.evaluation.controls import BACKGROUND, SHUFFLED, STILL, Control
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
_CONTROLS = {control.name: control for control in (STILL, SHUFFLED, BACKGROUND)}
_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", ABSENT: "--"}
_TEX |= {"†": r"$^\dagger$", "‡": r"$^\ddagger$", "§": r"\S{}", "¶": r"\P{}"} | {
    letter: f"\\{letter}" for letter in "&%$#_{}"
}


def write_report(results: Results, output: Path) -> str:
    """Write ``results.json``, ``.csv``, ``.md``, ``.tex`` and ``index.html``; returns the Markdown."""
    write_json(output / "results.json", results.to_dict())
    rows = pd.DataFrame(results.values())
    write_text(output / "results.csv", rows.to_csv(index=False, float_format="%.6f", lineterminator="\n"))
    text = render("results.md", results)
    write_text(output / "results.md", text)
    write_text(output / "results.tex", render("results.tex", results))
    write_text(output / "index.html", render_page(results, output / "stories"))
    return text


def render(name: str, results: Results, **context: Any) -> str:
    """The template ``name`` filled in with the results."""
    template = _ENVIRONMENT.get_template(f"{name}.jinja")
    tables = {"table": _table(results), "controls": _control_table(results), "agreement": _agreement_table(results)}
    return template.render(
        results=results,
        **tables,
        footnotes=lambda rows: _used(rows, footnotes(results)),
        controlled=_controls(results),
        compared=COMPARED,
        **context,
    )


def render_page(results: Results, folder: Path) -> str:
    """The page, with the images in ``folder/SYSTEM/STORY``."""
    values = [
        value for stories in results.stories.values() for one in stories for *_, value in pairs_shown(one) if value
    ]
    bounds = (min(values, default=0.0), max(values, default=1.0))
    titles, systems = results.benchmark["titles"], results.stories.items()
    columns = sorted(results.shown, key=lambda column: column.name != "consistency_overall")  # it is shown first
    plots = [
        (column.title, story_plot(titles, {name: [one.value(column.name) for one in found] for name, found in systems}))
        for column in columns
    ]
    return render(
        "index.html",
        results,
        means_plot=means_plot(results),
        gaps_plot=gaps_plot(results),
        story_plots=plots,
        images=lambda system, story: _images(folder / system / story.slug, story),
        matrix=lambda story: _matrix(story, *bounds),
        versions=library_versions(),
        reader=READER,
    )


def number(value: float | None, digits: int = 4) -> str:
    """As in the paper: ``.5065``."""
    if value is None:
        return ABSENT
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def interval(bounds: tuple[float, float] | None) -> str:
    """``[.4900, .5200]``, or nothing."""
    return "" if bounds is None else f"[{number(bounds[0])}, {number(bounds[1])}]"


def mean_and_interval(summary: Summary) -> tuple[str, str]:
    """The mean and its interval; without a mean, that of the complete stories: ``(.5200 of 2/3)``."""
    if summary.mean is not None:
        return number(summary.mean), interval(summary.interval)
    if summary.mean_of_complete is None:
        return ABSENT, ""
    return ABSENT, f"({number(summary.mean_of_complete)} of {summary.complete}/{summary.expected})"


def footnotes(results: Results) -> dict[str, str]:
    """Footnote -> its symbol."""
    count = len(_SYMBOLS)
    return {note: _SYMBOLS[place % count] * (1 + place // count) for place, note in enumerate(results.footnotes)}


def _used(rows: Sequence[Sequence[str]], notes: Mapping[str, str]) -> dict[str, str]:
    """Those of the ``notes`` whose symbol is in a cell."""
    symbols = {symbol for row in rows[1:] for cell in row[1:] for symbol in re.findall(f"[{_SYMBOLS}]+", cell)}
    return {note: symbol for note, symbol in notes.items() if any(symbol in one for one in symbols)}


def mean_cell(
    results: Results, stories: Sequence[StoryResult], summaries: Mapping[str, Summary], column: Column
) -> tuple[str, str]:
    """A mean with the symbols of its footnotes, and its interval."""
    known, summary = footnotes(results), summaries[column.name]
    value, bounds = mean_and_interval(summary)
    symbols = "".join(known[note] for note in marks(stories, summaries, column)) if summary.complete else ""
    return f"{value} {symbols}".strip(), bounds


def seconds_cell(summary: Summary | None) -> tuple[str, str]:
    """Mean seconds per film and their interval."""
    if summary is None or summary.mean is None:
        return ABSENT, ""
    low, high = summary.interval or (None, None)
    return f"{summary.mean:.1f}", "" if low is None else f"[{low:.1f}, {high:.1f}]"


def _table(results: Results) -> list[list[str]]:
    """The means as rows of cells, the paper's rows last; the films' cost in the last column, where it is known."""
    costs = results.costs
    rows = [["", *(column.heading for column in results.shown), *([SECONDS] if costs else [])]]
    for system, summaries in results.summaries.items():
        stories = results.stories[system]
        cells = [mean_cell(results, stories, summaries, column) for column in results.shown]
        cells += [seconds_cell(costs.get(system))] if costs else []
        rows.append([system, *(" ".join(cell).strip() for cell in cells)])
    for name, known in results.published.items():
        plain = [number(known.get(column.name)) for column in results.shown]
        rows.append([f"{name} †", *plain, *([ABSENT] if costs else [])])
    return rows


def _controls(results: Results) -> dict[str, Control]:
    """The controls that were scored."""
    return {name: _CONTROLS[name] for name in results.controls}


def _control_table(results: Results) -> list[list[str]]:
    """A row of cells for each column: its value for the films, for films made of them, and for independent shots.

    Where a control does not apply to all stories, the films' own value on these stories stands in parentheses.
    """
    rows, every = results.control_summaries, len(results.benchmark["titles"])
    if not results.controls:
        return []
    partial = {name: found for name, found in results.controls.items() if len(found) < every}
    heads = [_CONTROLS[name].title if name in results.controls else name for name in rows]
    heads = [
        f"{head} ({len(partial[name])} of {every} stories)" if name in partial else head
        for name, head in zip(rows, heads, strict=True)
    ]
    table = [["", *heads]]
    for column in results.shown:
        cells = []
        for name, summaries in rows.items():
            stories = results.controls.get(name) or results.stories[name]
            cell = mean_cell(results, stories, summaries, column)[0]
            cells.append(f"{cell} ({number(results.control_partner(name, column.name))})" if name in partial else cell)
        table.append([column.title, *cells])
    return table


def _agreement_table(results: Results) -> list[list[str]]:
    """A row of cells for each learned column: its rank correlation with each exact one."""
    titles = {column.name: column.title for column in results.shown}
    table: list[list[str]] = []
    for one, row in results.agreement.items():
        table = table or [["", *(titles[truth] for truth in row)]]
        cells = (
            ABSENT if of is None else f"{number(of.rho, 2)} {_short(of.interval)} ({of.films})" for of in row.values()
        )
        table.append([titles[one], *cells])
    return table


def _short(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"[{number(bounds[0], 2)}, {number(bounds[1], 2)}]"


def counted_stories(count: int) -> str:
    """``1 story``, ``2 stories``."""
    return f"{count} {'story' if count == 1 else 'stories'}"


def _comparison(found: Comparison | None) -> list[str]:
    """Cells under `COMPARED`."""
    if found is None:
        return [ABSENT] * len(COMPARED)
    return [
        number(found.difference),
        interval(found.interval),
        ABSENT if found.relative is None else f"{100 * found.relative:+.1f} %",
        f"{found.wins} / {found.losses} of {found.stories}",
        f"{found.sign_p:.4f}",
        f"{found.permutation_p:.4f}",
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


def _images(folder: Path, story: StoryResult) -> dict[int, str | None]:
    """Number of each shot -> its image as a ``data:`` URI."""
    found: dict[int, str | None] = {}
    for shot in story.shots:
        path = folder / f"{shot.number:02d}.jpg"
        shown = path.name in story.images and path.is_file()
        found[shot.number] = f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}" if shown else None
    return found


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
    "comparison": _comparison,
    "described": _described,
    "lowest": _lowest,
    "markdown": _markdown,
    "counted_stories": counted_stories,
    "mean_cell": mean_cell,
    "seconds_cell": seconds_cell,
    "number": number,
    "pairs_shown": pairs_shown,
    "reasons": _reasons,
    "tex": _tex,
}
