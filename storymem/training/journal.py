"""What a step has done so far: a line of JSON per item, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO


class Journal:
    """Records by key, each with ``made``: a digest of all that the record depends on.

    A record whose ``made`` is not what it would be now is as good as none, and hides no other. Several workers may
    write journals of one name; each appends to its own file and reads all.

    Args:
        folder: where the files lie.
        name: of the step.
        worker: whose file is written.
    """

    def __init__(self, folder: Path, name: str, worker: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{name}-{worker:03d}.jsonl"
        self._file: TextIO | None = None
        self._records: dict[tuple[str, str], dict[str, Any]] = {}  # by key and made
        for path in sorted(folder.glob(f"{name}-*.jsonl")):
            self._records |= {(record["key"], record["made"]): record for record in _lines(path)}

    def get(self, key: str, made: str) -> dict[str, Any] | None:
        """The record of an item, if it was made under the same conditions."""
        return self._records.get((key, made))

    def add(self, key: str, made: str, **record: Any) -> None:
        """Write down one item; it is on its way to the disk when this returns."""
        if self._file is None:
            _drop_broken_end(self._path)
            self._file = self._path.open("a", encoding="utf-8")
        line = {"key": key, "made": made, **record}
        self._records[key, made] = line
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def digest(*conditions: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(conditions, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last line's end was broken off
        yield json.loads(line)


def _drop_broken_end(path: Path) -> None:
    if path.is_file():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])
