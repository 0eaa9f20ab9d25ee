"""Tensors in many safetensors files: each file is whole or absent, and is checked before it is believed."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from storymem.io import replacing, write_atomically

OPEN_SHARDS = 64
SHARD_SECONDS = 120.0  # a smaller shard is better than more lost work


class ShardWriter:
    """Collects tensors of many items and writes them in files of about equal size.

    A file ``<prefix>-00000.safetensors`` is followed by ``<prefix>-00000.json``, which holds the file's sha256 and one
    record per item. That second file is the moment at which the shard is finished: without it, the first is written
    over. So a killed writer loses at most the items of one shard, or of two minutes.

    Args:
        folder: where the shards lie; made if need be.
        prefix: begins their names; one writer per prefix at a time.
        shard_bytes: a shard is written as soon as it holds this much.
    """

    def __init__(self, folder: Path, prefix: str, shard_bytes: int) -> None:
        self.folder, self.prefix, self.shard_bytes = folder, prefix, shard_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._next = 1 + max(
            (int(path.stem.rpartition("-")[2]) for path in folder.glob(f"{prefix}-*.json")), default=-1
        )
        self._tensors: dict[str, Tensor] = {}
        self._records: list[dict[str, Any]] = []
        self._bytes = 0
        self._since = time.monotonic()

    def add(self, key: str, tensors: Mapping[str, Tensor], **record: Any) -> None:
        """Put ``tensors`` of the item ``key`` as ``<key>/<name>``; ``record`` is kept beside them."""
        for name, tensor in tensors.items():
            self._tensors[f"{key}/{name}"] = tensor.contiguous()
            self._bytes += tensor.nbytes
        self._records.append({"key": key, **record})
        if self._bytes >= self.shard_bytes or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was collected, if anything was."""
        if not self._records:
            return
        name = f"{self.prefix}-{self._next:05d}"
        path = self.folder / f"{name}.safetensors"
        with replacing(path) as partial:
            save_file(self._tensors, partial)
        done = {"sha256": sha256_of(path), "records": self._records}
        write_atomically(path.with_suffix(".json"), json.dumps(done).encode())
        self._next += 1
        self._tensors, self._records, self._bytes = {}, [], 0
        self._since = time.monotonic()


def finished_records(folder: Path, prefix: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What writers of prefixes that begin with ``prefix`` finished: key -> record with its ``shard``, shard -> sha256.

    Of an item that was written twice the later record counts. A shard whose tensors are gone counts as never written.
    """
    records: dict[str, dict[str, Any]] = {}
    hashes: dict[str, str] = {}
    for path in sorted(folder.glob(f"{prefix}-*.json")):
        if not path.with_suffix(".safetensors").is_file():
            continue
        done = json.loads(path.read_text())
        hashes[path.stem] = done["sha256"]
        records |= {record["key"]: {**record, "shard": path.stem} for record in done["records"]}
    return records, hashes


class ShardReader:
    """Reads single tensors out of shards; may be sent to other processes.

    Args:
        folder: where the shards lie.
        hashes: shard -> sha256 of its file, which is compared when the shard is first read in each process.
    """

    def __init__(self, folder: Path, hashes: Mapping[str, str]) -> None:
        self.folder, self.hashes = folder, hashes
        self._checked: set[str] = set()
        self._open: OrderedDict[str, Any] = OrderedDict()

    def read(self, shard: str, key: str, name: str) -> Tensor:
        """The tensor ``name`` of the item ``key``, as it was stored.

        Raises:
            ValueError: naming the shard, if it is missing or is not what was written.
        """
        return self._shard(shard).get_tensor(f"{key}/{name}")

    def _shard(self, shard: str) -> Any:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path = self.folder / f"{shard}.safetensors"
        if shard not in self._checked:
            self._check(shard, path)
        # One file per few clips: open handles must not grow with the number of clips.
        while len(self._open) >= OPEN_SHARDS:
            self._open.popitem(last=False)
        self._open[shard] = safe_open(path, framework="pt")
        return self._open[shard]

    def _check(self, shard: str, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path} is missing: run prepare_data again, and it is made again")
        if sha256_of(path) != self.hashes[shard]:
            raise ValueError(
                f"{path} is damaged: its sha256 is not the one written down when it was made. Delete it and run "
                "prepare_data again, and it is made again"
            )
        self._checked.add(shard)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def sha256_of(path: Path) -> str:
    """Of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def padded(rows: Tensor, length: int) -> Tensor:
    """[n, D] with zeros after it, up to [length, D]; float32."""
    result = torch.zeros(length, rows.shape[1])
    result[: len(rows)] = rows
    return result
