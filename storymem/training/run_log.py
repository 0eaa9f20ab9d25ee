"""What a run tells: rows of numbers and pictures, in its folder, and to wandb if asked."""

from __future__ import annotations

import itertools
import json
import math
import re
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storymem.io import FileError, naming_full_disk, parse_json, read_bytes, write_text
from storymem.training.settings import LogSettings

METRICS = "metrics.jsonl"


def check_log(settings: LogSettings) -> None:
    """Raise ``ValueError`` if wandb is asked for and not installed."""
    if settings.wandb == "disabled":
        return
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise ValueError(
            f"log.wandb={settings.wandb} needs wandb: pip install 'storymem[train]', or write log.wandb=disabled; "
            "the run's folder holds everything either way"
        ) from None


class RunLog:
    """The log of one run; only the main process has one. Nothing is written before :meth:`begin`.

    Rows go to ``metrics.jsonl``, a line of JSON each, with at least ``step``.

    Args:
        folder: of the run.
        settings: see :class:`LogSettings`.
    """

    def __init__(self, folder: Path, settings: LogSettings) -> None:
        self.folder, self._settings = folder, settings
        self._metrics = folder / METRICS
        self._wandb: Any = None
        self._told: set[str] = set()

    def begin(self, config: Mapping[str, Any], *, step: int = 0) -> None:
        """Open the log of a run that is taken up after ``step`` steps.

        Rows that a killed process wrote after that step are dropped. If there are lines that are no rows, the file as
        it was stays beside the new one, and their numbers are told.

        Args:
            config: all settings of the run.
            step: 0: it begins.
        """
        if self._metrics.exists():
            rows, damaged = _read(self._metrics)
            if damaged:
                names = (self.folder / f"metrics.damaged-{number}.jsonl" for number in itertools.count(1))
                kept = next(path for path in names if not path.exists())
                shutil.copyfile(self._metrics, kept)
                lines = ", ".join(map(str, damaged[:10])) + (" ..." if damaged[10:] else "")
                print(f"{self._metrics}: no rows, and left out: lines {lines}; kept as {kept}", file=sys.stderr)
            write_text(self._metrics, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        if self._settings.wandb != "disabled":
            self._wandb = _open_wandb(self.folder, self._settings, config)

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        """Write what is known after ``step`` steps; lists are numbers by bin, None where there is none.

        JSON has no NaN and no infinity: they become None, and are told once of each name.
        """
        finite = {name: _finite(value) for name, value in values.items()}
        for name in finite:
            if finite[name] != values[name] and name not in self._told:
                self._told.add(name)
                print(f"step {step}: {name} is {values[name]}: written as null in {self._metrics}", file=sys.stderr)
        with naming_full_disk(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        if self._wandb is not None:
            self._wandb.log({name: v for name, v in _flat(finite).items() if v is not None}, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Tell of a picture that lies in the run's folder."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Finish what wandb has open; a second time does nothing."""
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run; a last line that a killed process did not finish is left out.

    Raises:
        FileError: naming a line that is no row.
    """
    rows, damaged = _read(folder / METRICS)
    if damaged:
        raise FileError(f"{folder / METRICS}:{damaged[0]}: this is not a row of the log: delete the line")
    return rows


def _read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a log, and the numbers of lines that are none."""
    rows, damaged = [], []
    for number, line in enumerate(read_bytes(path, limit=1 << 32).split(b"\n")[:-1], start=1):
        try:
            row = parse_json(line.decode(), str(path))
        except ValueError:  # FileError, UnicodeDecodeError
            row = None
        step = row.get("step") if isinstance(row, dict) else None
        if isinstance(step, int) and not isinstance(step, bool) and step >= 0:
            rows.append(row)
        else:
            damaged.append(number)
    return rows, damaged


def _finite(value: Any) -> Any:
    """``value`` with None in place of NaN and infinity, in lists too."""
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_wandb(folder: Path, settings: LogSettings, config: Mapping[str, Any]) -> Any:
    import wandb

    return wandb.init(
        project=settings.project,
        name=folder.name,
        id=_wandb_id(folder),
        resume="allow" if settings.wandb == "online" else None,
        mode=settings.wandb,
        dir=folder,
        config=dict(config),
    )


def _wandb_id(folder: Path) -> str:
    """The run's name at wandb, kept in its folder, so that a run that is taken up stays one run."""
    path = folder / "wandb_id"
    kept = read_bytes(path) if path.exists() else b""
    if not re.fullmatch(rb"[0-9a-f]{8}", kept):
        if kept:
            print(f"{path} holds no name: the run begins anew at wandb", file=sys.stderr)
        kept = secrets.token_hex(4).encode()
        write_text(path, kept.decode())
    return kept.decode()


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists as one entry per place: ``loss_by_level/3``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat |= {f"{name}/{place}": entry for place, entry in enumerate(value)}
        else:
            flat[name] = value
    return flat
