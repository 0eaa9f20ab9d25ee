"""Finds reference cases: in ``tests/reference`` or in the folder that ``STORYMEM_REFERENCE`` names."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(os.environ.get("STORYMEM_REFERENCE") or Path(__file__).parent / "reference")


def cases(room: str, pattern: str) -> list[Path]:
    """Folders at any depth below ``ROOT/room`` that hold a file matching ``pattern``, in a stable order."""
    return sorted({found.parent for found in (ROOT / room).rglob(pattern)})


def label(case: Path) -> str:
    """A case's name in pytest's output: its path below the root."""
    return str(case.relative_to(ROOT))
