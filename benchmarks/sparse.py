"""Checkpoints of true size that take no disk: headers as published, and holes, which read as zeros, for the numbers.

A few tensors hold seeded numbers, so that what the networks compute is not zero throughout.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

Shapes = Mapping[str, tuple[int, ...]]
Dtype = Literal["F32", "BF16", "F8_E4M3", "U8"]
_BYTES: dict[str, int] = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
_MOST_WRITTEN = 1 << 22  # numbers of a tensor that is not all zeros
#: Of a GGUF file: its number, and numbers and bytes per block.
GGUF_TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144)}


def write_safetensors(
    path: Path,
    shapes: Shapes,
    dtype_of: Callable[[str], Dtype],
    filled: Callable[[str], bool],
    *,
    shard_gb: float | None = None,
) -> None:
    """Write tensors as one file, or as shards of at most ``shard_gb`` with their index beside ``path``.

    Args:
        dtype_of: the type of a tensor by its name.
        filled: whether a tensor holds seeded numbers.
    """
    sizes = {name: _BYTES[dtype_of(name)] * int(np.prod(shape)) for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shard_gb and shards[-1] and sum(sizes[each] for each in [*shards[-1], name]) > shard_gb * 1e9:
            shards.append([])
        shards[-1].append(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(shards)
    files = [path if count == 1 else path.with_stem(f"{path.stem}-{n + 1:05}-of-{count:05}") for n in range(count)]
    for file, names in zip(files, shards, strict=True):
        _write_file(file, {name: shapes[name] for name in names}, dtype_of, filled, sizes)
    if count > 1:
        index = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
        path.with_name(f"{path.name}.index.json").write_text(json.dumps({"weight_map": index}))


def _write_file(
    path: Path,
    shapes: Shapes,
    dtype_of: Callable[[str], Dtype],
    filled: Callable[[str], bool],
    sizes: Mapping[str, int],
) -> None:
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": dtype_of(name), "shape": list(shape), "data_offsets": [end, end + sizes[name]]}
        end += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        begin = file.tell()
        for name, shape in shapes.items():
            if filled(name):
                file.seek(begin + header[name]["data_offsets"][0])
                file.write(seeded_numbers(name, shape, dtype_of(name)))
        file.truncate(begin + end)


def seeded_numbers(name: str, shape: tuple[int, ...], dtype: str) -> bytes:
    """Small random numbers, ones for the scales of norms, for the first few million numbers of a tensor."""
    count = min(int(np.prod(shape)), _MOST_WRITTEN)
    values = torch.randn(count, generator=torch.Generator().manual_seed(len(name))) * 0.02
    if (len(shape) <= 1 and name.endswith(("weight", "gamma", "scale_weight"))) or "gamma" in name:
        values = torch.ones(count)
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F16": torch.float16}
    return values.to(kinds[dtype]).view(torch.uint8).numpy().tobytes()


def write_gguf(path: Path, shapes: Shapes, type_of: Callable[[str], str], filled: Callable[[str], bool]) -> None:
    """Write a GGUF file of version 3; tensors in blocks are zeros."""
    key, value = b"general.architecture", b"wan"
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), 1) + struct.pack("<Q", len(key)) + key
    head += struct.pack("<IQ", 8, len(value)) + value
    offsets, end = {}, 0
    for name, shape in shapes.items():
        number, block, size = GGUF_TYPES[type_of(name)]
        head += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", number, end)
        offsets[name] = end
        end += -(-int(np.prod(shape)) // block * size // 32) * 32
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % 32))
        begin = file.tell()
        for name, shape in shapes.items():
            if filled(name) and type_of(name) in ("F32", "F16"):
                file.seek(begin + offsets[name])
                file.write(seeded_numbers(name, shape, type_of(name)))
        file.truncate(begin + end)
