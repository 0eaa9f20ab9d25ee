"""Adapters of other trainers: layouts, the scale that each states, names of files, and reports of what is not read."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from storymem.io import NotFiniteError
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import load_memory_lora, read_memory_lora
from storymem.wan.settings import SamplerSettings, StepAdapterSettings
from storymem.wan.sources import STEP_ADAPTER, check_weights, inspect_weights
from storymem.weights import MissingWeights
from tests.wan.adapters import (
    ORIGINAL,
    TO_DIFFUSERS,
    close,
    expert,
    merged,
    outputs,
    pipeline,
    plain,
    released_state,
    write_pair,
)
from tests.wan.tiny import CPU, settings

State = dict[str, Tensor]
Spell = Callable[[int, str, str], str]  # block, original name of the linear, A or B -> key


def down_up(matrix: str) -> str:
    return {"A": "lora_down", "B": "lora_up"}[matrix]


SPELLINGS: dict[str, Spell] = {
    "comfyui": lambda n, x, m: f"diffusion_model.blocks.{n}.{x}.lora_{m}.weight",
    "comfyui checkpoint": lambda n, x, m: f"model.diffusion_model.blocks.{n}.{x}.{down_up(m)}.weight",
    "kohya": lambda n, x, m: f"lora_unet_blocks_{n}_{x.replace('.', '_')}.{down_up(m)}.weight",
    "videox-fun": lambda n, x, m: f"lora_unet__blocks_{n}_{x.replace('.', '_')}.{down_up(m)}.weight",
    "diffsynth": lambda n, x, m: f"blocks.{n}.{x}.lora_{m}.default.weight",
    "diffsynth whole": lambda n, x, m: f"pipe.dit.blocks.{n}.{x}.lora_{m}.default.weight",
    "diffusers": lambda n, x, m: f"transformer.blocks.{n}.{TO_DIFFUSERS[x]}.lora_{m}.weight",
    "diffusers bare": lambda n, x, m: f"blocks.{n}.{TO_DIFFUSERS[x]}.lora_{m}.weight",
}


def spelled(seed: int, spell: Spell, rank: int = 4) -> State:
    """The matrices of ``released_state`` under other keys."""
    state = released_state(seed, rank)
    prefix = "base_model.model.blocks"
    return {
        spell(n, x, m): state[f"{prefix}.{n}.{x}.lora_{m}.weight"] for n in range(2) for x in ORIGINAL for m in "AB"
    }


def expected(folder: Path, scale: float) -> Tensor:
    """What both experts compute with the matrices of seeds 3 and 4 merged at ``scale``."""
    write_pair(folder, released_state(3), released_state(4))
    return outputs(merged(plain(), folder, scale))


def loaded(folder: Path, *, strict: bool = False, **arguments: Any) -> Tensor:
    pipe = plain()
    load_memory_lora(pipe, folder, strict=strict, **arguments)
    return outputs(pipe)


def write(folder: Path, states: list[State], metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for noise, state in zip(("high", "low"), states, strict=True):
        save_file(state, folder / f"x_{noise}_noise.safetensors", metadata=metadata)
    return folder


# --- layouts and scale --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False], ids=["memory", "other"])
@pytest.mark.parametrize("layout", SPELLINGS)
def test_a_file_that_states_no_alpha_has_scale_one(layout: str, strict: bool, tmp_path: Path) -> None:
    """The published alpha of 128 belongs to the released layout alone: at rank 8 it would be 45 times too strong."""
    folder = write(tmp_path / "x", [spelled(seed, SPELLINGS[layout]) for seed in (3, 4)])
    assert close(loaded(folder, strict=strict), expected(tmp_path / "expected", 1.0))


def test_the_released_layout_is_the_published_scale_for_a_memory_adapter_alone(tmp_path: Path) -> None:
    folder = write_pair(tmp_path / "x", released_state(3), released_state(4))
    assert close(loaded(folder, strict=True), expected(tmp_path / "expected", 128 / math.sqrt(4)))
    assert close(loaded(folder, strict=False), expected(tmp_path / "expected", 1.0))


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"lora_alpha": "8", "r": "4"}, 2.0),
        ({"ss_network_alpha": "2.0", "ss_network_dim": "4"}, 0.5),
        ({"ss_network_alpha": "Dynamic", "lora_alpha": "4"}, 1.0),
        ({"transformer.lora_alpha": "6"}, 1.5),
        ({"lora_alpha": "8", "use_rslora": "true"}, 4.0),
        ({"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}, 2.0),
        ({"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.use_rslora": True})}, 4.0),
    ],
)
def test_the_scale_is_that_of_the_metadata(metadata: dict[str, str], scale: float, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", [spelled(seed, SPELLINGS["diffusers"]) for seed in (3, 4)], metadata)
    assert close(loaded(folder), expected(tmp_path / "expected", scale))


@pytest.mark.parametrize(("layout", "alpha"), [("kohya", 8.0), ("comfyui", 2.0), ("diffsynth", 6.0)])
def test_the_scale_is_that_of_alpha_tensors(layout: str, alpha: float, tmp_path: Path) -> None:
    states = [spelled(seed, SPELLINGS[layout]) for seed in (3, 4)]
    for state in states:
        modules = {key.rsplit(".lora_", 1)[0] for key in state}
        state |= {f"{module}.alpha": torch.tensor(alpha) for module in modules}
    assert close(loaded(write(tmp_path / "x", states)), expected(tmp_path / "expected", alpha / 4))


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 99, "lora_alpha": 99, "alpha_pattern": {".*": 8}, "rank_pattern": {".*": 4}}, 2.0),
    ],
)
def test_the_scale_is_that_of_a_peft_configuration_beside_the_files(
    config: Mapping[str, Any], scale: float, tmp_path: Path
) -> None:
    for strict, prefix in ((True, "base_model.model."), (False, "diffusion_model.")):
        states = [spelled(seed, lambda n, x, m: f"{prefix}blocks.{n}.{x}.lora_{m}.weight") for seed in (3, 4)]  # noqa: B023
        folder = write(tmp_path / prefix, states)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        assert close(loaded(folder, strict=strict), expected(tmp_path / "expected", scale))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", '{"lora_alpha": "8"}', r"adapter_config\.json: lora_alpha must be a positive number"),
        ("adapter_config.json", '{"lora_alpha": -1}', r"lora_alpha must be a positive number, not -1"),
        ("adapter_config.json", '{"lora_alpha": 1, "alpha_pattern": {"(": 2}}', r"invalid expression"),
        ("adapter_config.json", '{"lora_alpha": 1, "use_dora": true}', r"not that of a plain LoRA"),
        ("adapter_config.json", '{"peft_type": "LOHA"}', r"not that of a plain LoRA"),
        ("adapter_config.json", "[1]", r"adapter_config\.json holds list"),
        ("adapter_config.json", "{", r"adapter_config\.json is not valid JSON"),
    ],
)
def test_a_scale_that_is_no_number_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", [spelled(seed, SPELLINGS["comfyui"]) for seed in (3, 4)])
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        loaded(folder)


# --- adapters of a part, with differences, and with more than there is ----------------------------------------------


def test_an_adapter_of_some_linears(tmp_path: Path) -> None:
    states = [spelled(seed, SPELLINGS["comfyui"]) for seed in (3, 4)]
    part = [{key: tensor for key, tensor in state.items() if ".self_attn." in key} for state in states]
    whole = [released_state(seed) for seed in (3, 4)]
    for state in whole:
        for key in [key for key in state if ".self_attn." not in key]:
            state[key] = torch.zeros_like(state[key])
    expected = outputs(merged(plain(), write_pair(tmp_path / "whole", *whole), 1.0))
    folder = write(tmp_path / "x", part)
    assert close(loaded(folder), expected)
    with pytest.raises(ValueError, match=r"(?s)does not fit.*missing \(24\).*cross_attn\.q\.lora_A"):
        loaded(folder, strict=True)


def test_differences_are_added_to_the_networks_own_parameters(tmp_path: Path) -> None:
    """As in step-distilled adapters that were extracted from whole networks; diffusers drops most of them."""
    generator = torch.Generator().manual_seed(9)
    shapes = {
        "blocks.0.self_attn.q.diff_b": (24,),
        "blocks.1.ffn.0.diff_b": (40,),
        "blocks.0.self_attn.norm_q.diff": (24,),
        "blocks.1.norm3.diff": (24,),
        "blocks.1.norm3.diff_b": (24,),
        "blocks.0.diff_m": (1, 6, 24),
        "blocks.1.modulation.diff": (1, 6, 24),
        "head.diff_m": (1, 2, 24),
        "head.head.diff": (64, 24),
        "head.head.diff_b": (64,),
        "time_embedding.0.diff_b": (24,),
        "patch_embedding.diff": (24, 36, 1, 2, 2),
    }
    differences = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    state = spelled(3, SPELLINGS["comfyui"]) | {f"diffusion_model.{key}": v for key, v in differences.items()}
    write_pair(tmp_path / "expected", released_state(3), released_state(3))
    expected = plain()
    for transformer in (expected.transformer, expected.transformer_2):
        own = dict(transformer.named_parameters())
        for key, name in {
            "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
            "blocks.1.ffn.0.diff_b": "blocks.1.ffn.net.0.proj.bias",
            "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
            "blocks.1.norm3.diff": "blocks.1.norm2.weight",
            "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
            "blocks.0.diff_m": "blocks.0.scale_shift_table",
            "blocks.1.modulation.diff": "blocks.1.scale_shift_table",
            "head.diff_m": "scale_shift_table",
            "head.head.diff": "proj_out.weight",
            "head.head.diff_b": "proj_out.bias",
            "time_embedding.0.diff_b": "condition_embedder.time_embedder.linear_1.bias",
            "patch_embedding.diff": "patch_embedding.weight",
        }.items():
            own[name].data += 0.5 * differences[key]
    merged(expected, tmp_path / "expected", 0.5)
    pipe = plain()
    load_memory_lora(pipe, write_pair(tmp_path / "memory", released_state(5), released_state(6)), weight=0.0)
    folder = write(tmp_path / "x", [state, state])
    load_memory_lora(pipe, folder, adapter_name="steps", weight=0.5, strict=False)
    assert close(outputs(pipe), outputs(expected))
    with pytest.raises(ValueError, match=r"(?s)unexpected \(12\).*\.diff"):
        loaded(folder, strict=True)


def test_linears_outside_the_blocks_and_a_convolution(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    a, b = torch.randn(2, 36, 1, 2, 2, generator=generator), 0.1 * torch.randn(24, 2, 1, 1, 1, generator=generator)
    c, d = torch.randn(2, 24, generator=generator), 0.1 * torch.randn(64, 2, generator=generator)
    state = {
        "diffusion_model.patch_embedding.lora_down.weight": a,
        "diffusion_model.patch_embedding.lora_up.weight": b,
        "diffusion_model.head.head.lora_down.weight": c,
        "diffusion_model.head.head.lora_up.weight": d,
    }
    expected = plain()
    for transformer in (expected.transformer, expected.transformer_2):
        transformer.patch_embedding.weight.data += torch.einsum("or,ritpq->oitpq", b[..., 0, 0, 0], a)
        transformer.proj_out.weight.data += d @ c
    assert close(loaded(write(tmp_path / "x", [state, state])), outputs(expected))


def test_a_bias_of_b_is_scaled_as_the_product_is(tmp_path: Path) -> None:
    state = spelled(3, SPELLINGS["diffusers"])
    bias = torch.linspace(-1, 1, 40)
    state["transformer.blocks.0.ffn.net.0.proj.lora_B.bias"] = bias
    folder = write(tmp_path / "x", [state, state], {"lora_alpha": "2"})
    write_pair(tmp_path / "expected", released_state(3), released_state(3))
    expected = merged(plain(), tmp_path / "expected", 0.5)
    for transformer in (expected.transformer, expected.transformer_2):
        transformer.blocks[0].ffn.net[0].proj.bias.data += 0.5 * bias
    assert close(loaded(folder), outputs(expected))


def test_keys_that_are_not_used_are_listed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = spelled(3, SPELLINGS["kohya"])
    for key in ("blocks_0_cross_attn_k_img", "blocks_2_self_attn_q", "text_model_encoder_layers_0_mlp_fc1"):
        state |= {f"lora_unet_{key}.{part}.weight": torch.zeros(4, 4) for part in ("lora_down", "lora_up")}
    folder = write(tmp_path / "x", [state, state])
    with caplog.at_level(logging.INFO):
        loaded(folder)
        loaded(folder)
    warned = [record.message for record in caplog.records if "x_high_noise" in record.message]
    assert len(warned) == 1
    assert "x_high_noise.safetensors: 20 of 20 linears of the blocks, scale 1 (the file states no alpha" in warned[0]
    assert "not used (6):" in warned[0]
    assert "lora_unet_blocks_0_cross_attn_k_img.lora_down.weight" in warned[0]
    with pytest.raises(ValueError, match=r"(?s)unexpected \(6\).*k_img"):
        loaded(folder, strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"diffusion_model.blocks.0.ffn.0.dora_scale": torch.ones(40, 1)}), "not a plain LoRA"),
        (lambda s: s.update({"lora_unet_blocks_0_ffn_0.hada_w1_a": torch.ones(4, 4)}), "not a plain LoRA.*hada_w1_a"),
        (lambda s: s.update({"diffusion_model.blocks.0.ffn.0.lokr_w1": torch.ones(4, 4)}), "not a plain LoRA"),
        (lambda s: s.pop("diffusion_model.blocks.0.ffn.0.lora_B.weight"), r"missing \(1\).*blocks\.0\.ffn\.0\.lora_B"),
        (
            lambda s: s.update({"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.ones(4, 25)}),
            r"misshapen \(1\).*blocks\.0\.ffn\.0\.lora_A\.weight is \[4, 25\], not \[4, 24\]",
        ),
        (
            lambda s: s.update({"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.tensor(1.0)}),
            r"misshapen.*ffn\.0\.lora_A\.weight is \[\], not \[1, 24\]",
        ),
        (
            lambda s: s.update({"diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(41)}),
            r"misshapen.*diff_b is \[41\], not \[40\]",
        ),
        (
            lambda s: s.update({"blocks.0.ffn.0.lora_A.weight": torch.ones(4, 24)}),
            r"given twice \(1\).*ffn\.0\.lora_A",
        ),
        (
            lambda s: s.update({"diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(math.nan)}),
            r"ffn\.0\.alpha holds NaN",
        ),
        (
            lambda s: s.update({"diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(-1.0)}),
            r"ffn\.0\.alpha must be a positive number, not -1",
        ),
    ],
)
def test_what_would_be_applied_in_part_or_wrongly_is_refused(
    change: Callable[[State], Any], message: str, tmp_path: Path
) -> None:
    state = spelled(3, SPELLINGS["comfyui"])
    change(state)
    pipe = plain()
    with pytest.raises(ValueError, match=f"(?s)x_low_noise.*{message}"):
        load_memory_lora(pipe, write(tmp_path / "x", [spelled(3, SPELLINGS["comfyui"]), state]), strict=False)
    assert torch.equal(outputs(pipe), outputs(plain())), "neither expert was touched"


def test_a_file_for_another_network_is_refused(tmp_path: Path) -> None:
    state = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 24)}
    with pytest.raises(ValueError, match=r"(?s)contains nothing for this transformer.*double_blocks_0"):
        loaded(write(tmp_path / "x", [state, state]))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e20])
@pytest.mark.parametrize("strict", [True, False])
def test_nan_and_infinity_are_named_with_their_file(value: float, strict: bool, tmp_path: Path) -> None:
    state = spelled(3, SPELLINGS["comfyui"])
    state["diffusion_model.blocks.1.ffn.2.lora_B.weight"][3, 2] = value
    pipe = plain()
    with pytest.raises(NotFiniteError, match=r"x_low_noise\.safetensors: .*blocks\.1\.ffn\.2\.lora_B\.weight holds"):
        load_memory_lora(pipe, write(tmp_path / "x", [spelled(3, SPELLINGS["comfyui"]), state]), strict=strict)
    assert torch.equal(outputs(pipe), outputs(plain())), "neither expert was touched"


# --- names of files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("mychar_wan22_H", "mychar_wan22_L"),
        ("mychar_HN-000020", "mychar_LN-000020"),
        ("Wan2.2-HighNoise-style", "Wan2.2-LowNoise-style"),
        ("wan22_i2vHigh", "wan22_i2vLow"),
        ("WAN_HIGH_14B", "WAN_LOW_14B"),
        ("high", "low"),
        ("low_rank_high_noise", "low_rank_low_noise"),
        ("high_quality_highnoise", "high_quality_lownoise"),
        ("high_noise_model/x", "low_noise_model/x"),
        ("HighNoise/x", "LowNoise/x"),
        ("transformer/x", "transformer_2/x"),
    ],
)
def test_file_names_choose_the_expert(high: str, low: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    for name, seed in ((high, 3), (low, 4)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(spelled(seed, SPELLINGS["comfyui"]), folder / f"{name}.safetensors")
    found = read_memory_lora({"high_noise": expert(1), "low_noise": expert(2)}, folder)
    assert {e: adapter.file.path.relative_to(folder).with_suffix("").as_posix() for e, adapter in found.items()} == {
        "high_noise": high,
        "low_noise": low,
    }


def test_unclear_file_names_are_refused(tmp_path: Path) -> None:
    for name in ("low_light_high_contrast", "part_two"):
        save_file(spelled(3, SPELLINGS["comfyui"]), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"more than one adapter file.*with high_noise and low_noise in their names"):
        loaded(tmp_path)


def test_a_second_file_is_not_taken_for_the_missing_half(tmp_path: Path) -> None:
    for name in ("style_high_noise", "notes"):
        save_file(spelled(3, SPELLINGS["comfyui"]), tmp_path / f"{name}.safetensors")
    with pytest.raises(MissingWeights, match="nothing for the low_noise expert"):
        loaded(tmp_path)


def test_one_file_serves_both_experts_or_the_one_it_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(spelled(3, SPELLINGS["comfyui"]), tmp_path / "style.safetensors")
    both = loaded(tmp_path / "style.safetensors")
    write_pair(tmp_path / "twice", released_state(3), released_state(3))
    assert close(both, outputs(merged(plain(), tmp_path / "twice", 1.0)))
    assert "used for both experts" in caplog.text
    (tmp_path / "style.safetensors").rename(tmp_path / "style_low.safetensors")
    one = loaded(tmp_path / "style_low.safetensors")
    assert torch.equal(one[0], outputs(plain())[0])
    assert close(one[1], both[1])
    assert "nothing for the high_noise expert" in caplog.text
    with pytest.raises(ValueError, match="does not name the expert"):
        loaded(tmp_path / "style_low.safetensors", strict=True)


# --- files ----------------------------------------------------------------------------------------------------------


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (fifo, r"x_low_noise\.safetensors is not a regular file"),
        (lambda path: os.truncate(path, 1000), r"x_low_noise\.safetensors is not a readable safetensors file"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        (lambda path: path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}"), "not a readable safetensors file"),
        (lambda path: path.rename(path.with_suffix(".pth")), r"x_low_noise\.pth is not a readable file of tensors"),
    ],
)
def test_files_that_cannot_be_read_are_named_before_work(
    damage: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "x", [spelled(seed, SPELLINGS["comfyui"]) for seed in (3, 4)])
    damage(folder / "x_low_noise.safetensors")
    with pytest.raises(ValueError, match=message):
        read_memory_lora({"high_noise": expert(1), "low_noise": expert(2)}, folder)


def test_a_file_and_a_folder_in_the_settings(tmp_path: Path) -> None:
    """The step-distilled adapter of a sampler is compared with its networks before anything is loaded."""
    model = settings()
    pipe = load_pipeline(model, runtime=CPU, text_encoder=False)
    dims = {"ffn.0": (96, 48), "ffn.2": (48, 96)}
    state = {}
    for name in ORIGINAL:
        out, inside = dims.get(name, (48, 48))
        state[f"lora_unet_blocks_0_{name.replace('.', '_')}.lora_down.weight"] = torch.ones(2, inside)
        state[f"lora_unet_blocks_0_{name.replace('.', '_')}.lora_up.weight"] = torch.ones(out, 2)
    folder = write(tmp_path / "steps", [state, state])

    def sampler(source: Path) -> SamplerSettings:
        weights = {"name": "steps", "source": str(source)}
        return SamplerSettings(adapter=StepAdapterSettings(weights=weights, text_to_video=weights))  # type: ignore[arg-type]

    check_weights(model, text_to_video=True, sampler=sampler(folder))
    loaded_pipe = load_pipeline(model, runtime=CPU, sampler=sampler(folder), text_encoder=False)
    assert loaded_pipe.transformer.active_adapters() == [STEP_ADAPTER]
    assert not hasattr(pipe.transformer, "peft_config")
    (found,) = inspect_weights(model, text_to_video=False, sampler=sampler(folder))
    assert "10 of 10 linears of the blocks, scale 1 (the file states no alpha" in str(found)
    state["lora_unet_blocks_0_ffn_0.lora_up.weight"] = torch.ones(95, 2)
    write(folder, [state, state])
    with pytest.raises(ValueError, match=r"lora_unet_blocks_0_ffn_0\.lora_up\.weight is \[95, 2\], not \[96, 2\]"):
        check_weights(model, text_to_video=False, sampler=sampler(folder))


def test_diffs_stay_out_of_a_saved_file(tmp_path: Path) -> None:
    """Saving a stacked memory adapter again gives its own matrices, whatever else was loaded."""
    from storymem.wan.lora import save_memory_lora

    pipe: WanImageToVideoPipeline = pipeline(expert(1), expert(2))
    load_memory_lora(pipe, write_pair(tmp_path / "memory", released_state(3), released_state(4)), alpha=4)
    state = spelled(5, SPELLINGS["comfyui"]) | {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(24)}
    load_memory_lora(pipe, write(tmp_path / "x", [state, state]), adapter_name="steps", strict=False)
    high, _ = save_memory_lora(pipe, tmp_path / "out", layout="released")
    ours, theirs = load_file(high), released_state(3)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
