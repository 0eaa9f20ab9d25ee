"""Agreement of single forwards with the original HoloCine and Memento code, through layouts alone.

``STORYMEM_REFERENCE=/some/folder`` runs every case of these formats below that folder; see ``tests/reference``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file
from torch import Tensor

from storymem.methods.holocine import TokenRanges, window_texts
from storymem.wan.segments import Layout, Text, holocine, memento
from storymem.wan.transformer import enable_layouts
from tests.references import folders_with, label

TOLERANCE = 1e-4


def cases_with(key: str) -> list[Path]:
    return [folder for folder in folders_with("case.json") if key in json.loads((folder / "case.json").read_text())]


HOLOCINE, MEMENTO = cases_with("shot_ranges"), cases_with("subject_slots")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "case.json").read_text()), load_file(folder / "tensors.safetensors")


def network(config: dict[str, Any], weights: dict[str, Tensor]) -> WanTransformer3DModel:
    made = WanTransformer3DModel(**config).eval()
    made.load_state_dict(convert_wan_transformer_to_diffusers(dict(weights)))
    enable_layouts(made)
    return made


def predicted(expert: WanTransformer3DModel, latents: Tensor, timestep: Tensor, text: Any, layout: Layout) -> Tensor:
    with torch.no_grad():
        (prediction,) = expert(latents[None], timestep[None], text, return_dict=False, layout=layout)
    return prediction[0]


def check(ours: Tensor, theirs: Tensor, what: str) -> None:
    error = ((ours - theirs).norm() / theirs.norm()).item()
    assert error <= TOLERANCE, f"{what} is off by {error:.1e}"


def texts_of(case: dict[str, Any]) -> list[Text]:
    ranges = TokenRanges(tuple(case["global_range"]), tuple(map(tuple, case["shot_ranges"])))
    return window_texts(ranges, len(case["shot_ranges"]), case["text_len"])


@pytest.mark.parametrize("sparse", [False, True], ids=["full", "sparse"])
@pytest.mark.parametrize("folder", HOLOCINE, ids=label)
def test_holocine_forwards_agree(folder: Path, sparse: bool) -> None:
    case, given = read(folder)
    kind = "sparse" if sparse else "full"
    if f"{kind}.latents_in" not in given:
        pytest.skip("the case has no single steps")
    index = given["shot_index"].tolist()
    shots = [index.count(shot) for shot in sorted(set(index))]
    experts = {
        name: network(case["config"], load_file(folder / f"{name}_noise.safetensors")) for name in set(case["experts"])
    }
    for name, texts in (("cond", texts_of(case)), ("uncond", [Text()] * len(shots))):
        layout = holocine(shots, texts, sparse=sparse)
        embeds = given["prompt_embeds" if name == "cond" else "negative_prompt_embeds"][None]
        for step, expert in enumerate(case["experts"]):
            latents, timestep = given[f"{kind}.latents_in"][step], given["timesteps"][step]
            ours = predicted(experts[expert], latents, timestep, embeds, layout)
            check(ours, given[f"{kind}.pred_{name}"][step], f"{name} of step {step}")


def memento_network(folder: Path, case: dict[str, Any], name: str) -> WanTransformer3DModel:
    weights = load_file(folder / f"{name}_noise.safetensors")
    trained = load_file(folder / f"{name}_noise_trainable.safetensors")
    scale = case["lora_alpha"] / (case["lora_rank"] ** 0.5 if case["use_rslora"] else case["lora_rank"])
    for key, down in trained.items():
        if ".lora_A." in key:
            module = key.split("base_model.model.")[1].split(".lora_A.")[0]
            weights[f"{module}.weight"] += scale * trained[key.replace("lora_A", "lora_B")] @ down
    return network(case["config"], weights)


@pytest.mark.parametrize("folder", MEMENTO, ids=label)
def test_memento_forwards_agree(folder: Path) -> None:
    case, given = read(folder)
    experts = {name: memento_network(folder, case, name) for name in set(case["experts"])}
    frames, memory = (case["num_frames"] - 1) // 4 + 1, case["memory_slots"]
    for step, name in enumerate(case["experts"]):
        layout = memento(case["memory"][name]["positions"][1 : 1 + memory], frames)
        latents = torch.cat([given["latents_in"][step], given[f"{name}.condition"]])
        for which, prompt, subject in (
            ("cond", "prompt_embeds", "subject_embeds"),
            ("uncond", "negative_prompt_embeds", "empty_embeds"),
        ):
            texts = {"prompt": given[prompt][None], "subject": given[subject][None]}
            ours = predicted(experts[name], latents, given["timesteps"][step], texts, layout)
            check(ours, given[f"pred_{which}"][step], f"{which} of step {step}")


@pytest.mark.parametrize("folder", MEMENTO, ids=label)
def test_memento_without_a_subject_agrees(folder: Path) -> None:
    case, given = read(folder)
    frames, positions = (case["num_frames"] - 1) // 4 + 1, case["memory"]["low"]["positions"]
    expert, memory = memento_network(folder, case, "low"), positions[1 : 1 + case["memory_slots"]]
    latents = torch.cat([given["no_subject.latents"], given["no_subject.condition"]])
    for split, name in ((False, "no_subject"), (True, "no_subject_split")):
        layout = memento(memory, frames, subject=False, split=split)
        ours = predicted(expert, latents, given["timesteps"][-1], given["prompt_embeds"][None], layout)
        check(ours, given[f"{name}.pred"], name)
