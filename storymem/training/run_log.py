"""What a run tells: rows of numbers and pictures, in its folder, and to wandb if asked."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storymem.io import write_atomically
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
    """The log of one run; only the main process has one.

    Rows go to ``metrics.jsonl``, a line of JSON each, with at least ``step``. A run that is taken up at a step drops
    the rows that a killed process wrote after it.

    Args:
        folder: of the run.
        settings: see :class:`LogSettings`.
        config: all settings of the run.
        step: after how many steps it is taken up.
    """

    def __init__(self, folder: Path, settings: LogSettings, *, config: Mapping[str, Any], step: int = 0) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = folder / METRICS
        if self._metrics.exists():
            kept = [row for row in read_metrics(folder) if row["step"] <= step]
            write_atomically(self._metrics, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._wandb = None if settings.wandb == "disabled" else _open_wandb(folder, settings, config)

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        """Write what is known after ``step`` steps; lists are numbers by bin, None where there is none."""
        with self._metrics.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._wandb is not None:
            self._wandb.log({name: v for name, v in _flat(values).items() if v is not None}, step=step)

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
    """The rows of a run; a last line that a killed process did not finish is left out."""
    lines = (folder / METRICS).read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


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
    if not path.exists():
        write_atomically(path, secrets.token_hex(4).encode())
    return path.read_text()


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists as one entry per place: ``loss_by_level/3``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat |= {f"{name}/{place}": entry for place, entry in enumerate(value)}
        else:
            flat[name] = value
    return flat
