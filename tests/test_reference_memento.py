"""Agreement with the original Memento code: learned recall, the whole sampling of a shot, and training of the recall.

``STORYMEM_REFERENCE=/some/folder`` runs every case of this format below that folder; see ``tests/reference``.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor

from storymem.methods.memento import FilmFrames, memento_inputs
from storymem.wan.inputs import Inputs
from storymem.wan.keyframe_query import (
    KeyframeQuery,
    choose,
    embedded,
    film_positions,
    mean_scores,
    straight_through,
)
from storymem.wan.lora import load_memory_lora, read_memory_lora
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.schedule import wan_scheduler
from storymem.wan.spec import COMPONENTS, experts_of
from tests.test_reference_layouts import MEMENTO, network, read

EXPERTS = ("high", "low")


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def adapter_folder(folder: Path, made: Path, suffix: str) -> Path:
    """The case's adapter under its published file names."""
    for name in EXPERTS:
        state = folder / f"{name}_noise_trainable.safetensors"
        target = made / f"backbone_{name}_noise{suffix}"
        torch.save(load_file(state), target) if suffix == ".pth" else target.symlink_to(state)
    return made


def pipeline(folder: Path, case: dict[str, Any]) -> WanMemoryToVideoPipeline:
    experts = [network(case["config"], load_file(folder / f"{name}_noise.safetensors")) for name in EXPERTS]
    pipe = WanMemoryToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=wan_scheduler(shift=case["shift"]),
        transformer=experts[0],
        transformer_2=experts[1],
        boundary_ratio=case["boundary"],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def queries_of(folder: Path) -> dict[str, tuple[KeyframeQuery, Any]]:
    """The query of each expert, and the expert."""
    case, _ = read(folder)
    experts = {f"{n}_noise": network(case["config"], load_file(folder / f"{n}_noise.safetensors")) for n in EXPERTS}
    found = {}
    for name in EXPERTS:
        path = folder / f"{name}_noise_trainable.safetensors"
        own = {f"{name}_noise": experts[f"{name}_noise"]}
        (adapter,) = read_memory_lora(own, path, alpha=case["lora_alpha"], use_rslora=case["use_rslora"]).values()  # type: ignore[arg-type]
        expert = experts[f"{name}_noise"]
        found[name] = KeyframeQuery.from_tensors(adapter.query(), expert, where=str(path)), expert
    return found


def scores_of(folder: Path, name: str) -> Tensor:
    case, given = read(folder)
    query, expert = queries_of(folder)[name]
    positions = film_positions(case["memory"][name]["pool_frames"], case["elapsed_frames"])
    assert list(positions) == case["memory"][name]["query_positions"]
    texts = [embedded(expert, given[f"{text}_embeds"]) for text in ("prompt", "global")]
    return query(given[f"{name}.pool"], positions, *texts)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("folder", MEMENTO, ids=lambda folder: folder.name)
def test_frames_are_scored_and_chosen_as_published(folder: Path, name: str) -> None:
    case, given = read(folder)
    scores = scores_of(folder, name)
    assert error(scores, given[f"{name}.frame_scores"]) <= 1e-5
    means = mean_scores(scores, case["num_local_queries"])
    chosen = choose(*means, local=case["select_local"], whole=case["select_global"])
    assert torch.equal(chosen, given[f"{name}.rows"].argmax(dim=1))
    theirs = case["memory"][name]
    assert sorted(chosen.tolist()) == sorted(theirs["selected"])
    pool = theirs["pool_frames"]
    memory = FilmFrames(latents=[], frames=[pool[index] for index in sorted(chosen.tolist())])
    assert list(memory.positions(case["elapsed_frames"])) == theirs["positions"][1 : 1 + case["memory_slots"]]


@pytest.mark.parametrize("folder", MEMENTO, ids=lambda folder: folder.name)
def test_gradients_reach_the_query_through_what_it_chose(folder: Path) -> None:
    case, given = read(folder)
    query, _ = queries_of(folder)["low"]
    query.zero_grad()
    means = mean_scores(scores_of(folder, "low"), case["num_local_queries"])
    rows = straight_through(*means, local=case["select_local"], whole=case["select_global"])
    assert torch.equal(rows, given["train.rows"])
    recalled = torch.einsum("kp,cphw->ckhw", rows, given["low.pool"])
    loss = (recalled - given["train.target"]).square().mean()
    assert error(loss, given["train.loss"][0]) <= 1e-5
    loss.backward()
    for name, theirs in given.items():
        if name.startswith("train.grad."):
            ours = query.get_parameter(name.removeprefix("train.grad.")).grad
            assert ours is not None
            assert error(ours, theirs) <= 1e-4, name


def inputs_of(case: dict[str, Any], given: dict[str, Tensor], name: str, *, subject: bool = True) -> Inputs:
    """What the expert is given; the conditions of blank frames are the case's, whose VAE is a stand-in."""
    own, condition = case["memory"][name], given[f"{name}.condition"][None, 4:]
    memory = sorted(own["selected"])
    return memento_inputs(
        FilmFrames(
            latents=[given[f"{name}.pool"][:, [index]] for index in memory],
            frames=[own["pool_frames"][index] for index in memory],
        ),
        start=case["elapsed_frames"],
        video=condition[:, :, 1 + case["memory_slots"] :],
        given=int(case["first_frame"]),
        blank=condition[:, :, :1] if subject else None,
        noise=given["noise"][None],
        text={"prompt": given["prompt_embeds"][None], "subject": given["subject_embeds"][None]},
        negative={"prompt": given["negative_prompt_embeds"][None], "subject": given["empty_embeds"][None]},
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("folder", MEMENTO, ids=lambda folder: folder.name)
def test_the_sampling_of_a_shot_agrees(folder: Path, suffix: str, tmp_path: Path) -> None:
    case, given = read(folder)
    pipe = pipeline(folder, case)
    source = adapter_folder(folder, tmp_path, suffix)
    info = load_memory_lora(pipe, source, alpha=case["lora_alpha"], use_rslora=case["use_rslora"])
    assert info.objective == "memento"
    inputs = {f"{name}_noise": inputs_of(case, given, name) for name in EXPERTS}
    for name in EXPERTS:
        condition = inputs[f"{name}_noise"].condition
        assert condition is not None
        assert torch.equal(condition[0], given[f"{name}.condition"])
    alone = inputs_of(case, given, "low", subject=False)
    assert alone.condition is not None
    assert torch.equal(alone.condition[0], given["no_subject.condition"])
    with torch.no_grad():
        seen = alone.network_input(given["no_subject.latents"][None], with_memory=True)
        arguments = {"encoder_hidden_states": alone.text, "return_dict": False, "layout": alone.layout}
        (prediction,) = pipe.experts["transformer_2"](seen, given["timesteps"][-1:], **arguments)
    assert error(prediction[0], given["no_subject.pred"]) <= 1e-4
    assert experts_of(pipe).keys() == inputs.keys()
    latents = pipe.denoise(
        torch.randn(given["noise"][None].shape, generator=torch.Generator().manual_seed(case["seed"])),
        {COMPONENTS[name]: each for name, each in inputs.items()},  # type: ignore[index]
        num_inference_steps=case["steps"],
        guidance_scale=case["guidance_scale"],
    )[0]
    assert pipe.scheduler.timesteps.tolist() == given["timesteps"].tolist()
    assert error(latents[:, 1 + case["memory_slots"] :], given["latents_final"]) <= 1e-3
    assert error(latents[:, :1], given["subject_final"]) <= 1e-3
