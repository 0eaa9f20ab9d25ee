"""Fixtures that several files share."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

if TYPE_CHECKING:
    from storymem.wan.pipeline import WanMemoryToVideoPipeline
    from storymem.wan.settings import ModelSettings


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that train in forked processes come first: after a backward pass torch refuses another one in a fork."""
    items.sort(key=lambda item: item.get_closest_marker("trains_in_forks") is None)


def pytest_collection_finish() -> None:
    """Leave what imports made out of all later collections: each film makes three, which took half of its time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Networks this small run slower on several threads; parallel test runs do too."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _composed_once() -> Iterator[None]:
    """Hydra composes the configuration of a command twice, at first for ``hydra.mode`` alone, which no test changes."""
    with mock.patch("hydra._internal.hydra.Hydra.get_mode", return_value=None):
        yield


@pytest.fixture(scope="session")
def tiny_model() -> ModelSettings:
    """Settings of a model that makes a shot in a fraction of a second; see ``tests/wan/tiny.py``."""
    from tests.wan import tiny

    return tiny.settings()


@pytest.fixture(scope="module")
def pipe(tiny_model: ModelSettings) -> WanMemoryToVideoPipeline:
    """A pipeline to call; tests that change a pipeline build their own."""
    from storymem.wan.loading import load_pipeline
    from tests.wan import tiny

    return load_pipeline(tiny_model, runtime=tiny.CPU)


@pytest.fixture
def film(finished: Path, tmp_path: Path) -> Path:
    """A copy of the film in the folder ``finished``, a fixture of the test's file."""
    return shutil.copytree(finished, tmp_path / "film")
