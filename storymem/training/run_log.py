"""The log of a run: rows of numbers and images in its folder, and in wandb if wanted."""

from __future__ import annotations

import itertools
import json
import math
import re
import secrets
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from storymem.io import naming_full_disk, parse_json, read_bytes, write_text
from storymem.training.run_settings import LogSettings

METRICS = "metrics.jsonl"


class RunLog:
    """The log of the run in ``folder``; only the main process has one. Nothing is written before :meth:`begin`.

    Rows go to ``metrics.jsonl``, a line of JSON each, with at least ``step``.
    """

    def __init__(self, folder: Path, settings: LogSettings) -> None:
        self.folder, self._settings = folder, settings
        self._metrics = folder / METRICS
        self._wandb: Any = None
        self._warned: set[str] = set()

    def begin(self, config: Mapping[str, Any], *, step: int = 0) -> None:
        """Open the log of a run with these settings that resumes after ``step`` steps.

        Rows that a killed process wrote after that step are dropped. If there are lines that are no rows, the file as
        it was stays beside the new one, with a warning of their numbers.
        """
        if self._metrics.exists():
            rows, damaged = _read(self._metrics)
            if damaged:
                names = (self.folder / f"metrics.damaged-{number}.jsonl" for number in itertools.count(1))
                copy = next(path for path in names if not path.exists())
                shutil.copyfile(self._metrics, copy)
                lines = ", ".join(map(str, damaged[:10])) + (" ..." if damaged[10:] else "")
                print(f"{self._metrics}: lines {lines} are no rows and are left out; a copy is {copy}", file=sys.stderr)
            write_text(self._metrics, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        if self._settings.wandb != "disabled":
            import wandb

            self._wandb = wandb.init(
                project=self._settings.project,
                name=self.folder.name,
                id=_wandb_id(self.folder),
                resume="allow" if self._settings.wandb == "online" else None,
                mode=self._settings.wandb,
                dir=self.folder,
                config=dict(config),
            )

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        """Write metrics after ``step`` steps: numbers, lists of them by bin, None where there is none.

        NaN and infinity, which JSON does not have, become null, with one warning for each name.
        """
        finite = {name: _finite(value) for name, value in values.items()}
        for name in finite:
            if finite[name] != values[name] and name not in self._warned:
                self._warned.add(name)
                print(f"step {step}: {name} is {values[name]}: written as null in {self._metrics}", file=sys.stderr)
        with naming_full_disk(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        if self._wandb is not None:
            lists = {name: value for name, value in finite.items() if isinstance(value, list)}
            flat = {name: value for name, value in finite.items() if name not in lists}
            flat |= {f"{name}/{n}": entry for name, value in lists.items() for n, entry in enumerate(value)}
            self._wandb.log({name: value for name, value in flat.items() if value is not None}, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        """Log an image file."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Finish what wandb has open; a second time does nothing."""
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def _read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a log, and the numbers of lines that are none."""
    rows, damaged = [], []
    for number, line in enumerate(read_bytes(path, limit=1 << 32).split(b"\n")[:-1], start=1):
        with suppress(ValueError, TypeError, KeyError):  # FileError, UnicodeDecodeError
            row = parse_json(line.decode(), str(path))
            if type(row["step"]) is int and row["step"] >= 0:
                rows.append(row)
                continue
        damaged.append(number)
    return rows, damaged


def _finite(value: Any) -> Any:
    """``value`` with None in place of NaN and infinity, in lists too."""
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _wandb_id(folder: Path) -> str:
    """The run's id at wandb, stored in its folder, so that a resumed run stays one run."""
    path = folder / "wandb_id"
    if not (path.exists() and re.fullmatch(rb"[0-9a-f]{8}", read_bytes(path))):
        write_text(path, secrets.token_hex(4))
    return read_bytes(path).decode()
