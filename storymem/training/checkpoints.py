"""Checkpoints of a run: folders that are either complete or absent, of which the newest stay. Loads no torch.

Accelerate's ``save_state`` has no digests and no fallback to an older checkpoint, and wants the same processes.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storymem.data.manifest import read_checked, write_checked
from storymem.io import FileError, check_regular, hash_file, replacing_folder, settle_folder

DESCRIPTION = "checkpoint.json"
FORMAT = 2
_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose ``checkpoint.json`` has been read."""

    path: Path
    step: int  # how many were done
    about: Mapping[str, Any]  # the run: its configuration, for one
    state: Mapping[str, Any]  # of the trainer, except for tensors
    files: Mapping[str, tuple[int, str]]  # path in the folder -> size in bytes, sha256

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """The checkpoint in ``folder``; its tensors are not read.

        Raises:
            FileNotFoundError, FileError: if ``checkpoint.json`` is missing, damaged or of another version.
        """
        values = read_checked(folder / DESCRIPTION)
        if values.pop("format") != FORMAT or folder.name != _folder_name(values["step"]):
            raise FileError(f"{folder / DESCRIPTION} is of another version or another checkpoint")
        values["files"] = {name: (size, digest) for name, (size, digest) in values["files"].items()}
        return cls(path=folder, **values)

    def verify(self) -> None:
        """Raise ``FileError`` if a file differs from what was written."""
        for name, digest in _digests(self.path, self.files).items():
            if digest != self.files[name][1]:
                raise FileError(f"{self.path / name} is damaged: its sha256 differs from the recorded one")


@dataclass(frozen=True)
class Checkpoints:
    """The folder ``checkpoints`` of a run: ``step_00000500`` and the like."""

    folder: Path
    keep: int = field(kw_only=True)  # how many stay
    about: Mapping[str, Any] = field(kw_only=True, default_factory=dict)  # the run; stored with each checkpoint

    def steps(self) -> list[int]:
        """After which steps there is a checkpoint, damaged or not, ascending."""
        names = [_NAME.fullmatch(path.name) for path in self.folder.glob("step_*")]
        return sorted(int(name[1]) for name in names if name is not None)

    def path(self, step: int) -> Path:
        """The checkpoint after ``step`` steps."""
        return self.folder / _folder_name(step)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is not damaged, with a warning of damaged ones. None if there is no checkpoint.

        Raises:
            FileError: if there are checkpoints and all are damaged.
        """
        faults = []
        for step in reversed(self.steps()):
            try:
                found = Checkpoint.read(self.path(step))
                found.verify()
            except (OSError, FileError) as error:
                faults.append(f"{self.path(step)} is damaged or of an older version, and is skipped: {error}")
                continue
            print("".join(f"{fault}\n" for fault in faults), end="", file=sys.stderr)
            return found
        if faults:
            raise FileError(
                "\n".join(faults) + f"\nno intact checkpoint is left in {self.folder}: restore one from a backup, or "
                "start again with another output"
            )
        return None

    def newest_readable(self) -> Checkpoint | None:
        """The newest checkpoint with a readable description; its files are not checked."""
        for step in reversed(self.steps()):
            try:
                return Checkpoint.read(self.path(step))
            except (FileNotFoundError, FileError):
                continue
        return None

    @contextmanager
    def writing(self, step: int, state: Mapping[str, Any] | None = None) -> Iterator[Path]:
        """Yield an empty folder that becomes the checkpoint after ``step`` at the end of the block.

        If the block raises or the process is killed, there is no such checkpoint. Then older checkpoints beyond
        ``keep`` are removed, the oldest first; those that hold anything that was not written here stay.
        """
        self.remove_unfinished()
        with replacing_folder(self.path(step)) as partial:
            yield partial
            names = [str(path.relative_to(partial)) for path in sorted(partial.rglob("*")) if path.is_file()]
            sizes = {name: (partial / name).stat().st_size for name in names}
            files = {name: [sizes[name], digest] for name, digest in _digests(partial, names).items()}
            description = {"format": FORMAT, "step": step, "about": self.about, "state": state or {}, "files": files}
            write_checked(partial / DESCRIPTION, description)
        # Later ones were skipped as damaged, and are replaced when the run comes to them.
        for old in [earlier for earlier in self.steps() if earlier <= step][: -self.keep]:
            if self._is_ours(old):
                removed = self.folder / f".{self.path(old).name}.partial"  # half a checkpoint must not look like one
                self.path(old).rename(removed)
                shutil.rmtree(removed)

    def remove_unfinished(self) -> None:
        """Remove what killed processes left."""
        for path in self.folder.glob(".step_*.partial"):
            settle_folder(path.with_name(path.name[1:].removesuffix(".partial").removesuffix(".old")))

    def _is_ours(self, step: int) -> bool:
        folder = self.path(step)
        try:
            known = {DESCRIPTION, *Checkpoint.read(folder).files}
        except (FileNotFoundError, FileError):
            return False
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
        return not folder.is_symlink() and found <= known


def _folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of each file, several at a time: a checkpoint of a large model has many gigabytes."""
    names = list(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: hash_file(check_regular(folder / name)), names), strict=True))
