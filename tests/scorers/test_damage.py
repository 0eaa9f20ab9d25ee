"""Scorers' folders that are damaged, incomplete or not what they state: a message that names the file, and quickly."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from storymem.io import FileError, NotFiniteError
from storymem.scorers.aesthetic import AestheticScorer
from storymem.scorers.clip import VOCABULARY_FILE, ClipScorer
from storymem.scorers.dinov2 import Dinov2Embedder
from storymem.scorers.viclip import ViclipScorer
from tests.scorers.tiny import CLIP_CONFIG, aesthetic, clip, hpsv3, images, viclip

CLIP_WEIGHTS, CLIP_JSON = "open_clip_model.safetensors", "open_clip_config.json"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("used the network"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP, an aesthetic head, ViCLIP and DINOv2, each in its own layout."""
    folder, scorer = tmp_path_factory.mktemp("scorers"), aesthetic()
    save_file(scorer.clip.network.state_dict(), folder / CLIP_WEIGHTS)
    save_file(scorer.head.state_dict(), folder / "aesthetic_head.safetensors")
    describe(folder, CLIP_CONFIG)
    viclip().save(folder / "viclip")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "dino")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "scorers")


def describe(folder: Path, model: Any, **preprocess: Any) -> None:
    (folder / CLIP_JSON).write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))


# How each is loaded, and its files of weights and of sizes
LOADERS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "clip": (ClipScorer.from_folder, CLIP_WEIGHTS, CLIP_JSON),
    "aesthetic": (
        lambda folder: AestheticScorer.from_folder(folder, threshold=1.0),
        "aesthetic_head.safetensors",
        CLIP_JSON,
    ),
    "viclip": (
        lambda folder: ViclipScorer.from_folder(folder / "viclip"),
        "viclip/model.safetensors",
        "viclip/viclip.json",
    ),
    "dinov2": (
        lambda folder: Dinov2Embedder.from_pretrained(str(folder / "dino"), resolution=28),
        "dino/model.safetensors",
        "dino/config.json",
    ),
}


