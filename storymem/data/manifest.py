"""The manifest of a training set: what each step finished, so that a run that was killed resumes where it stopped.

Everything that a later run relies on carries a checksum of itself: what is damaged counts as never written.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from storymem.io import (
    FileError,
    check_regular,
    hash_file,
    hash_json,
    naming_full_disk,
    parse_json,
    read_bytes,
    read_json,
    replacing,
    write_json,
)

if TYPE_CHECKING:
    from torch import Tensor

NO_LIMIT = 1 << 40  # bytes: these files grow with the number of clips
SHARD_SECONDS = 120.0  # a smaller shard is better than more lost work
_CHECKSUM = "checksum"


# --- JSON with a checksum ---------------------------------------------------------------------------------------------


def digest(*content: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hash_json(content)[:16]


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` and its checksum."""
    return {**content, _CHECKSUM: digest(content)}


def without_checksum(value: Any, where: str) -> dict[str, Any]:
    """The inverse of :func:`with_checksum`. ``FileError`` if the checksum is missing or wrong; ``where`` names it."""
    if isinstance(value, dict):
        content = {name: entry for name, entry in value.items() if name != _CHECKSUM}
        if value.get(_CHECKSUM) == digest(content):
            return content
    raise FileError(f"{where}: its checksum is wrong: it is damaged, or of another version")


def read_checked(path: Path) -> dict[str, Any]:
    """The content of a file of :func:`write_checked`; ``FileError`` if it is damaged."""
    return without_checksum(read_json(path, limit=NO_LIMIT), str(path))


def write_checked(path: Path, content: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write a JSON file with a checksum in one step. ``FileError`` if the disk is full."""
    write_json(path, with_checksum(content), indent=indent)


# --- records ----------------------------------------------------------------------------------------------------------


class Manifest:
    """Records of one step by key, each with ``inputs``: a digest of all that the record depends on.

    A record with other inputs counts as none, and hides no other. Several workers may write the manifest of a step:
    each appends lines of JSON to its own file and reads all. Damaged lines count as never written, and so do records
    whose tensors are in a shard (see :class:`ShardWriter`) that is missing or damaged.

    Args:
        folder: of the files.
        step: names them, ``<step>-<worker>.jsonl``.
        worker: the one whose file is written.

    Attributes:
        records: by key and inputs.
        damaged: missing or damaged shards with items that were not recomputed.
    """

    def __init__(self, folder: Path, step: str, worker: int = 0) -> None:
        self.folder, self._path = folder, folder / f"{step}-{worker:03d}.jsonl"
        self._file: BinaryIO | None = None
        with naming_full_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.records: dict[tuple[str, str], dict[str, Any]] = {}
        lost: dict[tuple[str, str], str] = {}
        is_intact = cache(_is_intact)
        for path in sorted(folder.glob(f"{step}-*.jsonl")):
            for record in _read_lines(path):
                place = record["key"], record["inputs"]
                if "shard" not in record or is_intact(folder, *(record[name] for name in _SHARD)):
                    self.records[place] = record
                else:
                    lost[place] = record["shard"]
        self.damaged = sorted({shard for place, shard in lost.items() if place not in self.records})

    def get(self, key: str, inputs: str = "") -> dict[str, Any] | None:
        """The record of an item, if it depends on the same inputs."""
        return self.records.get((key, inputs))

    def add(self, key: str, inputs: str = "", **record: Any) -> None:
        """Append a record; the operating system has it when this returns. ``FileError`` if the disk is full."""
        line = {"key": key, "inputs": inputs, **record}
        content = json.dumps(with_checksum(line), ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")
        with naming_full_disk(self._path):
            if self._file is None:
                self._file = _open_at_line_end(self._path)
            rest = memoryview(content + b"\n")
            while rest:  # a disk that is nearly full takes a part
                rest = rest[self._file.write(rest) :]
        self.records[key, inputs] = line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, except for damaged lines."""
    for line in read_bytes(path, limit=NO_LIMIT).split(b"\n"):
        try:
            yield without_checksum(parse_json(line.decode(), "a line"), "a line")
        except ValueError:  # also what is not UTF-8, and the end of the last line
            continue


def _open_at_line_end(path: Path) -> BinaryIO:
    file = path.open("ab+", buffering=0)
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


# --- tensors ----------------------------------------------------------------------------------------------------------

_SHARD = ("shard", "bytes", "mtime_ns", "sha256")  # of a record: name, size, time and hash of the file


class ShardWriter:
    """Collects tensors of many items in files of about equal size, ``shard-w000-00000.safetensors`` and so on.

    The records of a shard's items are added to ``manifest`` once the shard is on the disk. So a killed writer loses at
    most the items of one shard, or of two minutes; one that is stopped inside its ``with`` block, by a signal or an
    error, loses none.

    Args:
        manifest: of the cache, in whose folder the shards lie.
        worker: one writer for each at a time.
        shard_bytes: a shard is written as soon as it holds this much.
    """

    def __init__(self, manifest: Manifest, worker: int, shard_bytes: int) -> None:
        self._manifest, self._prefix, self._shard_bytes = manifest, f"shard-w{worker:03d}-", shard_bytes
        numbers = (path.stem.removeprefix(self._prefix) for path in manifest.folder.glob(f"{self._prefix}*"))
        self._next = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
        self._clear()

    def add(self, key: str, tensors: Mapping[str, Tensor], *, inputs: str = "", **record: Any) -> None:
        """Store ``tensors`` of the item ``key`` as ``<key>/<name>``, and ``record`` in the manifest."""
        for name, tensor in tensors.items():
            self._tensors[f"{key}/{name}"] = tensor.contiguous()
            self._bytes += tensor.nbytes
        self._items.append((key, inputs, record))
        if self._bytes >= self._shard_bytes or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was collected, if anything was. ``FileError`` if the disk is full."""
        from safetensors.torch import save

        if not self._items:
            return
        path = self._manifest.folder / f"{self._prefix}{self._next:05d}.safetensors"
        with replacing(path) as partial:
            partial.write_bytes(save(self._tensors))  # a killed save_file leaves a temporary file of its own
        status = path.stat()
        shard = dict(zip(_SHARD, (path.stem, status.st_size, status.st_mtime_ns, hash_file(path)), strict=True))
        for key, inputs, record in self._items:
            self._manifest.add(key, inputs, **record, **shard)
        self._next += 1
        self._clear()

    def _clear(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._items: list[tuple[str, str, dict[str, Any]]] = []
        self._bytes, self._since = 0, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()


def _is_intact(folder: Path, shard: str, size: int, mtime_ns: int, sha256: str) -> bool:
    """By size and time; a file with another time is read and compared."""
    try:
        path = check_regular(folder / f"{shard}.safetensors")
    except (FileError, FileNotFoundError):
        return False
    status = path.stat()
    if status.st_size != size:
        return False
    return status.st_mtime_ns == mtime_ns or _sha256_at(path, status.st_mtime_ns) == sha256


@lru_cache(maxsize=4096)
def _sha256_at(path: Path, _mtime_ns: int) -> str:
    return hash_file(path)
