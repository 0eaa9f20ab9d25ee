"""Every file below ``configs/`` is composed and built, so that a new file is covered at once."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate

from storymem.commands.cli import CONFIGS
from storymem.config import build_settings
from storymem.film.generate import build_storyteller
from storymem.film.settings import GenerateSettings, MemorySettings
from storymem.memory import ComingShot, Keyframe
from storymem.scorers import scorer_bytes
from storymem.wan.estimate import forward_flops
from storymem.wan.placement import Machine, choose_runtime
from storymem.wan.segments import single_shot
from storymem.wan.settings import AdapterSettings, ModelSettings, RuntimeSettings, SamplerSettings
from tests.composing import composed, generate_settings


def choices(group: str) -> list[str]:
    """Names of the files of a group, sub-groups included."""
    return sorted(str(path.relative_to(CONFIGS / group).with_suffix("")) for path in (CONFIGS / group).rglob("*.yaml"))


def bind(node: Mapping[str, Any]) -> inspect.BoundArguments:
    """The call that a ``_target_`` node describes, checked against the target's signature but not made."""
    target = get_object(node["_target_"])
    return inspect.signature(target).bind(**{key: value for key, value in node.items() if key != "_target_"})


BUILT_HERE = {"memory", "model", "runtime", "sampler", "scorer"}
BUILT_ELSEWHERE = {
    "data": "tests/training",
    "experiment": "tests/training, tests/evaluation (ablations)",
    "hydra": "tests/evaluation",
    "method": "tests/evaluation",
    "metrics": "tests/evaluation",
}


def test_every_group_is_built_in_a_test() -> None:
    groups = {path.relative_to(CONFIGS).parts[0] for path in CONFIGS.rglob("*/*.yaml")}
    assert groups >= BUILT_HERE
    unknown = groups - BUILT_HERE - BUILT_ELSEWHERE.keys()
    assert not unknown, f"list here where the files of configs/{'|'.join(unknown)} are built, and build them"


def test_the_defaults_are_complete() -> None:
    made = generate_settings()
    assert made.model.name == "toy"
    assert (made.continuity, made.first_shot, made.resume, made.dry_run) == ("mi2v", "auto", "auto", False)


@pytest.mark.parametrize("name", choices("model"))
def test_models(name: str) -> None:
    made = generate_settings(f"model={name}")
    assert made.model.name == name
    transformer = made.model.transformer
    flops = forward_flops(transformer, single_shot(5), height=8, width=12, text_tokens=made.model.network.text_tokens)
    assert flops.total > 0
    for node in (made.scorer.clip, made.scorer.quality, made.memory.selector, made.memory.recall):
        bind(node)


@pytest.mark.parametrize("name", choices("model"))
def test_the_networks_of_a_model_can_be_built(name: str) -> None:
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    model = generate_settings(f"model={name}").model
    network = model.network
    with torch.device("meta"):
        for each in (model, model.text_model):
            transformer = WanTransformer3DModel(**each.transformer)
            assert transformer.config.out_channels == each.spec.latent_channels
        if network.vae:
            assert AutoencoderKLWan(**network.vae).config.z_dim == model.spec.latent_channels
        if network.text_encoder:
            text_encoder = UMT5EncoderModel(UMT5Config(**network.text_encoder))
            assert text_encoder.config.d_model == transformer.config.text_dim


def test_the_published_model_is_the_published_one() -> None:
    made = generate_settings("model=wan2.2-a14b")
    model = made.model
    assert isinstance(model, ModelSettings)
    assert (model.video.width, model.video.height, model.video.frames, model.video.fps) == (832, 480, 81, 16)
    assert (model.rope_stride, model.boundary, model.text_to_video_boundary) == (5, 0.9, 0.875)
    assert (made.sampler.steps, made.sampler.guidance, made.sampler.shift) == (40, 3.5, 4.0)
    assert made.sampler.text_to_video_shift == 12.0
    assert model.weights is not None
    assert model.text_to_video is not None
    assert model.adapter is not None
    assert model.weights.source == "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
    assert model.text_to_video.source == "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    assert model.adapter.weights.source == "Kevin-thu/StoryMem"
    assert model.adapter.folders["mm2v"] == "Wan2.2-MM2V-A14B"
    assert made.scorer.clip["model"] == "ViT-B-32-quickgelu"
    assert "hpsv3" in made.scorer.quality["_target_"]


