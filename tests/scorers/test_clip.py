"""CLIP: agreement with open_clip and torchvision, and weights that need another activation."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from storymem.io import FileError
from storymem.scorers.clip import VOCABULARY_FILE, ClipScorer, ClipTokenizer
from storymem.scorers.preprocessing import CLIP_MEAN, CLIP_STD
from tests.scorers.tiny import CLIP_CONFIG, clip, images

MEAN, STD = list(CLIP_MEAN), list(CLIP_STD)


def drawn(*shape: int) -> torch.Tensor:
    """Frames with hard edges, black to white, where bicubic values overshoot; exact in 8 bits."""
    frames = images(*shape)
    frames[..., ::7, :] = 1.0
    frames[..., 3::11] = 0.0
    return frames


@pytest.mark.parametrize("size", [(480, 832), (832, 480), (100, 131), (32, 32), (33, 32)])
@pytest.mark.parametrize("preprocessing", ["published_selector", "published_aesthetic"])
def test_images_are_preprocessed_as_published(preprocessing: str, size: tuple[int, int]) -> None:
    """The selector squashes; VBench crops float frames, so that nothing is clamped or rounded."""
    scorer, frames = clip(preprocessing=preprocessing), drawn(2, 3, *size)
    if preprocessing == "published_selector":
        pixels = tv.resize(frames, [32, 32], InterpolationMode.BILINEAR, antialias=False)
    else:
        pixels = tv.center_crop(tv.resize(frames, 32, InterpolationMode.BICUBIC, antialias=False), [32, 32])
        assert size != (100, 131) or pixels.max() > 1.01, "there is something to clamp"
    expected = scorer.network.encode_image(tv.normalize(pixels, MEAN, STD), normalize=True)
    torch.testing.assert_close(scorer.embed_images(frames), expected, atol=1e-5, rtol=0)


def test_unknown_preprocessing_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown preprocessing 'squash'; write one of published_selector"):
        clip(preprocessing="squash")


def test_texts_are_embedded_as_by_open_clip() -> None:
    scorer, texts = clip(), ["a cat", "Night. 2 trains pass; nobody waves!"]
    theirs = scorer.network.encode_text(open_clip.tokenize(texts), normalize=True)
    torch.testing.assert_close(scorer.embed_texts(texts), theirs, atol=2e-6, rtol=0)


def test_weights_for_another_activation_are_refused(tmp_path: Path) -> None:
    """The two activations give different embeddings from the same weights, which fit both."""
    quick, plain = clip(), ClipScorer.from_config(CLIP_CONFIG | {"quick_gelu": False})
    plain.network.load_state_dict(quick.network.state_dict(), strict=True)
    frames = images(2, 3, 48, 80)
    assert (quick.embed_images(frames) - plain.embed_images(frames)).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"QuickGELU, but ViT-B-32 computes GELU.*write ViT-B-32-quickgelu"):
        ClipScorer.from_pretrained("ViT-B-32", "openai")
    (tmp_path / "open_clip_model.safetensors").touch()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": False}}))
    with pytest.raises(ValueError, match="trained with GELU"):
        ClipScorer.from_pretrained("ViT-B-32-quickgelu", "openai", str(tmp_path))


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-99", "openai", "no model 'ViT-B-99'"),
        ("ViT-B-32-quickgelu", "mine", "no weights 'mine' for ViT-B-32-quickgelu; it knows: .*openai"),
        ("coca_ViT-B-32", "openai", "not a plain CLIP model"),
    ],
)
def test_unknown_names_are_refused(model: str, pretrained: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipScorer.from_pretrained(model, pretrained)


def write_folder(folder: Path, scorer: ClipScorer, config: dict = CLIP_CONFIG, **changes: torch.Tensor) -> None:
    tensors = {name: value.clone() for name, value in scorer.network.state_dict().items()} | changes
    tensors = {name: value for name, value in tensors.items() if value.numel()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))


def test_folder_loads_what_was_saved(tmp_path: Path) -> None:
    scorer, frames = clip(seed=4), images(2, 3, 48, 80)
    write_folder(tmp_path, scorer)
    loaded = ClipScorer.from_folder(tmp_path)
    assert torch.equal(loaded.embed_images(frames), scorer.embed_images(frames))
    theirs = open_clip.create_model(f"local-dir:{tmp_path}", require_pretrained=True).eval()
    pixels = tv.resize(frames, [32, 32], InterpolationMode.BILINEAR, antialias=False)
    with torch.no_grad():
        expected = theirs.encode_image(tv.normalize(pixels, MEAN, STD), normalize=True)
    torch.testing.assert_close(loaded.embed_images(frames), expected, atol=2e-6, rtol=0)


def test_a_folder_s_own_vocabulary_is_used_and_must_fit(tmp_path: Path) -> None:
    merges = [("a", "d"), ("ad", "a</w>")]
    lines = ["a comment", *(" ".join(pair) for pair in merges)]
    (tmp_path / VOCABULARY_FILE).write_bytes(gzip.compress("\n".join(lines).encode()))
    config = {**CLIP_CONFIG, "text_cfg": {**CLIP_CONFIG["text_cfg"], "vocab_size": 512 + len(merges) + 2}}
    scorer = ClipScorer.from_config(config)
    write_folder(tmp_path, scorer, config)
    loaded = ClipScorer.from_folder(tmp_path)
    assert loaded.tokenizer(["Ada"])[0].tolist()[:4] == [514, 513, 515, 0]  # start, one word, end, padding
    assert loaded.tokenizer.token_counts(["add"]) == [4]  # "ad", "d": the second merge does not apply
    assert loaded.embed_texts(["Ada", "add"]).shape == (2, scorer.dim)
    assert ClipTokenizer.from_folder(tmp_path, 77, rows=520).vocab_size == 516, "padding rows are allowed"
    (tmp_path / VOCABULARY_FILE).unlink()
    with pytest.raises(FileError, match=r"embeds 516 tokens, but CLIP's vocabulary .* has 49408"):
        ClipScorer.from_folder(tmp_path)


def test_loading_is_strict_and_lists_everything(tmp_path: Path) -> None:
    changes = {"visual.proj": torch.zeros(5, 5), "extra": torch.zeros(1), "text_projection": torch.zeros(0)}
    write_folder(tmp_path, clip(), **changes)
    with pytest.raises(FileError) as caught:
        ClipScorer.from_folder(tmp_path)
    for kind, line in (
        ("missing (1):", "text_projection"),
        ("unexpected (1):", "extra"),
        ("misshapen (1):", "visual.proj is [5, 5], not [32, 32]"),
    ):
        assert f"{kind}\n    {line}" in str(caught.value)
