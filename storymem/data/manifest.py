"""The manifest of a training set: what each step finished, so that a run that was killed resumes where it stopped.

Everything that a later run relies on carries a checksum of itself: what is damaged counts as never written.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import TracebackType
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
OPEN_SHARDS = 64
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
    each appends lines of JSON to its own file and reads all. Damaged lines count as never written.

    Args:
        folder: of the files.
        step: names them, ``<step>-<worker>.jsonl``.
        worker: whose file is written.
    """

    def __init__(self, folder: Path, step: str, worker: int = 0) -> None:
        self.folder, self._path = folder, folder / f"{step}-{worker:03d}.jsonl"
        self._file: BinaryIO | None = None
        with naming_full_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.records: dict[tuple[str, str], dict[str, Any]] = {}  # by key and inputs
        for path in sorted(folder.glob(f"{step}-*.jsonl")):
            for record in filter(None, map(_record, _lines(path))):
                if self._is_valid(record):
                    self.records[record["key"], record["inputs"]] = record

    def _is_valid(self, record: dict[str, Any]) -> bool:
        return True

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if it is damaged."""
    try:
        return without_checksum(parse_json(line.decode(), "a line"), "a line")
    except ValueError:  # also what is not UTF-8
        return None


def _lines(path: Path) -> list[bytes]:
    lines = read_bytes(path, limit=NO_LIMIT).split(b"\n")
    return lines[:-1] if lines[-1] == b"" else lines


def _open_at_line_end(path: Path) -> BinaryIO:
    file = path.open("ab+", buffering=0)
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


# --- tensors ----------------------------------------------------------------------------------------------------------


class TensorManifest(Manifest):
    """Records whose tensors lie in shards beside it. Those of a missing or damaged shard count as none."""

    def __init__(self, folder: Path, worker: int = 0) -> None:
        self._intact: dict[str, bool] = {}
        self._lost: dict[tuple[str, str], str] = {}
        super().__init__(folder, "tensors", worker)

    @property
    def damaged(self) -> list[str]:
        """Missing or damaged shards with items that were not recomputed."""
        return sorted({shard for place, shard in self._lost.items() if place not in self.records})

    def _is_valid(self, record: dict[str, Any]) -> bool:
        shard = record.get("shard")
        if shard is None:
            return True
        if shard not in self._intact:
            self._intact[shard] = _is_intact(self.folder, record)
        if not self._intact[shard]:
            self._lost[record["key"], record["inputs"]] = shard
        return self._intact[shard]


class ShardWriter:
    """Collects tensors of many items in files of about equal size, ``shard-w000-00000.safetensors`` and so on.

    The records of a shard's items, with the shard's name, size and sha256, are added to ``manifest`` once the shard is
    on the disk. So a killed writer loses at most the items of one shard, or of two minutes; one that is stopped inside
    its ``with`` block, by a signal or an error, loses none.

    Args:
        manifest: of the cache, in whose folder the shards lie.
        worker: one writer for each at a time.
        shard_bytes: a shard is written as soon as it holds this much.
    """

    def __init__(self, manifest: TensorManifest, worker: int, shard_bytes: int) -> None:
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
        written = path.stat()
        shard = {"shard": path.stem, "bytes": written.st_size, "mtime_ns": written.st_mtime_ns}
        shard["sha256"] = hash_file(path)
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()


def _is_intact(folder: Path, record: Mapping[str, Any]) -> bool:
    """By size and time; a file with another time is read and compared."""
    try:
        path = check_regular(folder / f"{record['shard']}.safetensors")
    except (FileError, FileNotFoundError):
        return False
    status = path.stat()
    if status.st_size != record["bytes"]:
        return False
    return status.st_mtime_ns == record["mtime_ns"] or _sha256_at(path, status.st_mtime_ns) == record["sha256"]


@lru_cache(maxsize=4096)
def _sha256_at(path: Path, _mtime_ns: int) -> str:
    return hash_file(path)


class ShardReader:
    """Reads single tensors out of shards; may be used by several threads, and sent to other processes.

    Args:
        folder: of the shards.
        hashes: shard -> sha256 of its file, which is compared when the shard is first read in each process.
    """

    def __init__(self, folder: Path, hashes: Mapping[str, str]) -> None:
        self.folder, self.hashes = folder, hashes
        self._checked: set[str] = set()
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: str, key: str, name: str) -> Tensor:
        """The tensor ``name`` of the item ``key``, as it was stored.

        Raises:
            ValueError: naming the shard, if it is missing or damaged.
        """
        path = self.folder / f"{shard}.safetensors"
        if shard not in self._checked:
            if not path.is_file():
                raise FileError(f"{path} is missing: run prepare_data again, which recomputes it")
            if hash_file(check_regular(path)) != self.hashes[shard]:
                raise FileError(
                    f"{path} is damaged: its sha256 differs from the recorded one. Delete it and run prepare_data "
                    "again, which recomputes it"
                )
            self._checked.add(shard)
        with self._lock:
            file = self._opened(shard, path)
        return file.get_tensor(f"{key}/{name}")

    def _opened(self, shard: str, path: Path) -> Any:
        from safetensors import safe_open

        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= OPEN_SHARDS:  # open handles must not grow with the number of clips
            self._open.popitem(last=False)
        self._open[shard] = safe_open(path, framework="pt")
        return self._open[shard]

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.folder, self.hashes)
