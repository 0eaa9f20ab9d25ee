"""Tensors in many safetensors files: each file is whole or absent, and is checked before it is believed."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from storymem.data.sealed import read_sealed, write_sealed
from storymem.io import FileError, check_regular, hash_file, naming_full_disk, remove_leftovers, replacing

OPEN_SHARDS = 64
SHARD_SECONDS = 120.0  # a smaller shard is better than more lost work
_NAME = re.compile(r"((?:clips|texts|blanks|frames)-w\d{3,}-\d{5,})\.(?:safetensors|json)")


class ShardWriter:
    """Collects tensors of many items and writes them in files of about equal size.

    A file ``<prefix>-00000.safetensors`` is followed by ``<prefix>-00000.json``, which holds the file's sha256 and one
    record per item. That second file is the moment at which the shard is finished: without it, the first is written
    over. So a killed writer loses at most the items of one shard, or of two minutes; one that is stopped inside its
    ``with`` block, by a signal or an error, loses none.

    Args:
        folder: where the shards lie; made if need be.
        prefix: begins their names, ``<kind>-w<worker>``; one writer per prefix at a time.
        shard_bytes: a shard is written as soon as it holds this much.
    """

    def __init__(self, folder: Path, prefix: str, shard_bytes: int) -> None:
        self.folder, self.prefix, self.shard_bytes = folder, prefix, shard_bytes
        with naming_full_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f".{prefix}-*.partial"):
                left.unlink()
        numbers = (path.stem.removeprefix(f"{prefix}-") for path in folder.glob(f"{prefix}-*.json"))
        self._next = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
        self._tensors: dict[str, Tensor] = {}
        self._records: list[dict[str, Any]] = []
        self._bytes = 0
        self._since = time.monotonic()

    def add(self, key: str, tensors: Mapping[str, Tensor], *, made: str = "", **record: Any) -> None:
        """Put ``tensors`` of the item ``key`` as ``<key>/<name>``; ``record`` is kept beside them.

        ``made`` tells versions of one item apart, as in :class:`storymem.data.journal.Journal`.
        """
        for name, tensor in tensors.items():
            self._tensors[f"{key}/{name}"] = tensor.contiguous()
            self._bytes += tensor.nbytes
        self._records.append({"key": key, "made": made, **record})
        if self._bytes >= self.shard_bytes or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was collected, if anything was. ``FileError`` if the disk is full."""
        if not self._records:
            return
        path = self.folder / f"{self.prefix}-{self._next:05d}.safetensors"
        with replacing(path) as partial:
            partial.write_bytes(save(self._tensors))  # save_file has a temporary file of its own, which a kill leaves
        written = path.stat()
        done = {"bytes": written.st_size, "mtime_ns": written.st_mtime_ns, "sha256": hash_file(path)}
        write_sealed(path.with_suffix(".json"), {**done, "records": self._records})
        self._next += 1
        self._tensors, self._records, self._bytes = {}, [], 0
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()


@dataclass(frozen=True)
class Finished:
    """What writers of one kind of shard finished.

    Args:
        records: (key, made) of an item -> its record, with its ``shard``.
        hashes: shard -> sha256 of its file.
        damaged: shards whose files are missing or not what was written, which count as never written.
    """

    records: Mapping[tuple[str, str], dict[str, Any]]
    hashes: Mapping[str, str]
    damaged: list[str]

    def get(self, key: str, made: str = "") -> dict[str, Any] | None:
        """The record of an item, if it was made under the same conditions."""
        return self.records.get((key, made))


def finished(folder: Path, kind: str) -> Finished:
    """What all workers finished of ``kind``. A file that has changed since it was written is read, and compared."""
    records: dict[tuple[str, str], dict[str, Any]] = {}
    hashes: dict[str, str] = {}
    damaged: list[str] = []
    for path in sorted(folder.glob(f"{kind}-*.json")):
        try:
            done = read_sealed(path)
            _check(path.with_suffix(".safetensors"), done)
        except (FileError, FileNotFoundError):
            damaged.append(path.stem)
            continue
        hashes[path.stem] = done["sha256"]
        records |= {(record["key"], record["made"]): {**record, "shard": path.stem} for record in done["records"]}
    return Finished(records, hashes, damaged)


def mend(folder: Path) -> None:
    """Delete what killed processes left in a folder that nobody writes to now: files that no record finished."""
    remove_leftovers(folder)
    for path in list(folder.glob("*.safetensors")):
        if _NAME.fullmatch(path.name) and path.is_file() and not path.with_suffix(".json").exists():
            path.unlink()


def remove_damaged(folder: Path, *kinds: Finished) -> None:
    """Delete damaged shards; call it once all that they held is made again."""
    for name in (name for kind in kinds for name in kind.damaged):
        for path in (folder / f"{name}.json", folder / f"{name}.safetensors"):
            if _NAME.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
                path.unlink(missing_ok=True)


def _check(path: Path, done: Mapping[str, Any]) -> None:
    """``FileError`` if a shard is not the file that was written."""
    status = check_regular(path).stat()
    same = (status.st_size, status.st_mtime_ns) == (done["bytes"], done["mtime_ns"])
    if status.st_size != done["bytes"] or not (same or _sha256_at(path, status.st_mtime_ns) == done["sha256"]):
        raise FileError(f"{path} is damaged")


@lru_cache(maxsize=4096)
def _sha256_at(path: Path, _mtime_ns: int) -> str:
    return hash_file(path)


class ShardReader:
    """Reads single tensors out of shards; may be used by several threads, and sent to other processes.

    Args:
        folder: where the shards lie.
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
            ValueError: naming the shard, if it is missing or is not what was written.
        """
        path = self.folder / f"{shard}.safetensors"
        if shard not in self._checked:
            self._check(shard, path)
        with self._lock:
            file = self._shard(shard, path)
        return file.get_tensor(f"{key}/{name}")

    def _shard(self, shard: str, path: Path) -> Any:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        # One file per few clips: open handles must not grow with the number of clips.
        while len(self._open) >= OPEN_SHARDS:
            self._open.popitem(last=False)
        self._open[shard] = safe_open(path, framework="pt")
        return self._open[shard]

    def _check(self, shard: str, path: Path) -> None:
        if not path.is_file():
            raise FileError(f"{path} is missing: run prepare_data again, and it is made again")
        if hash_file(check_regular(path)) != self.hashes[shard]:
            raise FileError(
                f"{path} is damaged: its sha256 is not the one written down when it was made. Delete it and run "
                "prepare_data again, and it is made again"
            )
        self._checked.add(shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.folder, self.hashes)


def padded(rows: Tensor, length: int) -> Tensor:
    """[n, D] with zeros after it, up to [length, D]; float32."""
    result = torch.zeros(length, rows.shape[1])
    result[: len(rows)] = rows
    return result
