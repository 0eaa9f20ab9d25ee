"""Checkpoints of a run: folders that are either wholly there or not at all, of which the newest stay."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAME = re.compile(r"step_(\d{8})")


class Checkpoints:
    """The folder ``checkpoints`` of a run.

    Args:
        folder: holds ``step_00000500`` and the like.
        keep: how many stay.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """After which steps there is a checkpoint, ascending."""
        names = [_NAME.fullmatch(path.name) for path in self.folder.glob("step_*")]
        return sorted(int(name[1]) for name in names if name is not None)

    def path(self, step: int) -> Path:
        """The checkpoint after ``step`` steps."""
        return self.folder / f"step_{step:08d}"

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """Yield an empty folder that becomes the checkpoint after ``step`` at the end of the block.

        If the block raises or the process is killed, there is no such checkpoint; what is left of it goes when the
        next is written. Checkpoints beyond ``keep`` are removed, the oldest first.
        """
        self.remove_unfinished()
        partial = self.folder / f".{self.path(step).name}.partial"
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in [*(path for path in partial.rglob("*") if path.is_file()), partial]:
                _flush(path)
            shutil.rmtree(self.path(step), ignore_errors=True)
            partial.rename(self.path(step))
            _flush(self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for old in self.steps()[: -self.keep]:
            # Renamed first: half a checkpoint must not be taken for a whole one.
            doomed = self.folder / f".{self.path(old).name}.partial"
            self.path(old).rename(doomed)
            shutil.rmtree(doomed)

    def remove_unfinished(self) -> None:
        """Remove what killed processes left."""
        for path in self.folder.glob(".step_*.partial"):
            shutil.rmtree(path)


def _flush(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
