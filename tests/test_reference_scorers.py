"""Agreement of ViCLIP and HPSv3 with the original implementations, case by case.

Cases are found below ``STORYMEM_REFERENCE`` (default: ``tests/reference``) by what files hold, not by what
they are called: ``X_weights.safetensors``, ``X_io.safetensors`` and a JSON of sizes; and, each where present,
the files on frame sampling, preprocessing, resizing and the prompt. All sizes are read from the JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from storymem.scorers.checkpoint import load_strictly
from storymem.scorers.hpsv3_inputs import PixelPatcher, assemble_prompt, resized_size, visual_tokens
from storymem.scorers.hpsv3_network import Hpsv3Config, Hpsv3Network, load_network
from storymem.scorers.preprocessing import CLIP_MEAN, CLIP_STD, crop_in_bytes, normalise
from storymem.scorers.texts import ClipTokenizer
from storymem.scorers.viclip import middle_frames
from storymem.scorers.viclip_network import Viclip, ViclipConfig
from tests.references import ROOT, label

GREY_LEVEL = 1 / 255 / min(CLIP_STD) + 1e-4  # one step of 8 bits, after normalisation


def tensor_files(pattern: str, wanted: Callable[[set[str]], bool]) -> list[Path]:
    """Safetensors files below the root whose tensor names are as wanted."""

    def names(path: Path) -> set[str]:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())

    return sorted(path for path in ROOT.rglob(pattern) if wanted(names(path)))


def json_files(*keys: str) -> list[Path]:
    """JSON files below the root that are objects with all these keys."""

    def keys_of(path: Path) -> set[str]:
        content = json.loads(path.read_text(encoding="utf-8"))
        return set(content) if isinstance(content, dict) else set()

    return sorted(path for path in ROOT.rglob("*.json") if set(keys) <= keys_of(path))


def sizes_of(weights: Path) -> dict:
    """The JSON of a case: the one of the same stem, else the only one of its folder that has sizes."""
    stem = weights.name.removesuffix("_weights.safetensors")
    named = weights.with_name(f"{stem}.json")
    candidates = [named] if named.exists() else sorted(weights.parent.glob("*.json"))
    found = [sizes for path in candidates if {"vision", "text"} <= set(sizes := json.loads(path.read_text()))]
    assert len(found) == 1, f"{weights}: {len(found)} files of sizes beside it"
    return found[0]


def io_of(weights: Path) -> dict[str, torch.Tensor]:
    return load_file(weights.with_name(weights.name.replace("_weights.", "_io.")))


VICLIP = tensor_files("*_weights.safetensors", lambda names: "vision_encoder.conv1.weight" in names)
HPSV3 = tensor_files("*_weights.safetensors", lambda names: "rm_head.0.weight" in names)
CLIP_PIXELS = tensor_files("*.safetensors", lambda names: any(name.endswith("_clip_uint8") for name in names))
IMAGE_PIXELS = tensor_files("*.safetensors", lambda names: any(name.endswith("_image_uint8") for name in names))
SAMPLINGS = json_files("indices", "num_frames")
RESIZINGS = json_files("factor", "table")
PROMPTS = json_files("chat_prefix", "instruction", "suffix")


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).abs().max().item()


def test_own_cases_are_found() -> None:
    own = Path(__file__).parent / "reference"
    if own == ROOT:
        assert all((VICLIP, HPSV3, CLIP_PIXELS, IMAGE_PIXELS, SAMPLINGS, RESIZINGS, PROMPTS))
    assert all(weights.with_name(weights.name.replace("_weights.", "_io.")).exists() for weights in VICLIP + HPSV3)


# --- ViCLIP


def viclip(weights: Path) -> Viclip:
    sizes = sizes_of(weights)
    vision, text = sizes["vision"], sizes["text"]
    config = ViclipConfig(
        resolution=vision["resolution"],
        patch=vision["patch"],
        width=vision["width"],
        layers=vision["layers"],
        heads=vision["heads"],
        output_dim=vision["output_dim"],
        num_frames=vision["num_frames"],
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        context_length=text["context_length"],
        vocab_size=text["vocab_stored"],
    )
    network = Viclip(config)
    load_strictly(network, load_file(weights), weights)
    return network.eval().requires_grad_(False)


def unit(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features, dim=-1)


@pytest.mark.parametrize("weights", VICLIP, ids=label)
def test_viclip_features_agree(weights: Path) -> None:
    network, io = viclip(weights), io_of(weights)
    texts = network.text_encoder(io.get("token_ids_compact", io["token_ids"]))
    assert gap(texts, io["text_features"]) <= 1e-5
    lengths = [name.removeprefix("video_t") for name in io if re.fullmatch(r"video_t\d+", name)]
    assert lengths
    for length in lengths:
        clips = network.vision_encoder(io[f"video_t{length}"])
        assert gap(clips, io[f"vision_features_t{length}"]) <= 1e-5
        assert gap(unit(clips) @ unit(texts).T, io[f"cosine_t{length}"]) <= 2e-6
        if f"cosine_video_video_t{length}" in io:
            assert gap(unit(clips) @ unit(clips).T, io[f"cosine_video_video_t{length}"]) <= 2e-6


@pytest.mark.parametrize("weights", VICLIP, ids=label)
def test_viclip_tokens_agree(weights: Path) -> None:
    sizes, io = sizes_of(weights), io_of(weights)
    tokenizer = ClipTokenizer(sizes["text"]["context_length"])
    assert torch.equal(tokenizer(sizes["prompts"]), io["token_ids"])
    if "token_ids_compact" in io:
        assert torch.equal(io["vocab_ids"][io["token_ids_compact"]], io["token_ids"])
    counts = sizes["token_counts_before_truncation"]
    assert tokenizer.token_counts(sizes["prompts"]) == counts
    assert tokenizer.texts_truncated == sum(count > tokenizer.context_length for count in counts)


@pytest.mark.parametrize("path", SAMPLINGS, ids=label)
def test_viclip_frame_sampling_agrees(path: Path) -> None:
    case = json.loads(path.read_text())
    for length, indices in case["indices"].items():
        assert middle_frames(int(length), case["num_frames"]) == indices, f"video of {length} frames"


@pytest.mark.parametrize("path", CLIP_PIXELS, ids=label)
def test_viclip_preprocessing_agrees(path: Path) -> None:
    tensors = load_file(path)
    for name in (key.removesuffix("_clip_uint8") for key in tensors if key.endswith("_clip_uint8")):
        frames = tensors[f"{name}_clip_uint8"].permute(0, 3, 1, 2) / 255
        ours = normalise(crop_in_bytes(frames, (224, 224)), CLIP_MEAN, CLIP_STD)
        assert gap(ours.mean(dim=(2, 3)), tensors[f"{name}_out_mean"]) <= 1e-4
        assert gap(ours.std(dim=(2, 3)), tensors[f"{name}_out_std"]) <= 1e-4
        (key,) = (key for key in tensors if re.fullmatch(rf"{name}_out_every\d+", key))
        step, offset = int(key.rsplit("every", 1)[1]), int(tensors[f"{name}_out_offset"])
        errors = (ours[..., offset::step, offset::step] - tensors[key]).abs()
        assert errors.max() <= GREY_LEVEL
        assert (errors > 1e-5).float().mean() <= 0.002


# --- HPSv3


def hpsv3_config(weights: Path) -> Hpsv3Config:
    sizes = sizes_of(weights)
    text, vision, ids, head = sizes["text"], sizes["vision"], sizes["token_ids"], sizes["head"]
    assert head["key_indices"] == [0, 3, 5]
    assert head["sizes"][0] == text["hidden_size"] == vision["hidden_size"]
    return Hpsv3Config(
        hidden=text["hidden_size"],
        intermediate=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        vocab_size=text["vocab_size"],
        rms_norm_eps=text["rms_norm_eps"],
        rope_theta=text["rope_theta"],
        mrope_section=text["mrope_section"],
        max_position=text["max_position_embeddings"],
        vision_depth=vision["depth"],
        vision_width=vision["embed_dim"],
        vision_heads=vision["num_heads"],
        vision_mlp_ratio=vision["mlp_ratio"],
        patch=vision["patch_size"],
        temporal_patch=vision["temporal_patch_size"],
        merge=vision["spatial_merge_size"],
        head_widths=head["sizes"][1:-1],
        image_token=ids["image_pad"],
        video_token=ids["video_pad"],
        vision_start=ids["vision_start"],
        vision_end=ids["vision_end"],
        reward_token=ids["reward"],
    )


def hpsv3(weights: Path) -> Hpsv3Network:
    return load_network(weights, hpsv3_config(weights), torch.float32).eval().requires_grad_(False)


@pytest.mark.parametrize("weights", HPSV3, ids=label)
def test_hpsv3_rewards_agree(weights: Path) -> None:
    network, io = hpsv3(weights), io_of(weights)
    inputs = [io[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")]
    if "image_embeds" in io:
        embeds = network.model.get_image_features(io["pixel_values"], io["image_grid_thw"]).pooler_output
        assert gap(torch.cat(embeds), io["image_embeds"]) <= 2e-5
    if "hidden_at_reward" in io:
        assert gap(network.hidden_at_reward(*inputs), io["hidden_at_reward"]) <= 2e-5
    reward = network(*inputs)
    assert gap(reward, io["reward"]) <= 2e-5
    for name in io:
        if name.startswith("negative_control_reward"):
            assert gap(reward, io[name]) > 1e-3, f"as wrong as {name}"


@pytest.mark.parametrize("path", RESIZINGS, ids=label)
def test_hpsv3_resizing_agrees(path: Path) -> None:
    rule = json.loads(path.read_text())
    bounds = {"min_pixels": rule["min_pixels"], "max_pixels": rule["max_pixels"]}
    for row in rule["table"]:
        size = resized_size(*row["input_hw"], factor=rule["factor"], **bounds)
        assert list(size) == row["output_hw"], f"{row['input_hw']}"
        assert size[0] * size[1] // rule["factor"] ** 2 == row["visual_tokens"]


@pytest.mark.parametrize("path", IMAGE_PIXELS, ids=label)
def test_hpsv3_preprocessing_agrees(path: Path) -> None:
    tensors = load_file(path)
    for name in (key.removesuffix("_image_uint8") for key in tensors if key.endswith("_image_uint8")):
        patcher = PixelPatcher()
        picture = tensors[f"{name}_image_uint8"]
        assert list(patcher.size(*picture.shape[:2])) == tensors[f"{name}_resized_hw"].tolist()
        pixels, grid = patcher(picture.permute(2, 0, 1)[None])
        assert grid[0].tolist() == tensors[f"{name}_grid_thw"].tolist()
        assert len(pixels) == visual_tokens(grid[0].tolist(), patcher.merge) * patcher.merge**2
        (key,) = (key for key in tensors if re.fullmatch(rf"{name}_pixel_values_every_\d+(st|nd|rd|th)_row", key))
        assert gap(pixels[:: int(re.findall(r"\d+", key)[-1])], tensors[key]) <= 1e-5
        assert gap(torch.stack([pixels.mean(), pixels.std()]), tensors[f"{name}_pixel_values_mean_std"]) <= 1e-5


@pytest.mark.parametrize("path", PROMPTS, ids=label)
def test_hpsv3_prompt_agrees(path: Path) -> None:
    for example in json.loads(path.read_text(encoding="utf-8"))["examples"]:
        text = assemble_prompt(example["prompt"])
        assert len(text) == example["characters"]
        assert hashlib.sha256(text.encode()).hexdigest() == example["sha256_utf8"]