@pytest.fixture(params=LOADERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def load(kind: str, folder: Path) -> Any:
    return LOADERS[kind][0](folder)


def refused(kind: str, folder: Path, path: Path, *parts: str) -> None:
    with pytest.raises((FileError, NotFiniteError)) as caught:
        load(kind, folder)
    for part in (str(path), *parts):
        assert part in str(caught.value)


def test_undamaged_folders_load(kind: str, folder: Path) -> None:
    load(kind, folder)


@pytest.mark.parametrize("fault", ["empty", "cut off", "pointer", "text", "folder", "fifo", "nan", "infinite", "types"])
def test_damaged_weights(kind: str, folder: Path, fault: str) -> None:
    path = folder / LOADERS[kind][1]
    content = path.read_bytes()
    message = ""
    if fault in ("nan", "infinite", "types"):
        tensors = load_file(path)
        name = max(tensors, key=lambda name: tensors[name].numel())
        if fault == "types":
            tensors[name] = tensors[name].int()
        else:
            tensors[name].view(-1)[-1] = float("nan" if fault == "nan" else "-inf")
            message = "NaN or infinite"
        save_file(tensors, path, metadata={"format": "pt"})
    elif fault in ("folder", "fifo"):
        path.unlink()
        os.mkfifo(path) if fault == "fifo" else path.mkdir()
    else:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n"
        path.write_bytes({"empty": b"", "cut off": content[:-50], "pointer": pointer, "text": b"hello"}[fault])
        message = "git lfs pull" if fault == "pointer" else ""
    if kind == "dinov2" and fault == "types":
        load(kind, folder)  # integers are accepted
    else:
        refused(kind, folder, path, message)


@pytest.mark.parametrize("content", ["", "[]", "{", "NaN", "\ufeff3", "[" * 9000, '"text"'])
def test_damaged_sizes(kind: str, folder: Path, content: str) -> None:
    path = folder / LOADERS[kind][2]
    path.write_text(content)
    refused(kind, folder, path)


def test_sizes_in_a_fifo(kind: str, folder: Path) -> None:
    path = folder / LOADERS[kind][2]
    path.unlink()
    os.mkfifo(path)
    refused(kind, folder, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_cfg": {"hf_model_name": "xlm-roberta-base"}}, "text_cfg.hf_model_name: unknown key"),
        ({"text_cfg": {"hf_tokenizer_name": "xlm-roberta-base"}}, "hf_tokenizer_name"),
        ({"vision_cfg": {"timm_model_name": "convnext_base", "timm_model_pretrained": True}}, "timm_model_name"),
        ({"custom_text": True}, "custom_text"),
        ({"vision_cfg": {"layers": 5000}}, "vision_cfg.layers"),
        ({"text_cfg": {"layers": 5000}}, "text_cfg.layers"),
        ({"vision_cfg": {"width": 1 << 20}}, "vision_cfg.width"),
        ({"vision_cfg": {"image_size": 100_000}}, "vision_cfg.image_size"),
        ({"vision_cfg": {"image_size": 1024, "patch_size": 1}}, "image_size=1024"),
        ({"vision_cfg": {"width": "wide"}}, "vision_cfg.width"),
        ({"vision_cfg": {"head_width": 5}}, "head_width=5"),
        ({"text_cfg": {"vocab_size": 10**15}}, "text_cfg.vocab_size"),
        ({"text_cfg": {"heads": 0}}, "text_cfg.heads"),
        ({"embed_dim": -1}, "embed_dim"),
        ({"vision_cfg": [1]}, "vision_cfg"),
    ],
)
def test_a_clip_config_holds_sizes_and_nothing_else(folder: Path, change: dict[str, Any], message: str) -> None:
    model = json.loads(json.dumps(CLIP_CONFIG))
    for key, value in change.items():
        model[key] = model[key] | value if isinstance(value, dict) else value
    describe(folder, model)
    refused("clip", folder, folder / CLIP_JSON, message)


@pytest.mark.parametrize("values", ["text", [1, 2], [1, 2, "3"], [0.5, 0.5, True], [1, 2, 3, 4], [0.5, 0.5, 0]])
def test_normalisation_is_three_numbers(folder: Path, values: Any) -> None:
    describe(folder, CLIP_CONFIG, std=values)
    refused("clip", folder, folder / CLIP_JSON, "preprocess_cfg.std")


@pytest.mark.parametrize(
    ("key", "value"), [("layers", 4000), ("width", "x"), ("heads", 5), ("resolution", 4), ("w", 1)]
)
def test_viclips_sizes_are_bounded(folder: Path, key: str, value: Any) -> None:
    path = folder / "viclip" / "viclip.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused("viclip", folder, path, key)


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 4000), ("hidden_size", "x"), ("model_type", "mine")])
def test_dinov2s_sizes_are_bounded(folder: Path, key: str, value: Any) -> None:
    path = folder / "dino" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused("dinov2", folder, path, key)


@pytest.mark.parametrize("change", [{"hidden_size": -32}, {"patch_size": 0}, {"hidden_act": "nope"}, {"dtype": "nope"}])
def test_a_configuration_of_no_network_is_refused(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "dino" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused("dinov2", folder, path, "does not describe a network that can be built")


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_dinov2_is_loaded_strictly(folder: Path, change: str) -> None:
    path = folder / "dino" / "model.safetensors"
    tensors = load_file(path)
    name = "layernorm.weight"
    if change == "missing":
        del tensors[name]
    else:
        tensors["extra" if change == "unexpected" else name] = torch.zeros(3)
    save_file(tensors, path, metadata={"format": "pt"})
    refused("dinov2", folder, path, change, "extra" if change == "unexpected" else name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(bytes(1 << 25)), "no vocabulary is so large"),
        (b"not gzipped", "not a gzipped list"),
        (gzip.compress(b"a b\n" * 50, mtime=0)[:-9], "not a gzipped list"),
        (gzip.compress(b"\xff\xfe", mtime=0), "UTF-8"),
    ],
)
def test_vocabularies(folder: Path, content: bytes, message: str) -> None:
    (folder / VOCABULARY_FILE).write_bytes(content)
    refused("clip", folder, folder / VOCABULARY_FILE, message)


