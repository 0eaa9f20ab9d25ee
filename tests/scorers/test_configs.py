"""The scorers' config files: each builds, or says which weights it lacks, and knows no key too many."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from storymem.scorers.aesthetic import AestheticScorer
from storymem.scorers.clip import ClipScorer
from storymem.scorers.quality import NoQuality
from storymem.scorers.viclip import ViclipScorer
from storymem.weights import MissingWeights
from tests.scorers.tiny import CONFIGS, pictures

FILES = sorted(CONFIGS.rglob("*.yaml"))
SELF_SUFFICIENT = {
    "clip/tiny": ClipScorer,
    "viclip/tiny": ViclipScorer,
    "quality/tiny": AestheticScorer,
    "quality/none": NoQuality,
    "clip/toy": ClipScorer,
    "viclip/toy": ViclipScorer,
    "quality/toy": AestheticScorer,
}


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


def read(path: Path) -> DictConfig:
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    return config


def test_the_files_are_there() -> None:
    assert {name(path) for path in FILES} >= SELF_SUFFICIENT.keys() | {
        "clip/vit-b-32",
        "viclip/l-14",
        "viclip/b-16",
        "quality/hpsv3",
        "quality/laion-v1",
        "quality/laion-v2",
    }


@pytest.mark.parametrize("path", FILES, ids=name)
def test_config_builds_or_names_the_weights_it_lacks(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    if name(path) in SELF_SUFFICIENT:
        assert isinstance(instantiate(read(path)), SELF_SUFFICIENT[name(path)])
    else:
        with pytest.raises(InstantiationException) as caught:
            instantiate(read(path))
        assert isinstance(caught.value.__cause__, MissingWeights)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_unknown_keys_are_refused(path: Path) -> None:
    with pytest.raises(InstantiationException) as caught:
        instantiate(read(path), treshold=1.0)
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "quality"], ids=name)
def test_quality_filters_are_interchangeable(path: Path) -> None:
    if name(path) not in SELF_SUFFICIENT:
        pytest.skip("needs weights")
    scorer = instantiate(read(path))
    passes = scorer.score(pictures(2, 3, 40, 56)) >= scorer.threshold
    assert passes.shape == (2,)
    assert passes.all() == (name(path) != "quality/toy"), "the trained filter knows noise when it sees it"
    assert scorer.name
    scorer.to("cpu").free()
