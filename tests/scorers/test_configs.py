"""The scorers' config files: each builds, or names the weights that the plan lists for it, and takes no unknown key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch.nn import ModuleList

from storymem.scorers import check_scorers, scorer_bytes, scorer_weights
from storymem.scorers.aesthetic import AestheticScorer
from storymem.scorers.clip import ClipScorer
from storymem.scorers.dinov2 import Dinov2Embedder
from storymem.scorers.grounding import GroundingDetector
from storymem.scorers.scorer import NoQuality, Scorer
from storymem.scorers.viclip import ViclipScorer
from storymem.weights import MissingWeights
from tests.composing import composed
from tests.scorers.tiny import CONFIGS, images

SELF_SUFFICIENT = {
    "clip/tiny": ClipScorer,
    "viclip/tiny": ViclipScorer,
    "quality/tiny": AestheticScorer,
    "quality/none": NoQuality,
    "clip/toy": ClipScorer,
    "viclip/toy": ViclipScorer,
    "quality/toy": AestheticScorer,
    "appearance/tiny": Dinov2Embedder,
    "detector/tiny": GroundingDetector,
}
PUBLISHED = {"clip/vit-b-32", "viclip/l-14", "quality/hpsv3", "quality/laion-v1", "quality/laion-v2"}
PUBLISHED |= {"clip/vit-l-14", "appearance/dinov2-base", "detector/grounding-dino-tiny"}
NAMES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))


def node(name: str) -> dict[str, Any]:
    return composed(name=f"scorer/{name}")["scorer"][name.split("/")[0]]


def test_the_files_are_there() -> None:
    assert set(NAMES) == SELF_SUFFICIENT.keys() | PUBLISHED


@pytest.mark.parametrize("name", NAMES)
def test_a_scorer_builds_or_lacks_the_weights_that_the_plan_lists(name: str) -> None:
    weights = scorer_weights(node(name))
    if name in SELF_SUFFICIENT:
        assert weights == []
        assert isinstance(instantiate(node(name)), SELF_SUFFICIENT[name])
        return
    with pytest.raises(InstantiationException) as caught:
        instantiate(node(name))
    assert isinstance(caught.value.__cause__, MissingWeights)
    assert str(caught.value.__cause__).startswith(f"{weights[0].name}: {weights[0].source}")
    assert weights[0].download_command in str(caught.value.__cause__)
    assert scorer_weights(node(name) | {"source": "./elsewhere"})[0].source == "./elsewhere"


@pytest.mark.parametrize("name", sorted(SELF_SUFFICIENT))
def test_unknown_keys_are_refused(name: str) -> None:
    with pytest.raises(InstantiationException) as caught:
        instantiate(node(name), treshold=1.0)
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize("name", [name for name in SELF_SUFFICIENT if name.startswith("quality")])
def test_quality_filters_are_interchangeable(name: str) -> None:
    scorer = instantiate(node(name)).to("cpu")
    passes = scorer.score(images(2, 3, 40, 56)) >= scorer.threshold
    assert passes.shape == (2,)
    assert passes.all() == (name != "quality/toy"), "the trained filter refuses noise"


class Logging(Scorer):
    """A user's scorer, which writes to a folder that it makes."""

    def __init__(self, *, folder: str, threshold: float = 0.0) -> None:
        super().__init__(ModuleList())
        self.folder, self.threshold = folder, threshold


def test_only_the_folder_of_from_folder_is_one_of_weights() -> None:
    check_scorers({"quality": {"_target_": f"{__name__}.Logging", "folder": "not/there"}})
    with pytest.raises(MissingWeights, match=r"scorer\.clip\.folder"):
        check_scorers({"clip": node("clip/toy") | {"folder": "not/there"}})


def test_a_users_own_scorer_lists_no_weights() -> None:
    assert scorer_weights({"_target_": "pathlib.Path.from_pretrained", "source": "x"}) == []


def test_bytes_are_those_of_all_files() -> None:
    assert scorer_bytes(node("clip/vit-b-32"), node("quality/hpsv3")) == pytest.approx((0.6e9, 16.6e9), rel=0.01)
    assert scorer_bytes(node("clip/tiny"), node("quality/none")) == (0, 0)