def test_a_vocabulary_in_a_fifo(folder: Path) -> None:
    os.mkfifo(folder / VOCABULARY_FILE)
    refused("clip", folder, folder / VOCABULARY_FILE)


def test_merges_written_twice_count_twice(folder: Path) -> None:
    """Their ids go beyond the rows of a network that has one for each different merge."""
    lines = ["a comment", "a d", "a d", "a d"]
    (folder / VOCABULARY_FILE).write_bytes(gzip.compress("\n".join(lines).encode()))
    text = {**CLIP_CONFIG["text_cfg"], "vocab_size": 512 + 1 + 2}
    scorer = ClipScorer.from_config({**CLIP_CONFIG, "text_cfg": text})
    save_file(scorer.network.state_dict(), folder / CLIP_WEIGHTS)
    describe(folder, {**CLIP_CONFIG, "text_cfg": text})
    with pytest.raises(FileError, match=r"embeds 515 tokens, but .* has 517"):
        ClipScorer.from_folder(folder)


def test_a_vocabulary_that_changes_is_read_again(folder: Path) -> None:
    def ids(*merges: str) -> list[int]:
        (folder / VOCABULARY_FILE).write_bytes(gzip.compress("\n".join(["a comment", *merges]).encode()))
        return ClipScorer.from_folder(folder).tokenizer(["add"])[0].tolist()

    assert ids("a d", "x y") != ids("d d</w>", "x y")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00", b"hello", b"\x80\x04K\x01.", bytes(500)])
def test_damaged_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "head.pth").write_bytes(content)
    with pytest.raises(FileError, match=r"head\.pth"):
        AestheticScorer.from_pretrained("v1", str(tmp_path / "head.pth"))


@pytest.mark.parametrize("content", [{}, [1], {"weight": 3.0}, {"weight": torch.full((1, 768), torch.nan)}])
def test_pickles_of_something_else(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "head.pth")
    with pytest.raises((FileError, NotFiniteError), match=r"head\.pth"):
        AestheticScorer.from_pretrained("v1", str(tmp_path / "head.pth"))


# What comes out


def broken(kind: str) -> tuple[Any, Callable[[Any], Any]]:
    """A scorer whose last layer gives NaN, and a call of it."""
    frames = images(2, 3, 40, 56)
    if kind == "clip":
        scorer: Any = clip()
        scorer.network.visual.proj.data.fill_(torch.nan)
        return scorer, lambda scorer: scorer.embed_images(frames)
    if kind == "viclip":
        scorer = viclip()
        scorer.network.vision_encoder.proj.data.fill_(torch.nan)
        return scorer, lambda scorer: scorer.embed_clips(frames[:, None])
    scorer = aesthetic() if kind == "aesthetic" else hpsv3()
    head = scorer.head if kind == "aesthetic" else scorer.network.rm_head
    last = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
    last.bias.data.fill_(torch.inf)
    return scorer, lambda scorer: scorer.score(frames)


@pytest.mark.parametrize("kind", ["clip", "viclip", "aesthetic", "hpsv3"])
def test_results_that_are_not_finite_are_refused(kind: str) -> None:
    scorer, call = broken(kind)
    with pytest.raises(NotFiniteError, match="NaN or infinite"):
        call(scorer)


def test_a_dtype_that_is_too_narrow_is_named() -> None:
    scorer = clip(dtype="float16")
    scorer.network.visual.ln_post.weight.data.fill_(6e4)
    with pytest.raises(NotFiniteError, match=r"float16 may be too narrow .* dtype=float32"):
        scorer.embed_images(images(2, 3, 40, 56))
