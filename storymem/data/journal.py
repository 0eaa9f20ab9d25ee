"""What a step has done so far: a line of JSON per item, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from storymem.data.sealed import NO_LIMIT, sealed, unsealed_line
from storymem.io import naming_full_disk, read_bytes, write_atomically


class Journal:
    """Records by key, each with ``made``: a digest of all that the record depends on.

    A record whose ``made`` is not what it would be now is as good as none, and hides no other. Several workers may
    write journals of one name; each appends to its own file and reads all. Damaged lines count as never written.

    Args:
        folder: where the files lie.
        name: of the step.
        worker: whose file is written.
    """

    def __init__(self, folder: Path, name: str, worker: int = 0) -> None:
        with naming_full_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{name}-{worker:03d}.jsonl"
        self._file: BinaryIO | None = None
        self._records: dict[tuple[str, str], dict[str, Any]] = {}  # by key and made
        for path in sorted(folder.glob(f"{name}-*.jsonl")):
            records = filter(None, map(unsealed_line, _lines(path)))
            self._records |= {(record["key"], record["made"]): record for record in records}

    def get(self, key: str, made: str) -> dict[str, Any] | None:
        """The record of an item, if it was made under the same conditions."""
        return self._records.get((key, made))

    def add(self, key: str, made: str, **record: Any) -> None:
        """Write down one item; it is on its way to the disk when this returns. ``FileError`` if the disk is full."""
        line = {"key": key, "made": made, **record}
        content = json.dumps(sealed(line), ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")
        with naming_full_disk(self._path):
            if self._file is None:
                self._file = _opened(self._path)
            rest = memoryview(content + b"\n")
            while rest:  # a disk that is nearly full takes a part
                rest = rest[self._file.write(rest) :]
        self._records[key, made] = line

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def mend(journal: Path) -> int:
    """Take damaged lines out of a file that nobody writes now.

    Returns:
        how many they were, without a last line that a killed process broke off.
    """
    lines = _lines(journal)
    good = [unsealed_line(line) is not None for line in lines]
    if not all(good):
        write_atomically(journal, b"".join(line + b"\n" for line, is_good in zip(lines, good, strict=True) if is_good))
    return good[:-1].count(False)


def _lines(path: Path) -> list[bytes]:
    lines = read_bytes(path, limit=NO_LIMIT).split(b"\n")
    return lines[:-1] if lines[-1] == b"" else lines


def _opened(path: Path) -> BinaryIO:
    """For appending, after the end of a line."""
    file = path.open("ab+", buffering=0)
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file
