"""CLIP: agreement with torchvision and open_clip, and the activation trap."""

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

from storymem.scorers.checkpoint import CheckpointError
from storymem.scorers.clip import ClipScorer
from storymem.scorers.preprocessing import CLIP_MEAN, CLIP_STD, crop, crop_in_bytes, squash
from storymem.scorers.texts import VOCABULARY_FILE, ClipTokenizer
from storymem.weights import MissingWeights
from tests.scorers.tiny import CLIP_CONFIG, clip, pictures

SIZES = [(480, 832), (832, 480), (100, 131), (224, 224), (336, 588), (64, 64), (225, 224)]


@pytest.mark.parametrize("size", SIZES)
def test_selector_preprocessing_is_torchvisions_bilinear_squash(size: tuple[int, int]) -> None:
    frames = pictures(2, 3, *size)
    theirs = tv.resize(frames, [224, 224], InterpolationMode.BILINEAR, antialias=False)
    torch.testing.assert_close(squash(frames, (224, 224)), theirs, atol=1e-6, rtol=0)


def drawn(*shape: int) -> torch.Tensor:
    """Frames with hard edges, black to white, where bicubic values overshoot; exact in 8 bits."""
    frames = pictures(*shape)
    frames[..., ::7, :] = 1.0
    frames[..., 3::11] = 0.0
    return frames


@pytest.mark.parametrize("size", SIZES)
def test_aesthetic_preprocessing_is_torchvisions_on_floats(size: tuple[int, int]) -> None:
    """VBench makes float tensors of its frames before it resizes them, so nothing is clamped or rounded."""
    frames = drawn(2, 3, *size)
    resized = tv.resize((frames * 255).round(), 224, InterpolationMode.BICUBIC, antialias=False)
    theirs = tv.center_crop(resized, [224, 224]) / 255
    if min(size) != 224:
        assert theirs.min() < -0.01
        assert theirs.max() > 1.01, "there is something to clamp"
    torch.testing.assert_close(crop(frames, (224, 224)), theirs, atol=1e-5, rtol=0)
    scorer = clip(preprocessing="published_aesthetic")
    pixels = tv.center_crop(tv.resize(frames, 32, InterpolationMode.BICUBIC, antialias=False), [32, 32])
    images = scorer.network.encode_image(tv.normalize(pixels, list(CLIP_MEAN), list(CLIP_STD)), normalize=True)
    torch.testing.assert_close(scorer.embed_images(frames), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_viclips_preprocessing_is_torchvisions_on_bytes(size: tuple[int, int]) -> None:
    frames = drawn(2, 3, *size)
    resized = tv.resize((frames * 255).to(torch.uint8), 224, InterpolationMode.BICUBIC, antialias=False)
    theirs = tv.center_crop(resized, [224, 224]).float() / 255
    errors = (crop_in_bytes(frames, (224, 224)) - theirs).abs()
    assert errors.max() <= 1.01 / 255  # a rounding tie
    assert (errors > 1e-6).float().mean() < 0.002


def test_the_two_preprocessings_differ() -> None:
    frames = pictures(2, 3, 48, 80)
    selector, aesthetic = (clip(preprocessing=f"published_{name}") for name in ("selector", "aesthetic"))
    assert (selector.embed_images(frames) - aesthetic.embed_images(frames)).abs().max() > 1e-3


def test_unknown_preprocessing_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown preprocessing 'squash'; write one of published_selector"):
        clip(preprocessing="squash")


def test_embeddings_are_open_clips() -> None:
    scorer, frames, texts = clip(), pictures(3, 3, 48, 80), ["a cat", "Night. 2 trains pass; nobody waves!"]
    pixels = tv.resize(frames, [32, 32], InterpolationMode.BILINEAR, antialias=False)
    pixels = tv.normalize(pixels, list(CLIP_MEAN), list(CLIP_STD))
    images = scorer.network.encode_image(pixels, normalize=True)
    torch.testing.assert_close(scorer.embed_images(frames), images, atol=2e-6, rtol=0)
    theirs = scorer.network.encode_text(open_clip.tokenize(texts), normalize=True)
    torch.testing.assert_close(scorer.embed_texts(texts), theirs, atol=2e-6, rtol=0)


def test_openai_weights_under_a_plain_name_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"trained with QuickGELU, but ViT-B-32 computes GELU.*write ViT-B-32-quickgelu"
    ):
        ClipScorer.from_pretrained("ViT-B-32", "openai")


