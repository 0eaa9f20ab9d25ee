"""Rows of figures as text, as lines of JSON, and as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd


def show(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table, and then each as a line of JSON."""
    print(pd.DataFrame(rows).to_string(index=False, na_rep=""))
    for row in rows:
        print(json.dumps({"benchmark": benchmark, **row}), flush=True)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, without a line break at its end."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
