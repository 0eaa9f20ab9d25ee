"""Plots as SVG inside a page: no script, no file beside it, readable on light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: told apart by all eyes
_LIGHT, _DARK = (237, 244, 252), (8, 69, 148)
_ROW, _CELL = 22, 34


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A row of an interval plot; ``published`` is drawn hollow. ``value`` None: nothing is drawn but the name."""

    name: str
    value: float | None
    interval: tuple[float, float] | None = None
    colour: str = "#888"
    published: bool = False


def interval_plot(marks: Sequence[Mark], *, label: str, width: int = 430) -> str:
    """Means as dots with their intervals, a row each, on one scale."""
    values = [v for mark in marks for v in (mark.value, *(mark.interval or ())) if v is not None]
    scale = Scale(values, left=190, right=width - 52)
    height = _ROW * len(marks) + 26
    parts = [_open(width, height, label), *scale.grid(top=4, bottom=height - 22)]
    for row, mark in enumerate(marks):
        y = 4 + _ROW * row + _ROW / 2
        style = "class=soft" if mark.published else ""
        parts.append(f"<text x=182 y={y + 4} text-anchor=end {style}>{escape(_cut(mark.name, 30))}</text>")
        if mark.value is None:
            parts.append(f"<text x=192 y={y + 4} class=soft>no value</text>")
            continue
        if mark.interval is not None:
            low, high = (scale(end) for end in mark.interval)
            parts.append(f"<line x1={low} x2={high} y1={y} y2={y} stroke={mark.colour} stroke-width=2.5 />")
        fill = "none" if mark.published else mark.colour
        parts.append(
            f"<circle cx={scale(mark.value)} cy={y} r=4.5 fill={fill} stroke={mark.colour} stroke-width=1.5 />"
        )
        parts.append(f"<text x={width} y={y + 4} text-anchor=end {style}>{mark.value:.4f}</text>")
    return "".join(parts) + "</svg>"


def story_plot(
    titles: Sequence[str], systems: Mapping[str, Sequence[float | None]], *, label: str, width: int = 720
) -> str:
    """A row for each story, a dot for each system, joined by a line so that the gap is seen."""
    values = [value for row in systems.values() for value in row if value is not None]
    scale = Scale(values, left=230, right=width - 12)
    height = _ROW * len(titles) + 26
    parts = [_open(width, height, label), *scale.grid(top=4, bottom=height - 22)]
    for row, title in enumerate(titles):
        y = 4 + _ROW * row + _ROW / 2
        parts.append(f"<text x=222 y={y + 4} text-anchor=end>{escape(_cut(title, 34))}</text>")
        there = [value for found in systems.values() if (value := found[row]) is not None]
        if len(there) > 1:
            ends = scale(min(there)), scale(max(there))
            parts.append(f"<line x1={ends[0]} x2={ends[1]} y1={y} y2={y} class=grid stroke-width=2 />")
        for place, (name, found) in enumerate(systems.items()):
            if (value := found[row]) is not None:
                dot = f"<circle cx={scale(value)} cy={y} r=4.5 fill={colour(place)}>"
                parts.append(f"{dot}<title>{escape(name)}: {value:.4f}</title></circle>")
        if len(there) < len(systems):
            parts.append(
                f"<text x={width - 4} y={y + 4} text-anchor=end class=soft>{len(systems) - len(there)} missing</text>"
            )
    return "".join(parts) + "</svg>"


def matrix(table: Sequence[Sequence[float | None]], *, bounds: tuple[float, float], label: str) -> str:
    """Values of pairs of shots as a coloured square, shots counted from 1; a missing value is a hatched cell.

    Args:
        table: [n][n], symmetric; the diagonal is not drawn.
        bounds: the values of the lightest and the darkest colour, the same for all that is to be compared.
        label: what it shows.
    """
    size = _CELL * len(table) + 24
    parts = [_open(size, size, label)]
    for i, row in enumerate(table):
        middle = 24 + _CELL * i + _CELL / 2
        parts.append(f"<text x={middle} y=16 text-anchor=middle class=soft>{i + 1}</text>")
        parts.append(f"<text x=18 y={middle + 4} text-anchor=end class=soft>{i + 1}</text>")
        for j, value in enumerate(row):
            if i != j:
                parts.append(_cell(i, j, value, bounds))
    return "".join(parts) + "</svg>"


def _cell(i: int, j: int, value: float | None, bounds: tuple[float, float]) -> str:
    x, y = 24 + _CELL * j, 24 + _CELL * i
    place = f"x={x + 1} y={y + 1} width={_CELL - 2} height={_CELL - 2} rx=3"
    if value is None:
        return f"<rect {place} class=absent><title>shots {i + 1} and {j + 1}: no value</title></rect>"
    low, high = bounds
    share = min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(_LIGHT, _DARK, strict=True))
    ink = "#fff" if share > 0.5 else "#123"
    digits = f"{value:.2f}".replace("0.", ".", 1)
    return (
        f"<rect {place} fill='rgb({red},{green},{blue})'><title>shots {i + 1} and {j + 1}: {value:.4f}</title></rect>"
        f"<text x={x + _CELL / 2} y={y + _CELL / 2 + 4} text-anchor=middle fill={ink} font-size=11>{digits}</text>"
    )


class Scale:
    """From values to x, with some air on both sides."""

    def __init__(self, values: Sequence[float], *, left: float, right: float) -> None:
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        air = 0.06 * (high - low) or 0.01
        self.low, self.high = low - air, high + air
        self.left, self.right = left, right

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.left + share * (self.right - self.left), 1)

    def grid(self, *, top: float, bottom: float) -> list[str]:
        """Lines at round values, with their numbers below."""
        step = next(s for s in _steps() if (self.high - self.low) / s <= 5)
        first = int(self.low // step) + 1
        ticks = [round(k * step, 10) for k in range(first, int(self.high // step) + 1)]
        return [
            f"<line x1={self(t)} x2={self(t)} y1={top} y2={bottom} class=grid />"
            f"<text x={self(t)} y={bottom + 15} text-anchor=middle class=soft>{t:g}</text>"
            for t in ticks
        ]


def colour(place: int) -> str:
    """The colour of the system in ``place``, from 0."""
    return COLOURS[place % len(COLOURS)]


def _steps() -> list[float]:
    return [digit * 10.0**power for power in range(-8, 309) for digit in (1, 2, 5)]


def _open(width: float, height: float, label: str) -> str:
    box = f"viewBox='0 0 {width} {height}' width={width} height={height}"
    return f"<svg {box} role=img aria-label='{escape(label)}' font-size=12>"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
