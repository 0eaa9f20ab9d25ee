"""Ways in which a file is damaged, drawn from a seed: by disks, transfers and other programs, or on purpose."""

from __future__ import annotations

import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

#: Raw JSON (and YAML) in the place of a value.
VALUES = (
    *('"text"', '""', "null", "true", "[]", "{}", "-1", "0.5", '[{"a": 1}]', "1e999", "NaN", "-Infinity", "9" * 5000),
    *('"\\u0000"', f'"{"x" * 300}"', '"../../x"', '"/etc/passwd"', '"<script>"', f'"{"9" * 5000}"'),
    *("[" * 3000 + "]" * 3000, '{"a": ' * 90 + "1" + "}" * 90),
)
YAML_VALUES = (".inf", "&a [*a]", "!!python/name:os.system x", "2020-13-45", "? [a]", "0x" + "f" * 5000)
TEXTS = (".json", ".jsonl", ".yaml", ".html")
_PLACE = "here, and nowhere else"

Damage = Callable[[Path, random.Random], object]


def kinds_for(path: Path) -> list[str]:
    """The kinds of damage that make sense for a file of this name, in a fixed order."""
    own = {".png": ["checked header"], ".safetensors": ["value", "key", "not a number"], ".mp4": ["header"]}
    values = ["value", "key"] if path.suffix in (".json", ".jsonl", ".yaml") else []
    texts = ["not UTF-8", "UTF-16", "NUL", "deep"] if path.suffix in TEXTS else []
    return [*_ANY, *texts, *values, *own.get(path.suffix, ["header"] if path.suffix == ".gguf" else [])]


def damage(path: Path, kind: str, draw: random.Random) -> None:
    """Damage the file at ``path`` in the way ``kind``, of :func:`kinds_for`."""
    if kind in _PLACES:
        _PLACES[kind](path, draw)
    else:
        path.write_bytes(_CONTENTS[kind](path, draw))


def _cut(path: Path, draw: random.Random) -> bytes:
    content = path.read_bytes()
    return content[: draw.randrange(len(content))]


def _flipped(path: Path, draw: random.Random, end: int | None = None) -> bytes:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 4))):
        content[draw.randrange(end or len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def _inserted(new: Callable[[random.Random], bytes]) -> Callable[[Path, random.Random], bytes]:
    def insert(path: Path, draw: random.Random) -> bytes:
        content = path.read_bytes()
        place = draw.randrange(len(content))
        return content[:place] + new(draw) + content[place:]

    return insert


def _overwritten(new: bytes) -> Callable[[Path, random.Random], bytes]:
    def overwrite(path: Path, draw: random.Random) -> bytes:
        content = path.read_bytes()
        place = draw.randrange(len(content))
        return (content[:place] + new + content[place + len(new) :])[: len(content)]

    return overwrite


def _value(path: Path, draw: random.Random) -> bytes:
    """Another value in the place of one, at any depth."""
    values = VALUES + (YAML_VALUES if path.suffix == ".yaml" else ())
    return _edited(path, draw, lambda parent, key: parent.__setitem__(key, _PLACE), draw.choice(values))


def _key(path: Path, draw: random.Random) -> bytes:
    """An entry that is missing, or has another name."""

    def change(parent: Any, key: Any) -> None:
        value = parent.pop(key)
        if isinstance(parent, dict) and draw.random() < 0.5:
            parent[draw.choice((f"{key}x", "../x", "é", ""))] = value

    return _edited(path, draw, change)


def _edited(path: Path, draw: random.Random, change: Callable[[Any, Any], None], value: str = "") -> bytes:
    content = path.read_bytes()
    before, text, after = b"", content, b""
    if path.suffix == ".safetensors":
        (size,) = struct.unpack("<Q", content[:8])
        text, after = content[8 : 8 + size], content[8 + size :]
    elif path.suffix == ".jsonl":
        lines = content.splitlines(keepends=True)
        number = draw.randrange(len(lines))
        before, text, after = b"".join(lines[:number]), lines[number], b"\n" + b"".join(lines[number + 1 :])
    whole = [yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)]
    change(*draw.choice(_places(whole)))
    edited = json.dumps(whole[0] if whole else None, ensure_ascii=False).replace(f'"{_PLACE}"', value).encode()
    if path.suffix == ".safetensors":
        before = struct.pack("<Q", len(edited))
    return before + edited + after


def _places(node: Any) -> list[tuple[Any, Any]]:
    """All places of values below a node, as (parent, key)."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    return [place for key in keys for place in [(node, key), *_places(node[key])]]


def _not_a_number(path: Path, draw: random.Random) -> bytes:
    """All bits set in some of the numbers of a safetensors file, whatever their type."""
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    place = start + (len(content) - start - 16) * draw.randrange(8) // 8
    return content[:place] + b"\xff" * 16 + content[place + 16 :]


def _header(path: Path, draw: random.Random) -> bytes:
    """Bits that determine how the rest is read."""
    content = path.read_bytes()
    if path.suffix == ".gguf":
        return _flipped(path, draw, 400)
    start = content.index(b"moov")
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 4))):
        changed[draw.randrange(start, len(content))] = draw.randrange(256)
    return bytes(changed)


def _checked_header(path: Path, draw: random.Random) -> bytes:
    """Another size, depth or type of a PNG, with a checksum that fits."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(16, 29)] = draw.randrange(256)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def _in_its_place(make: Callable[[Path], object]) -> Damage:
    def replace(path: Path, _: random.Random) -> None:
        path.unlink()
        make(path)

    return replace


_PLACES: dict[str, Damage] = {
    "gone": lambda path, _: path.unlink(),
    "folder": _in_its_place(lambda path: path.mkdir()),
    "FIFO": _in_its_place(os.mkfifo),
    "link to itself": _in_its_place(lambda path: path.symlink_to(path.name)),
    "link to nothing": _in_its_place(lambda path: path.symlink_to("nothing")),
    "link to a device": _in_its_place(lambda path: path.symlink_to("/dev/zero")),
}
_CONTENTS: dict[str, Callable[[Path, random.Random], bytes]] = {
    "empty": lambda path, draw: b"",
    "cut": _cut,
    "flipped": _flipped,
    "inserted": _inserted(lambda draw: draw.randbytes(draw.choice((1, 8, 500)))),
    "zeros": _overwritten(bytes(64)),
    "noise": lambda path, draw: draw.randbytes(1000),
    "pickle": lambda path, draw: b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00exit\x85R.",
    "twice": lambda path, draw: path.read_bytes() * 2,
    "not UTF-8": _inserted(lambda draw: b"\xff\xfe"),
    "UTF-16": lambda path, draw: path.read_text(encoding="utf-8").encode("utf-16"),
    "NUL": _overwritten(b"\0"),
    "deep": lambda path, draw: draw.choice((b"[", b'{"a": ', b"- ")) * 20_000,
    "value": _value,
    "key": _key,
    "not a number": _not_a_number,
    "header": _header,
    "checked header": _checked_header,
}
_ANY = [*_PLACES, "empty", "cut", "flipped", "inserted", "zeros", "noise", "pickle", "twice"]