def test_a_folder_that_says_its_activation_is_believed(tmp_path: Path) -> None:
    (tmp_path / "open_clip_model.safetensors").touch()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": False}}))
    with pytest.raises(ValueError, match="trained with GELU"):
        ClipScorer.from_pretrained("ViT-B-32-quickgelu", "openai", str(tmp_path))


def test_the_trap_is_one() -> None:
    """The two activations give different embeddings from the same weights: why the names are checked."""
    quick = clip()
    plain = ClipScorer.from_config(CLIP_CONFIG | {"quick_gelu": False})
    plain.network.load_state_dict(quick.network.state_dict(), strict=True)
    frames = pictures(2, 3, 48, 80)
    assert (quick.embed_images(frames) - plain.embed_images(frames)).abs().max() > 1e-3


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


def test_missing_weights_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights) as caught:
        ClipScorer.from_pretrained()
    for part in (
        "ViT-B-32-quickgelu",
        "open_clip_model.safetensors",
        "0.6 GB",
        "hf download timm/vit_base_patch32_clip_224.openai",
    ):
        assert part in str(caught.value)


def write_folder(folder: Path, scorer: ClipScorer, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {name: value.clone() for name, value in scorer.network.state_dict().items()} | changes
    save_file(tensors, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_CONFIG, "preprocess_cfg": {}}))
    return tensors


def test_folder_loads_what_was_saved(tmp_path: Path) -> None:
    scorer, frames = clip(seed=4), pictures(2, 3, 48, 80)
    write_folder(tmp_path, scorer)
    loaded = ClipScorer.from_folder(tmp_path)
    assert torch.equal(loaded.embed_images(frames), scorer.embed_images(frames))
    theirs = open_clip.create_model(f"local-dir:{tmp_path}", require_pretrained=True).eval()
    pixels = tv.normalize(squash(frames, (32, 32)), list(CLIP_MEAN), list(CLIP_STD))
    with torch.no_grad():
        images = theirs.encode_image(pixels, normalize=True)
    torch.testing.assert_close(loaded.embed_images(frames), images, atol=2e-6, rtol=0)


def test_a_folder_s_own_vocabulary_is_used_and_must_fit(tmp_path: Path) -> None:
    merges = [("a", "d"), ("ad", "a</w>")]
    lines = ["a comment", *(" ".join(pair) for pair in merges)]
    (tmp_path / VOCABULARY_FILE).write_bytes(gzip.compress("\n".join(lines).encode()))
    text_cfg = {**CLIP_CONFIG["text_cfg"], "vocab_size": 512 + len(merges) + 2}
    scorer = ClipScorer.from_config({**CLIP_CONFIG, "text_cfg": text_cfg})
    write_folder(tmp_path, scorer)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**CLIP_CONFIG, "text_cfg": text_cfg}}))
    loaded = ClipScorer.from_folder(tmp_path)
    assert loaded.tokenizer(["Ada"])[0].tolist()[:4] == [514, 513, 515, 0]  # start, one word, end, padding
    assert loaded.tokenizer.token_counts(["add"]) == [4]  # "ad", "d": the second merge does not apply
    assert loaded.embed_texts(["Ada", "add"]).shape == (2, scorer.dim)
    with_padding = ClipTokenizer.from_folder(tmp_path, 77, rows=520)
    assert with_padding.vocab_size == 516
    (tmp_path / VOCABULARY_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"embeds 516 tokens, but CLIP's vocabulary .* has 49408"):
        ClipScorer.from_folder(tmp_path)


def test_loading_is_strict_and_lists_everything(tmp_path: Path) -> None:
    scorer = clip()
    tensors = write_folder(tmp_path, scorer, **{"visual.proj": torch.zeros(5, 5), "extra": torch.zeros(1)})
    tensors.pop("text_projection")
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        ClipScorer.from_folder(tmp_path)
    assert "missing: text_projection" in str(caught.value)
    assert "unexpected: extra" in str(caught.value)
    assert "misshapen: visual.proj is [5, 5], should be [32, 32]" in str(caught.value)


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    save_file({"visual.proj": torch.zeros(2, 2)}, tmp_path / "mine.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: positional_embedding, .* more\n  misshapen: visual.proj"):
        ClipScorer.from_pretrained(source=str(tmp_path / "mine.safetensors"))
