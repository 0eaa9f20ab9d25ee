"""What several tests of the evaluation start from."""

from pathlib import Path

import pytest

from tests.evaluation import small


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two stories, and their films by the system ``one``."""
    small.write_films(tmp_path / "one", small.stories(tmp_path / "stories"))
    return tmp_path
