"""Plots of results by Matplotlib, as SVG images that an HTML page can embed."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from storymem.evaluation.results import Results

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, safe for colour blindness."""
_SOFT, _ROW = "#767676", 0.24  # of published rows and missing values; height of a row in inches
_SHOWN = ("Wan2.2, independent shots", "StoryMem")  # published rows
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "storymem",  # the same results give the same file
    "text.parse_math": False,  # titles may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.edgecolor": "#bbbbbb",
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "ytick.major.size": 0,
}


def means_plot(results: Results, across: int = 3) -> str:
    """Means of all columns with their intervals, and the paper's baseline and StoryMem, as a ``data:`` URI."""
    rows = [*results.stories, *(f"{name} †" for name in _SHOWN if results.published)]
    down = -(-len(results.shown) // across)
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.1 * across, down * (_ROW * len(rows) + 0.75)), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
        for axis in axes[len(results.shown) :]:
            axis.set_axis_off()
        for axis, column in zip(axes, results.shown, strict=False):
            axis.set_title(column.title)
            for row, summaries in enumerate(results.summaries.values()):
                found = summaries[column.name]
                if found.mean is None:
                    _write(axis, row, "no value")
                    continue
                low, high = found.interval or (found.mean, found.mean)
                axis.plot([low, high], [row, row], color=_colour(row), linewidth=2)
                axis.plot(found.mean, row, "o", color=_colour(row), markersize=5)
                _write(axis, row, f"{found.mean:.4f}")
            for row, name in enumerate(_SHOWN, start=len(results.stories)):
                if (value := results.published.get(name, {}).get(column.name)) is not None:
                    axis.plot(value, row, "o", color=_SOFT, markersize=5, fillstyle="none")
                    _write(axis, row, f"{value:.4f}")
            _label_rows(axis, rows)
        return _data_uri(figure)


def story_plot(titles: Sequence[str], systems: Mapping[str, Sequence[float | None]]) -> str:
    """A row for each story with a dot for each system, joined by a line, as a ``data:`` URI."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(8.2, _ROW * len(titles) + 0.9), layout="constrained")
        axis = figure.subplots()
        for row in range(len(titles)):
            present = [value for values in systems.values() if (value := values[row]) is not None]
            if len(present) > 1:
                axis.plot([min(present), max(present)], [row, row], color="#cccccc", linewidth=1.5, zorder=1)
            if missing := len(systems) - len(present):
                _write(axis, row, f"{missing} missing")
        for place, (name, values) in enumerate(systems.items()):
            shown = [(value, row) for row, value in enumerate(values) if value is not None]
            across, rows = zip(*shown, strict=True) if shown else ((), ())
            axis.plot(across, rows, "o", color=_colour(place), markersize=5, label=name)
        _label_rows(axis, titles)
        figure.legend(loc="outside upper left", ncols=4, frameon=False, handletextpad=0.2)
        return _data_uri(figure)


def gaps_plot(results: Results) -> str | None:
    """Looks of characters by the distance of the shots, a line for each system, as a ``data:`` URI."""
    gaps = {column.name: column.heading for column in results.shown if column.name.startswith("entity_gap_")}
    if not gaps:
        return None
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 2.6), layout="constrained")
        axis = figure.subplots()
        for place, (system, summaries) in enumerate(results.summaries.items()):
            values = [summaries[name].mean_of_complete for name in gaps]
            heights = [np.nan if value is None else value for value in values]
            axis.plot(range(len(gaps)), heights, "o-", color=_colour(place), markersize=4, label=system)
        axis.set_xticks(range(len(gaps)), gaps.values())
        axis.set_title("Looks of characters by the distance of the shots")
        figure.legend(loc="outside upper left", ncols=4, frameon=False)
        return _data_uri(figure)


def _label_rows(axis: Axes, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), [name if len(name) <= 34 else f"{name[:33]}…" for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.locator_params(axis="x", nbins=5)


def _write(axis: Axes, row: int, text: str) -> None:
    """Text at the right end of a row."""
    place = axis.get_yaxis_transform()
    axis.text(1.02, row, text, transform=place, ha="left", va="center", color=_SOFT, fontsize=8)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _data_uri(figure: Figure) -> str:
    written = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser's fonts have what Matplotlib's do not
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(written.getvalue()).decode()}"
