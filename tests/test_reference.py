"""Agreement with the original implementations, case by case.

``STORYMEM_REFERENCE=/some/folder pytest tests/test_reference.py`` runs every case of the same formats found below
that folder, with the same tolerances; by default the vectors in ``tests/reference`` are used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file

from storymem.memory import KeyframeSelector, Selection
from storymem.wan.lora import load_memory_lora
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.schedule import wan_scheduler
from tests.references import ROOT, folders_with, json_files, label

WAN_CASES = folders_with("case.json")
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
    assert list(ours.kept_slots) == theirs["kept_slots"]
    assert ours.final_threshold == pytest.approx(theirs["final_threshold"], abs=1e-9)
    assert ours.threshold_steps == theirs["threshold_steps"]
    assert list(ours.candidates_per_pass) == theirs["candidates_per_pass"]


@pytest.mark.parametrize("case", KEYFRAME_CASES, ids=lambda case: case["name"])
def test_scanning_from_frame_1_mends_the_published_scan(case: dict[str, Any]) -> None:
    ours = select_case(case, first_scanned_frame=1)
    theirs = case["outputs_if_scan_started_right_after_first_keyframe"]
    assert list(ours.selected) == theirs["selected"]
    assert list(ours.kept) == theirs["kept"]
    changed = ours.selected != select_case(case).selected
    assert changed or not case["scan_from_index_2_changes_result"]
