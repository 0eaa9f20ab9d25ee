"""LAION's aesthetic heads: the published layouts, and what they compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from storymem.scorers.aesthetic import AestheticScorer, LinearsHead
from storymem.scorers.checkpoint import CheckpointError, load_strictly
from storymem.weights import MissingWeights
from tests.scorers.tiny import CLIP_CONFIG, aesthetic, clip, pictures


def test_v1_is_a_linear_of_the_unit_embedding() -> None:
    scorer, frames = aesthetic(), pictures(3, 3, 48, 80)
    embeddings = scorer.clip.embed_images(frames)
    by_hand = embeddings @ scorer.head.weight[0] + scorer.head.bias
    torch.testing.assert_close(scorer.score(frames), by_hand, atol=1e-5, rtol=0)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(3))


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


def test_v2_scores_at_a_small_size() -> None:
    scores = aesthetic(version="v2").score(pictures(2, 3, 48, 80))
    assert scores.shape == (2,)
    assert ((scores > 3) & (scores < 7)).all()


def test_untrained_scorer_lets_every_frame_pass() -> None:
    scorer = aesthetic()
    assert (scorer.score(pictures(4, 3, 48, 80)) >= scorer.threshold).all()


def test_prompts_are_not_used() -> None:
    frames = pictures(2, 3, 48, 80)
    assert torch.equal(aesthetic().score(frames), aesthetic().score(frames, ["a cat", "a dog"]))


def test_another_preprocessing_is_refused() -> None:
    with pytest.raises(ValueError, match="needs preprocessing 'published_aesthetic'; got 'published_selector'"):
        AestheticScorer(clip(), nn.Linear(32, 1), name="mine", threshold=5.0)


def test_unknown_version_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown version 'v3'; write one of v1, v2"):
        AestheticScorer.from_pretrained("v3")


def test_heads_load_from_published_pickles(tmp_path: Path) -> None:
    """The head is read before CLIP is looked for, so the error about CLIP proves that the head fitted."""
    for version, head in (("v1", nn.Linear(768, 1)), ("v2", LinearsHead())):
        torch.save(head.state_dict(), tmp_path / f"{version}.pth")
        with pytest.raises(MissingWeights, match="CLIP ViT-L-14-quickgelu"):
            AestheticScorer.from_pretrained(version, str(tmp_path / f"{version}.pth"), str(tmp_path / "no-clip"))


def test_folder_with_clip_and_head_loads(tmp_path: Path) -> None:
    scorer, frames = aesthetic(seed=3), pictures(2, 3, 48, 80)
    save_file(scorer.clip.network.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_CONFIG}))
    with pytest.raises(MissingWeights, match=r"holds no aesthetic_head\.safetensors"):
        AestheticScorer.from_folder(tmp_path, threshold=5.0)
    save_file(scorer.head.state_dict(), tmp_path / "aesthetic_head.safetensors")
    assert torch.equal(AestheticScorer.from_folder(tmp_path, threshold=5.0).score(frames), scorer.score(frames))


def test_wrong_head_is_refused(tmp_path: Path) -> None:
    torch.save(LinearsHead().state_dict(), tmp_path / "head.pth")
    with pytest.raises(CheckpointError, match=r"missing: weight, bias\n  unexpected: layers.0.weight.* and 2 more"):
        AestheticScorer.from_pretrained("v1", str(tmp_path / "head.pth"))


@pytest.mark.parametrize(
    ("version", "parts"),
    [
        (
            "v1",
            ["sa_0_4_vit_l_14_linear.pth", "MIT", "curl --create-dirs -L -o", "LAION-AI/aesthetic-predictor"],
        ),
        ("v2", ["sac+logos+ava1-l14-linearMSE.pth", "Apache-2.0", "3.7 MB", "improved-aesthetic-predictor"]),
    ],
)
def test_missing_head_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, parts: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(MissingWeights) as caught:
        AestheticScorer.from_pretrained(version)
    for part in parts:
        assert part in str(caught.value)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Surprise:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Surprise()}, tmp_path / "head.pth")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        AestheticScorer.from_pretrained("v1", str(tmp_path / "head.pth"))
    assert not (tmp_path / "ran").exists()


def test_strict_loading_counts_what_it_does_not_list() -> None:
    tensors = {f"unknown.{number}": torch.zeros(1) for number in range(20)}
    with pytest.raises(CheckpointError, match=r"unknown\.7 and 12 more"):
        load_strictly(nn.Linear(2, 1), tensors | nn.Linear(2, 1).state_dict(), "somewhere")
