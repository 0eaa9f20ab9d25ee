"""Fixtures of tests that train."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def training_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of ``prepare_data``; see :func:`tests.training.commands.make_set`. Not to be changed."""
    from tests.training.commands import make_set

    return make_set(tmp_path_factory.mktemp("training_set"))
