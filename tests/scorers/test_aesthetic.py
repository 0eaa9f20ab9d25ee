"""LAION's aesthetic heads: the published layouts, and what they compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from storymem.io import FileError
from storymem.scorers.aesthetic import AestheticScorer, LinearsHead
from storymem.weights import MissingWeights
from tests.scorers.tiny import CLIP_CONFIG, aesthetic, clip, images


def test_v1_is_a_linear_of_the_unit_embedding() -> None:
    scorer, frames = aesthetic(), images(3, 3, 48, 80)
    embeddings = scorer.clip.embed_images(frames)
    expected = embeddings @ scorer.head.weight[0] + scorer.head.bias
    torch.testing.assert_close(scorer.score(frames), expected, atol=1e-5, rtol=0)
    assert (scorer.score(frames) >= scorer.threshold).all()


def test_v2_has_the_published_layout_and_no_activation() -> None:
    head = LinearsHead().eval()
    shapes = {name: list(value.shape) for name, value in head.state_dict().items() if name.endswith("weight")}
    assert shapes == {
        "layers.0.weight": [1024, 768],
        "layers.2.weight": [128, 1024],
        "layers.4.weight": [64, 128],
        "layers.6.weight": [16, 64],
        "layers.7.weight": [1, 16],
    }
    a, b = torch.randn(2, 768, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(head(a + b), head(a) + head(b) - head(torch.zeros(768)), atol=1e-5, rtol=0)
    scores = aesthetic(version="v2").score(images(2, 3, 48, 80))
    assert ((scores > 3) & (scores < 7)).all()


def test_another_preprocessing_or_version_is_refused() -> None:
    with pytest.raises(ValueError, match="needs preprocessing 'published_aesthetic'; got 'published_selector'"):
        AestheticScorer(clip(), nn.Linear(32, 1), name="mine", threshold=5.0)
    for load in (AestheticScorer.from_pretrained, AestheticScorer.required_weights):
        with pytest.raises(ValueError, match="unknown version 'v3'; write one of v1, v2"):
            load("v3")


def test_heads_load_from_published_pickles(tmp_path: Path) -> None:
    """The head is read before CLIP is searched for, so the error about CLIP proves that the head fitted."""
    for version, head in (("v1", nn.Linear(768, 1)), ("v2", LinearsHead())):
        torch.save(head.state_dict(), tmp_path / f"{version}.pth")
        with pytest.raises(MissingWeights, match="CLIP ViT-L-14-quickgelu"):
            AestheticScorer.from_pretrained(version, str(tmp_path / f"{version}.pth"), str(tmp_path / "no-clip"))


def test_folder_with_clip_and_head_loads(tmp_path: Path) -> None:
    scorer, frames = aesthetic(seed=3), images(2, 3, 48, 80)
    save_file(scorer.clip.network.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_CONFIG}))
    with pytest.raises(MissingWeights, match=r"holds no aesthetic_head\.safetensors"):
        AestheticScorer.from_folder(tmp_path, threshold=5.0)
    save_file(scorer.head.state_dict(), tmp_path / "aesthetic_head.safetensors")
    assert torch.equal(AestheticScorer.from_folder(tmp_path, threshold=5.0).score(frames), scorer.score(frames))


def test_wrong_head_is_refused(tmp_path: Path) -> None:
    torch.save(LinearsHead().state_dict(), tmp_path / "head.pth")
    with pytest.raises(FileError, match=r"(?s)missing \(2\):\s+bias\s+weight\s+unexpected \(10\).*and 2 more"):
        AestheticScorer.from_pretrained("v1", str(tmp_path / "head.pth"))


@pytest.mark.parametrize(
    ("version", "parts"),
    [
        ("v1", ["sa_0_4_vit_l_14_linear.pth", "MIT", "curl --create-dirs -L -o", "LAION-AI/aesthetic-predictor"]),
        ("v2", ["sac+logos+ava1-l14-linearMSE.pth", "Apache-2.0", "3.7 MB", "improved-aesthetic-predictor"]),
    ],
)
def test_missing_head_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, parts: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(MissingWeights) as caught:
        AestheticScorer.from_pretrained(version)
    assert all(part in str(caught.value) for part in parts)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Surprise:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Surprise()}, tmp_path / "head.pth")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        AestheticScorer.from_pretrained("v1", str(tmp_path / "head.pth"))
    assert not (tmp_path / "ran").exists()
