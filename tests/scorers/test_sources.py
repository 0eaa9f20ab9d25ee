"""What a plan lists of a scorer is what the scorer then looks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from storymem.scorers.sources import scorer_bytes, scorer_weights
from storymem.weights import MissingWeights
from tests.composing import composed

PUBLISHED = ["clip/vit-b-32", "quality/hpsv3", "quality/laion-v1", "quality/laion-v2"]
OTHERS = ["clip/tiny", "clip/toy", "quality/tiny", "quality/toy", "quality/none"]


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))


def node(name: str) -> dict[str, Any]:
    group, choice = name.split("/")
    return composed(name=f"scorer/{group}/{choice}")["scorer"][group]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_scorer_misses_what_the_plan_lists(name: str) -> None:
    listed = scorer_weights(node(name))
    with pytest.raises(InstantiationException) as error:
        instantiate(node(name))
    cause = error.value.__cause__
    assert isinstance(cause, MissingWeights)
    assert str(cause).startswith(f"{listed[0].name}: {listed[0].source}")
    assert f"{listed[0].download_command}" in str(cause)


@pytest.mark.parametrize("name", PUBLISHED)
def test_another_place_is_listed_too(name: str) -> None:
    assert scorer_weights(node(name) | {"source": "./elsewhere"})[0].source == "./elsewhere"


@pytest.mark.parametrize("name", OTHERS)
def test_scorers_without_published_weights_list_none(name: str) -> None:
    assert scorer_weights(node(name)) == []


def test_somebody_elses_scorer_lists_none() -> None:
    assert scorer_weights({"_target_": "pathlib.Path.from_pretrained", "source": "x"}) == []


def test_bytes_are_those_of_all_files() -> None:
    both = scorer_bytes(node("clip/vit-b-32"), node("quality/hpsv3"))
    assert both == pytest.approx(17.2e9, rel=0.01)
    assert scorer_bytes(node("clip/tiny"), node("quality/none")) == 0
