"""Finds reference cases: in ``tests/reference`` or in the folder that ``STORYMEM_REFERENCE`` names.

Cases are recognised by what files hold, not by what they or their folders are called.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

ROOT = Path(os.environ.get("STORYMEM_REFERENCE") or Path(__file__).parent / "reference").absolute()


def folders_with(name: str) -> list[Path]:
    """Folders at any depth below the root that hold a file of this name, in a stable order."""
    return sorted(found.parent for found in ROOT.rglob(name))


def json_files(*keys: str) -> list[Path]:
    """JSON files below the root that are objects with all these keys."""

    def keys_of(path: Path) -> set[str]:
        content = json.loads(path.read_text(encoding="utf-8"))
        return set(content) if isinstance(content, dict) else set()

    return sorted(path for path in ROOT.rglob("*.json") if set(keys) <= keys_of(path))


def label(path: Path) -> str:
    """A case's name in pytest's output: its path below the root."""
    return str(path.relative_to(ROOT))