@pytest.mark.parametrize("name", choices("model"))
def test_every_setting_can_be_overridden_without_a_plus(name: str) -> None:
    config = composed("story=story.yaml", f"model={name}")
    for cls, node in (
        (GenerateSettings, config),
        (ModelSettings, config["model"]),
        (SamplerSettings, config["sampler"]),
        (RuntimeSettings, config["runtime"]),
        (MemorySettings, config["memory"]),
    ):
        assert set(node) == {field.name for field in dataclasses.fields(cls)}
    if config["model"]["adapter"] is not None:
        assert set(config["model"]["adapter"]) == {field.name for field in dataclasses.fields(AdapterSettings)}


@pytest.mark.parametrize("name", choices("sampler"))
def test_samplers(name: str) -> None:
    sampler = generate_settings(f"sampler={name}").sampler
    assert sampler.steps >= 1
    assert bool(sampler.negative_prompt) == (name != "toy"), "the drawn world has nothing to be avoided"


@pytest.mark.parametrize("name", choices("runtime"))
def test_runtimes(name: str) -> None:
    runtime = generate_settings("model=wan2.2-a14b", f"runtime={name}").runtime
    assert runtime.threads is None
    stored = "fp8_storage" if name == "gpu-12gb" else "as_is"  # no larger card trades quality for VRAM
    assert runtime.precision == stored


@pytest.mark.parametrize(
    ("name", "card", "ram"), [("gpu-12gb", 12, 20), ("gpu-24gb", 24, 32), ("gpu-32gb", 32, 80), ("gpu-80gb", 80, 80)]
)
def test_a_preset_fits_the_card_it_is_named_after(name: str, card: int, ram: int) -> None:
    made = generate_settings("model=wan2.2-a14b", f"runtime={name}")
    free = int(card * 1.04e9)  # "24 GB" are 25.8e9 bytes, less what the driver takes
    machine = Machine(name="a card", vram=free, ram=int(ram * 1e9))
    scorers = scorer_bytes(made.scorer.clip, made.scorer.quality)
    for height, width in ((480, 832), (720, 1280))[: 1 if card < 24 else 2]:
        model = dataclasses.replace(made.model, video=dataclasses.replace(made.model.video, height=height, width=width))
        assert choose_runtime(model, made.runtime, machine=machine, scorers=scorers).fits


MEMORIES = [("memory/" if "/" in name else "memory=") + name.replace("/", "=") for name in choices("memory")]


@pytest.mark.parametrize("choice", MEMORIES)
def test_memories_recall_and_select(choice: str) -> None:
    memory = generate_settings(choice).memory
    recall, selector = instantiate(memory.recall), instantiate(memory.selector)
    random = np.random.default_rng(0)
    bank = [
        Keyframe(
            id=f"k{number}",
            image=np.zeros((2, 2, 3), np.uint8),
            embedding=random.normal(size=8).astype(np.float32),
        )
        for number in range(20)
    ]
    coming = ComingShot(embed_text=lambda text: np.ones(8), choose=lambda keyframes, local, whole: range(local + whole))
    assert len(recall.recall(bank, coming)) == memory.recall["capacity"]
    chosen = selector.select(random.normal(size=(9, 8)), bank=np.empty((0, 8), np.float32))
    assert 1 <= len(chosen.selected) <= selector.max_keyframes


@pytest.mark.parametrize("group", ["clip", "quality"])
def test_scorers_of_the_loop_can_be_chosen(group: str) -> None:
    for choice in choices(f"scorer/{group}"):
        bind(getattr(generate_settings(f"scorer/{group}={choice}").scorer, group))


def test_the_embedded_default_builds_a_storyteller() -> None:
    config = composed("story=story.yaml", "runtime=cpu")
    teller = build_storyteller(build_settings(GenerateSettings, config), config)
    assert teller.generator.video.frames % 4 == 1
    assert teller.continuity == "mi2v"
    kept = set(teller.config)
    assert {"model", "sampler", "memory", "scorer", "continuity", "first_shot", "seed"} <= kept
    assert not kept & {"story", "output", "resume", "dry_run", "runtime"}, "they do not influence the film"


def test_unknown_keys_of_a_target_are_refused() -> None:
    with pytest.raises(InstantiationException, match="colour"):
        instantiate(generate_settings("+scorer.clip.colour=red").scorer.clip)
