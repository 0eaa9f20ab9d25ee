"""The weights that users have: Wan's original release and ComfyUI's single files, with tiny networks in these forms."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from benchmarks.layouts import original_vae
from storymem.wan.checkpoints import Checkpoint, load_network
from storymem.wan.loading import load_pipeline
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.settings import ModelSettings
from storymem.wan.shots import ShotRequest, WanShotGenerator
from storymem.wan.sources import check_weights, inspect_weights
from tests import stories
from tests.wan import layouts
from tests.wan.tiny import CPU, generate, images, settings, text_to_video


def deep(**changes: Any) -> ModelSettings:
    """The tiny model with the true VAE's blocks: diffusers' conversion knows no others."""
    network = asdict(settings().network)
    network["vae"] |= {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    return settings(network=network, **changes)


@pytest.fixture(scope="module")
def pipe() -> WanMemoryToVideoPipeline:
    return load_pipeline(deep(), runtime=CPU)


@pytest.fixture(scope="module")
def original(pipe: WanMemoryToVideoPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.write_original(pipe, tmp_path_factory.mktemp("original") / "Wan2.2-I2V-A14B")


def in_folder(folder: Path, **changes: Any) -> ModelSettings:
    return deep(weights={"name": "i2v", "source": str(folder)}, has_text_to_video=False, **changes)


def in_files(files: dict[str, Path], tokenizer: Path) -> ModelSettings:
    experts = {name: str(files[name]) for name in ("high_noise", "low_noise")}
    others = {name: str(files[name]) for name in ("vae", "text_encoder")}
    return in_folder(tokenizer, gguf=experts, **others)


def test_the_original_release_gives_the_same_shot(pipe: WanMemoryToVideoPipeline, original: Path) -> None:
    loaded = load_pipeline(in_folder(original), runtime=CPU)
    memory = images(2)
    assert torch.equal(generate(loaded, memory=memory), generate(pipe, memory=memory))
    by_text = deep(
        weights={"name": "i2v", "source": str(original)},
        text_to_video={"name": "t2v", "source": str(original), "file": "transformer*/*"},
    )
    with pytest.raises(ValueError, match=r"(?s)36 input channels, as Wan2\.2-I2V-A14B.*misshapen.*\[48, 36"):
        text_to_video(by_text, pipe.vae)


@pytest.mark.parametrize("fp8", [False, True])
def test_single_files_give_the_same_shot(
    pipe: WanMemoryToVideoPipeline, original: Path, tmp_path: Path, fp8: bool
) -> None:
    """Of the folder only the tokenizer is needed."""
    model = in_files(layouts.write_comfyui(pipe, tmp_path, fp8=fp8), tmp_path / "others")
    pipe.tokenizer.save_pretrained(tmp_path / "others" / "tokenizer")
    loaded = load_pipeline(model, runtime=CPU)
    memory = images(2)
    expected, found = (generate(each, memory=memory) for each in (pipe, loaded))
    error = ((found - expected).norm() / expected.norm()).item()
    assert (1e-4 < error < 0.1) if fp8 else error < 1e-4
    assert (loaded.transformer.blocks[0].attn1.to_q.weight.dtype == torch.int8) == fp8, "8 bits stay 8 bits"


def test_the_residual_vae_of_the_original_release(tmp_path: Path) -> None:
    config = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 4, "temperal_downsample": [False, True, True]}
    config |= {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
    config |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae = AutoencoderKLWan(**config)
    torch.save(original_vae(vae.state_dict()), tmp_path / "Wan2.2_VAE.pth")
    checkpoint = Checkpoint.open(tmp_path / "Wan2.2_VAE.pth")
    loaded = load_network(lambda: AutoencoderKLWan(**config), checkpoint, torch.float32)
    assert all(torch.equal(it, loaded.state_dict()[name]) for name, it in vae.state_dict().items())


def test_what_needs_no_conversion_is_not_copied(original: Path) -> None:
    """Weights stay mapped from their files: no second copy in RAM, and pages that the system can drop."""
    loaded = load_pipeline(in_folder(original), runtime=CPU, text_encoder=False)
    weight = loaded.transformer.blocks[0].ffn.net[0].proj.weight
    assert any(first <= weight.data_ptr() < last for first, last in regions("high_noise_model"))


def regions(name: str) -> list[tuple[int, int]]:
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if name in line]
    return [tuple(int(edge, 16) for edge in line.split()[0].split("-")) for line in lines]  # type: ignore[misc]


# By header alone


def change(path: Path, how: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(path)
    how(state)
    save_file(state, path)


def first(state: dict[str, torch.Tensor]) -> str:
    return next(iter(state))


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        (
            "vae",
            lambda s: s.update(stray=torch.ones(1)),
            r"wan2\.2_vae\.safetensors.*model's VAE:\n.*unexpected.*stray",
        ),
        ("vae", lambda s: s.pop(first(s)), r"wan2\.2_vae\.safetensors.*model's VAE:\n.*missing \(1\)"),
        ("text_encoder", lambda s: s.pop("shared.weight"), r"model's text encoder:\n.*missing \(2\)"),
        ("text_encoder", lambda s: s.update(lm_head=torch.ones(2)), r"text encoder:\n.*unexpected \(1\).*lm_head"),
        ("vae", lambda s: s.update({first(s): s[first(s)].to(torch.int8)}), r"is I8, and weights are floating-point"),
        ("high_noise", lambda s: s.update(vace_blocks=torch.ones(1)), r"experts.*unexpected \(1\).*vace_blocks"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(
    pipe: WanMemoryToVideoPipeline, tmp_path: Path, name: str, how: Callable[[dict], Any], message: str
) -> None:
    files = layouts.write_comfyui(pipe, tmp_path, fp8=False)
    pipe.tokenizer.save_pretrained(tmp_path / "others" / "tokenizer")
    change(files[name], how)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        check_weights(in_files(files, tmp_path / "others"), text_to_video=False)


@pytest.mark.parametrize("name", ["high_noise", "vae", "text_encoder"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "broken download"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        (lambda content: b"<!doctype html>", "a web page"),
    ],
)
def test_damaged_files_are_refused(
    pipe: WanMemoryToVideoPipeline, tmp_path: Path, name: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    files = layouts.write_comfyui(pipe, tmp_path, fp8=False)
    pipe.tokenizer.save_pretrained(tmp_path / "others" / "tokenizer")
    files[name].write_bytes(damage(files[name].read_bytes()))
    with pytest.raises(ValueError, match=f"wan2.2_{name}.*{message}"):
        check_weights(in_files(files, tmp_path / "others"), text_to_video=False)


def test_parts_of_the_original_release_that_are_missing_or_cut_off(original: Path, tmp_path: Path) -> None:
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        (tmp_path / name).write_bytes((original / name).read_bytes()[:5000])
    model = in_folder(tmp_path)
    with pytest.raises(ValueError, match=r"lacks google/umt5-xxl, high_noise_model, .*download is incomplete"):
        check_weights(model, text_to_video=False)
    for inside in ("high_noise_model", "low_noise_model", "google"):
        (tmp_path / inside).symlink_to(original / inside)
    with pytest.raises(ValueError, match=r"Wan2\.1_VAE\.pth is not a readable file of tensors"):
        check_weights(model, text_to_video=False)


def test_a_file_named_for_the_other_expert_is_noted(pipe: WanMemoryToVideoPipeline, tmp_path: Path) -> None:
    files = layouts.write_comfyui(pipe, tmp_path, fp8=False)
    pipe.tokenizer.save_pretrained(tmp_path / "others" / "tokenizer")
    swapped = files | {"high_noise": files["low_noise"], "low_noise": files["high_noise"]}
    found = inspect_weights(in_files(swapped, tmp_path / "others"), text_to_video=False)
    notes = [note for source in found for note in source.notes]
    assert notes[0] == "its name is that of the low_noise expert, and it is used as high_noise"


# Experts that take turns


def test_experts_take_turns_and_only_one_is_in_memory(pipe: WanMemoryToVideoPipeline, original: Path) -> None:
    turns = load_pipeline(in_folder(original), runtime=replace(CPU, experts="in_turn"))
    alive: list[weakref.ref] = []
    most, loaded = 0, turns.turns.load

    def load(name: str) -> Any:
        nonlocal most
        expert = loaded(name)
        alive.append(weakref.ref(expert))
        gc.collect()
        most = max(most, sum(each() is not None for each in alive))
        return expert

    turns.turns = replace(turns.turns, load=load)
    for _ in range(2):
        assert torch.equal(generate(turns, memory=images(2)), generate(pipe, memory=images(2)))
    assert (len(alive), most) == (4, 1)
    turns.take_turn(None)
    assert turns.experts == {}
    again = WanMemoryToVideoPipeline.from_pipe(turns)
    assert torch.equal(generate(again, memory=images(2)), generate(pipe, memory=images(2)))


def test_a_generator_frees_its_expert_after_each_shot() -> None:
    made = {}
    for experts in ("together", "in_turn"):
        generator = WanShotGenerator(
            model=stories.MODEL, sampler=stories.SAMPLER, runtime=replace(CPU, experts=experts)
        )
        generator.prepare(["a fox"], [None])
        frames = generator.encode_keyframes([np.zeros((32, 48, 3), "uint8")])
        request = ShotRequest(
            prompt="a fox",
            negative_prompt=None,
            frames=9,
            seed=0,
            memory=frames,
            given=np.zeros((0, 32, 48, 3), "uint8"),
        )
        made[experts] = generator.first(replace(request, memory=[])), generator.generate(request)
        assert len(generator._pipe.experts) == (2 if experts == "together" else 0)
    for one, other in zip(*made.values(), strict=True):
        assert (one == other).all()
