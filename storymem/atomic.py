"""Files that are either wholly there or not there at all, whenever the process is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which takes the place of ``path`` at the end of the block.

    If the block raises, ``path`` stays as it was. A process killed inside the block leaves the temporary
    file, which the next write of the same file overwrites. One writer at a time.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a whole file in one step."""
    with replacing(path) as partial:
        partial.write_bytes(content)
