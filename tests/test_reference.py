"""Agreement with the original implementations, case by case.

``STORYMEM_REFERENCE=/some/folder pytest tests/test_reference.py`` runs every case of the same formats found below
that folder, with the same tolerances; by default the vectors in ``tests/reference`` are used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import Qwen2VLConfig

from storymem.memory import KeyframeSelector, Selection
from storymem.scorers.checkpoint import loaded
from storymem.scorers.clip import ClipTokenizer
from storymem.scorers.hpsv3 import assemble_prompt, patches_of, resized_size
from storymem.scorers.hpsv3_network import Hpsv3Network, load_network
from storymem.scorers.preprocessing import CLIP_MEAN, CLIP_STD, crop_in_bytes, normalise
from storymem.scorers.viclip import middle_frames
from storymem.scorers.viclip_network import Viclip, ViclipConfig
from storymem.wan.lora import load_memory_lora
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.schedule import wan_scheduler
from tests.references import ROOT, folders_with, json_files, label

# Memory-to-video and keyframe selection

WAN_CASES = [f for f in folders_with("case.json") if "rope_stride" in json.loads((f / "case.json").read_text())]
WITH_MEMORY = [folder for folder in WAN_CASES if json.loads((folder / "case.json").read_text())["memory"]]
KEYFRAME_CASES = [case for path in json_files("cases", "dim") for case in json.loads(path.read_text())["cases"]]
TOLERANCES = {"condition": 1e-6, "latents_final": 1e-4, "video": 1e-3}


def test_cases_are_found() -> None:
    assert any(ROOT.iterdir()), f"no reference cases below {ROOT}"


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def build_pipeline(folder: Path, case: dict) -> WanMemoryToVideoPipeline:
    vae = next(parent / "vae" for parent in folder.parents if (parent / "vae").is_dir())
    pipe = WanMemoryToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLWan.from_pretrained(vae),
        scheduler=wan_scheduler(shift=case["shift"]),
        transformer=WanTransformer3DModel.from_pretrained(folder / "transformer"),
        transformer_2=WanTransformer3DModel.from_pretrained(folder / "transformer_2"),
        boundary_ratio=case["boundary"],
    )
    if case["lora_rank"]:
        load_memory_lora(pipe, folder, alpha=case["lora_alpha"], use_rslora=case["use_rslora"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(folder: Path, **changes: object) -> dict[str, torch.Tensor]:
    """Run a case through the public call and collect what the reference file holds."""
    case = json.loads((folder / "case.json").read_text())
    given = load_file(folder / "tensors.safetensors")
    pipe = build_pipeline(folder, case)
    seen: dict[str, torch.Tensor] = {"timesteps": torch.empty(0)}

    def watch(_pipe: object, _step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        seen["timesteps"] = torch.cat([seen["timesteps"], timestep.float().view(1)])
        seen["latents_final"], seen["condition"] = tensors["latents"][0], tensors["condition"][0]
        return {}

    def pictures(name: str) -> list[Image.Image]:
        return [Image.fromarray(frame.numpy()) for frame in given[name]]

    arguments = {
        "prompt_embeds": given["prompt_embeds"][None],
        "negative_prompt_embeds": given["negative_prompt_embeds"][None],
        "height": case["height"],
        "width": case["width"],
        "num_frames": case["num_frames"],
        "num_inference_steps": case["steps"],
        "guidance_scale": case["guidance_scale"],
        "generator": torch.Generator().manual_seed(case["seed"]),
        "memory": pictures("memory_frames") if case["memory"] else None,
        "first_frame": Image.fromarray(given["first_frame"].numpy()) if case["first_frame"] else None,
        "motion_frames": pictures("motion_frames") if case["motion_frames"] else None,
        "rope_stride": case["rope_stride"],
        "output_type": "pt",
        "callback_on_step_end": watch,
        "callback_on_step_end_tensor_inputs": ["latents", "condition"],
    }
    frames = pipe(**(arguments | changes)).frames[0]
    return seen | {"video": frames.permute(1, 0, 2, 3) * 2 - 1}


@pytest.mark.parametrize("folder", WAN_CASES, ids=label)
def test_memory_to_video_agrees(folder: Path) -> None:
    theirs = load_file(folder / "tensors.safetensors")
    ours = generate(folder)
    assert ours["timesteps"].tolist() == theirs["timesteps"].tolist()
    for name, tolerance in TOLERANCES.items():
        error = relative_error(ours[name], theirs[name])
        assert error <= tolerance, f"{name} is off by {error:.2e}, allowed {tolerance:.0e}"


@pytest.mark.parametrize("folder", WITH_MEMORY[:1], ids=label)
def test_the_cases_see_a_wrong_rope_stride(folder: Path) -> None:
    case = json.loads((folder / "case.json").read_text())
    theirs = load_file(folder / "tensors.safetensors")["latents_final"]
    ours = generate(folder, rope_stride=case["rope_stride"] + 1)["latents_final"]
    assert relative_error(ours, theirs) > 1e-3


@pytest.mark.parametrize("folder", WAN_CASES[:1], ids=label)
def test_noise_is_that_of_a_cpu_generator(folder: Path) -> None:
    case = json.loads((folder / "case.json").read_text())
    noise = load_file(folder / "tensors.safetensors")["noise"]
    drawn = torch.randn(noise.shape, generator=torch.Generator().manual_seed(case["seed"]))
    np.testing.assert_array_equal(drawn.numpy(), noise.numpy())


def select_case(case: dict[str, Any], **changes: Any) -> Selection:
    """Run a reference case with its own settings."""
    given = case["inputs"]
    selector = KeyframeSelector(
        **{
            "similarity_threshold": given["similarity_threshold"],
            "threshold_step": given["step"],
            "max_keyframes": given["max_keyframes"],
            "bank_similarity_threshold": given["bank_similarity_threshold"],
        }
        | changes
    )
    embeddings = np.array(given["frame_embeddings"], dtype=np.float32)
    return selector.select(
        embeddings,
        bank=np.array(given["bank_embeddings"], dtype=np.float32).reshape(-1, embeddings.shape[1]),
        quality=given["quality"].__getitem__,
        quality_threshold=given["quality_threshold"],
    )


@pytest.mark.parametrize("case", KEYFRAME_CASES, ids=lambda case: case["name"])
def test_the_published_scan_is_reproduced(case: dict[str, Any]) -> None:
    ours, theirs = select_case(case), case["outputs"]
    assert list(ours.selected) == theirs["selected"]
    assert list(ours.kept) == theirs["kept"]


@pytest.mark.parametrize("case", KEYFRAME_CASES, ids=lambda case: case["name"])
def test_scanning_from_frame_1_mends_the_published_scan(case: dict[str, Any]) -> None:
    ours = select_case(case, first_scanned_frame=1)
    theirs = case["outputs_if_scan_started_right_after_first_keyframe"]
    assert list(ours.selected) == theirs["selected"]
    assert list(ours.kept) == theirs["kept"]
    changed = ours.selected != select_case(case).selected
    assert changed or not case["scan_from_index_2_changes_result"]


# Scorers

GREY_LEVEL = 1 / 255 / min(CLIP_STD) + 1e-4  # one step of 8 bits, after normalisation


def tensor_files(pattern: str, wanted: Callable[[set[str]], bool]) -> list[Path]:
    """Safetensors files below the root whose tensor names are as wanted."""

    def names(path: Path) -> set[str]:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())

    return sorted(path for path in ROOT.rglob(pattern) if wanted(names(path)))


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
        assert all((WAN_CASES, KEYFRAME_CASES, VICLIP, HPSV3, CLIP_PIXELS, IMAGE_PIXELS, SAMPLINGS, RESIZINGS, PROMPTS))
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
    return loaded(lambda: Viclip(config), load_file(weights), weights).eval().requires_grad_(False)


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
        ours = normalise(crop_in_bytes(frames, 224), CLIP_MEAN, CLIP_STD)
        assert gap(ours.mean(dim=(2, 3)), tensors[f"{name}_out_mean"]) <= 1e-4
        assert gap(ours.std(dim=(2, 3)), tensors[f"{name}_out_std"]) <= 1e-4
        (key,) = (key for key in tensors if re.fullmatch(rf"{name}_out_every\d+", key))
        step, offset = int(key.rsplit("every", 1)[1]), int(tensors[f"{name}_out_offset"])
        errors = (ours[..., offset::step, offset::step] - tensors[key]).abs()
        assert errors.max() <= GREY_LEVEL
        assert (errors > 1e-5).float().mean() <= 0.002


# --- HPSv3


def hpsv3(weights: Path) -> Hpsv3Network:
    sizes = sizes_of(weights)
    text, vision, ids, head = sizes["text"], sizes["vision"], sizes["token_ids"], sizes["head"]
    assert head["key_indices"] == [0, 3, 5]
    assert head["sizes"] == [text["hidden_size"], 1024, 16, 2]
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta"), "mrope_section": text.pop("mrope_section")}
    config = Qwen2VLConfig(
        text_config=text | {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": None},
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    network = load_network(weights, config)
    assert network.reward_token == ids["reward"]
    return network.eval().requires_grad_(False)


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
    assert rule["factor"] == 28
    assert rule["min_pixels"] == rule["max_pixels"]
    for row in rule["table"]:
        size = resized_size(*row["input_hw"], pixels=rule["max_pixels"])
        assert list(size) == row["output_hw"], f"{row['input_hw']}"
        assert size[0] * size[1] // rule["factor"] ** 2 == row["visual_tokens"]


@pytest.mark.parametrize("path", IMAGE_PIXELS, ids=label)
def test_hpsv3_preprocessing_agrees(path: Path) -> None:
    tensors = load_file(path)
    for name in (key.removesuffix("_image_uint8") for key in tensors if key.endswith("_image_uint8")):
        image = tensors[f"{name}_image_uint8"]
        assert list(resized_size(*image.shape[:2])) == tensors[f"{name}_resized_hw"].tolist()
        pixels, grid = patches_of(image.permute(2, 0, 1)[None])
        assert grid[0].tolist() == tensors[f"{name}_grid_thw"].tolist()
        assert len(pixels) == grid[0].prod()
        (key,) = (key for key in tensors if re.fullmatch(rf"{name}_pixel_values_every_\d+(st|nd|rd|th)_row", key))
        assert gap(pixels[:: int(re.findall(r"\d+", key)[-1])], tensors[key]) <= 1e-5
        assert gap(torch.stack([pixels.mean(), pixels.std()]), tensors[f"{name}_pixel_values_mean_std"]) <= 1e-5


@pytest.mark.parametrize("path", PROMPTS, ids=label)
def test_hpsv3_prompt_agrees(path: Path) -> None:
    for example in json.loads(path.read_text(encoding="utf-8"))["examples"]:
        text = assemble_prompt(example["prompt"])
        assert len(text) == example["characters"]
        assert hashlib.sha256(text.encode()).hexdigest() == example["sha256_utf8"]
