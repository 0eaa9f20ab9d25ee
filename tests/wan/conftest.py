"""Fixtures of tests of adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import WanImageToVideoPipeline


@pytest.fixture
def stock() -> WanImageToVideoPipeline:
    """A pipeline of diffusers' own with two small experts, of which nothing else is needed."""
    from tests.wan.adapters import plain

    return plain()


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """An adapter for it, as the released files are."""
    from tests.wan.adapters import released_state, write_pair

    return write_pair(tmp_path / "adapter", released_state(3), released_state(4))
