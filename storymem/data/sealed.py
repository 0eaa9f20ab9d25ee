"""JSON that carries a digest of itself: what a later run believes is what was written, or it is told from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storymem.io import FileError, hash_json, parse_json, read_json, write_json

NO_LIMIT = 1 << 40  # bytes: these files grow with the number of clips
_DIGEST = "digest"


def digest(*conditions: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hash_json(conditions)[:16]


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` and its digest."""
    return {**content, _DIGEST: digest(content)}


def unsealed(value: Any, where: str) -> dict[str, Any]:
    """What :func:`sealed` was given. ``FileError`` if ``value`` is anything else; ``where`` begins its message."""
    if isinstance(value, dict):
        content = {name: entry for name, entry in value.items() if name != _DIGEST}
        if value.get(_DIGEST) == digest(content):
            return content
    raise FileError(f"{where} is not what was written: it is damaged, or of another version")


def unsealed_line(line: bytes) -> dict[str, Any] | None:
    """A line of a file of sealed JSON; None if it is damaged."""
    try:
        return unsealed(parse_json(line.decode(), "a line"), "a line")
    except ValueError:  # also of what is no UTF-8
        return None


def read_sealed(path: Path) -> dict[str, Any]:
    """The content of a file of :func:`write_sealed`; ``FileError`` if it is damaged."""
    return unsealed(read_json(path, limit=NO_LIMIT), str(path))


def write_sealed(path: Path, content: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write a JSON file and its digest in one step. ``FileError`` if the disk is full."""
    write_json(path, sealed(content), indent=indent)
