"""Memory adapters: every layout in, every layout out, at its scale, with nothing left over or guessed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn

from storymem.wan.lora import (
    AdapterInfo,
    load_memory_lora,
    memory_lora_config,
    save_memory_lora,
    write_memory_lora,
)
from tests.references import folders_with
from tests.wan.adapters import (
    LAYOUTS,
    ORIGINAL,
    close,
    expert,
    merged,
    outputs,
    pipeline,
    plain,
    released_state,
    write_pair,
)


@pytest.mark.parametrize(
    ("arguments", "scale"),
    [
        ({}, 128 / math.sqrt(4)),
        ({"alpha": 8}, 8 / math.sqrt(4)),
        ({"alpha": 8, "use_rslora": False}, 8 / 4),
        ({"alpha": 8, "use_rslora": False, "weight": 0.25}, 0.25 * 8 / 4),
        ({"weight": 0.0}, 0.0),
    ],
)
def test_released_files_take_the_published_scale_unless_given(
    stock: WanImageToVideoPipeline, released: Path, arguments: dict, scale: float
) -> None:
    load_memory_lora(stock, released, **arguments)
    assert close(outputs(stock), outputs(merged(plain(), released, scale)))


def test_rank_is_read_from_the_file_module_by_module(stock: WanImageToVideoPipeline, tmp_path: Path) -> None:
    wide, narrow = released_state(3, rank=4), released_state(3, rank=2)
    mixed = {key: (narrow if "self_attn" in key else wide)[key] for key in wide}
    info = load_memory_lora(stock, write_pair(tmp_path, mixed, mixed), alpha=6)
    layers = stock.transformer.blocks[1]
    assert info.rank == 4
    assert layers.attn1.to_q.scaling["memory"] == pytest.approx(6 / math.sqrt(2))
    assert layers.ffn.net[2].scaling["memory"] == pytest.approx(6 / math.sqrt(4))
    before = outputs(stock)
    for layout in LAYOUTS:
        save_memory_lora(stock, tmp_path / layout, layout=layout)
        again = plain()
        load_memory_lora(again, tmp_path / layout)
        assert close(outputs(again), before), layout


def test_adapter_takes_the_dtype_of_the_weights_it_adapts(released: Path) -> None:
    pipe = pipeline(expert(1).to(torch.bfloat16), expert(2))
    load_memory_lora(pipe, released)
    assert pipe.transformer.blocks[0].attn1.to_q.lora_A["memory"].weight.dtype == torch.bfloat16
    assert pipe.transformer_2.blocks[0].attn1.to_q.lora_A["memory"].weight.dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("use_rslora", [True, False])
def test_round_trip_through_a_layout_keeps_output_and_description(
    stock: WanImageToVideoPipeline, released: Path, tmp_path: Path, layout: str, use_rslora: bool
) -> None:
    load_memory_lora(stock, released, alpha=5, use_rslora=use_rslora, weight=0.5)
    about = AdapterInfo(
        memory_attention="cached",
        rope_stride=3,
        conditioning="mi2v",
        training={"steps": 20_000, "data": ["a"]},
    )
    save_memory_lora(stock, tmp_path / "saved", layout=layout, metadata=about)
    again = plain()
    info = load_memory_lora(again, tmp_path / "saved", weight=0.5)
    assert close(outputs(again), outputs(stock))
    assert not close(outputs(again), outputs(plain()))
    assert (info.memory_attention, info.rope_stride, info.conditioning) == ("cached", 3, "mi2v")
    assert info.training == about.training
    assert info.rank == 4
    stated = {"released": (4, True), "comfyui": (5 * (2 if use_rslora else 1), False)}.get(layout, (5, use_rslora))
    assert (info.alpha, info.use_rslora) == pytest.approx(stated)


def test_released_layout_gives_back_the_released_tensors(
    stock: WanImageToVideoPipeline, released: Path, tmp_path: Path
) -> None:
    load_memory_lora(stock, released, alpha=4)  # the rank: what readers of this layout take
    for path in save_memory_lora(stock, tmp_path / "again", layout="released"):
        ours, theirs, pickled = (
            load_file(path),
            load_file(released / path.name),
            torch.load(path.with_suffix(".pth"), weights_only=True),
        )
        assert ours.keys() == theirs.keys() == pickled.keys()
        assert all(torch.equal(ours[key], theirs[key]) and torch.equal(ours[key], pickled[key]) for key in theirs)


@pytest.mark.parametrize(("alpha", "use_rslora"), [(16, True), (4, False), (2.5, True)])
def test_the_published_code_reads_the_released_layout_at_the_right_strength(
    stock: WanImageToVideoPipeline, released: Path, tmp_path: Path, alpha: float, use_rslora: bool
) -> None:
    """It opens the ``.pth`` and takes alpha = rank with rsLoRA, whatever the adapter was trained with."""
    load_memory_lora(stock, released, alpha=alpha, use_rslora=use_rslora)
    folder = tmp_path / "out"
    save_memory_lora(stock, folder, layout="released")
    for noise in ("high", "low"):
        theirs = torch.load(folder / f"backbone_{noise}_noise.pth", weights_only=True)
        trained = load_file(released / f"backbone_{noise}_noise.safetensors")
        for key in [key for key in theirs if ".lora_A." in key]:
            b = key.replace("lora_A", "lora_B")
            expected = alpha / (2 if use_rslora else 4) * trained[b] @ trained[key]
            torch.testing.assert_close(4 / math.sqrt(4) * theirs[b] @ theirs[key], expected)
    by_us, from_pth = plain(), plain()
    load_memory_lora(by_us, folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    load_memory_lora(from_pth, folder)
    assert close(outputs(by_us), outputs(stock))
    assert torch.equal(outputs(from_pth), outputs(by_us)), "the .pth carries its description too"


def test_diffusers_own_loader_reads_two_layouts_to_the_same_output(
    stock: WanImageToVideoPipeline, released: Path, tmp_path: Path
) -> None:
    load_memory_lora(stock, released, alpha=5)
    (both,) = save_memory_lora(stock, tmp_path / "out", layout="diffusers")
    by_pipeline, by_transformer = plain(), plain()
    by_pipeline.load_lora_weights(tmp_path / "out")
    by_pipeline.transformer_2.load_lora_adapter(tmp_path / "out", prefix="transformer_2", weight_name=both.name)
    assert close(outputs(by_pipeline), outputs(stock))
    experts = (by_transformer.transformer, by_transformer.transformer_2)
    for path, transformer in zip(save_memory_lora(stock, tmp_path / "out", layout="storymem"), experts, strict=True):
        transformer.load_lora_adapter(tmp_path / "out", prefix=None, weight_name=path.name)
    assert close(outputs(by_transformer), outputs(stock))


def test_comfyui_alpha_over_rank_is_the_scale(stock: WanImageToVideoPipeline, released: Path, tmp_path: Path) -> None:
    load_memory_lora(stock, released, alpha=5)
    high, low = save_memory_lora(stock, tmp_path / "out", layout="comfyui")
    state, theirs = load_file(high), load_file(released / "backbone_high_noise.safetensors")
    for name in (f"blocks.{block}.{linear}" for block in range(2) for linear in ORIGINAL):
        down, up = (
            state[f"diffusion_model.{name}.lora_down.weight"],
            state[f"diffusion_model.{name}.lora_up.weight"],
        )
        comfy = (state[f"diffusion_model.{name}.alpha"] / down.shape[0]) * up @ down
        b, a = (theirs[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA")
        torch.testing.assert_close(comfy, 5 / math.sqrt(4) * b @ a)
    by_diffusers = plain()  # its converter folds alpha / rank into the weights
    by_diffusers.load_lora_weights(high)
    by_diffusers.load_lora_weights(low, load_into_transformer_2=True)
    assert close(outputs(by_diffusers), outputs(stock))


def test_folders_saved_by_peft_and_by_diffusers(stock: WanImageToVideoPipeline, released: Path, tmp_path: Path) -> None:
    load_memory_lora(stock, released, alpha=5)
    for name in ("transformer", "transformer_2"):
        getattr(stock, name).save_lora_adapter(tmp_path / "diffusers" / name, adapter_name="memory")
        state = load_file(tmp_path / "diffusers" / name / "pytorch_lora_weights.safetensors")
        (tmp_path / "peft" / name).mkdir(parents=True)
        save_file(
            {f"base_model.model.{k}": v for k, v in state.items()},
            tmp_path / "peft" / name / "adapter_model.safetensors",
        )
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 5, "use_rslora": True, "alpha_pattern": {}}
        (tmp_path / "peft" / name / "adapter_config.json").write_text(json.dumps(config))
    for folder in ("diffusers", "peft"):
        again = plain()
        info = load_memory_lora(again, tmp_path / folder)
        assert (info.alpha, info.use_rslora) == (5, True)
        assert close(outputs(again), outputs(stock)), folder


def test_peft_alpha_pattern_is_followed(tmp_path: Path) -> None:
    save_file(released_state(3), tmp_path / "adapter_model.safetensors")
    config = {"lora_alpha": 4, "alpha_pattern": {"self_attn.q": 12, "blocks.1.ffn.0": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    pipe = pipeline(expert(1), None)
    load_memory_lora(pipe, tmp_path)
    first, second = pipe.transformer.blocks
    assert [b.attn1.to_q.scaling["memory"] for b in (first, second)] == [12 / 4, 12 / 4]
    assert [b.ffn.net[0].proj.scaling["memory"] for b in (first, second)] == [4 / 4, 2 / 4]
    assert first.attn2.to_q.scaling["memory"] == 4 / 4


@pytest.mark.parametrize("case", folders_with("backbone_high_noise.safetensors"), ids=lambda case: case.name)
def test_reference_weights_load_into_reference_experts(case: Path) -> None:
    settings = json.loads((case / "case.json").read_text())
    pipe = pipeline(*(WanTransformer3DModel.from_pretrained(case / n) for n in ("transformer", "transformer_2")))
    info = load_memory_lora(pipe, case, alpha=settings["lora_alpha"], use_rslora=settings["use_rslora"])
    assert info.rank == settings["lora_rank"]
    root = math.sqrt(settings["lora_rank"]) if settings["use_rslora"] else settings["lora_rank"]
    for transformer, noise in ((pipe.transformer, "high"), (pipe.transformer_2, "low")):
        state = load_file(case / f"backbone_{noise}_noise.safetensors")
        layer = transformer.blocks[1].ffn.net[0].proj
        a, b = (state[f"base_model.model.blocks.1.ffn.0.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(layer.get_delta_weight("memory"), settings["lora_alpha"] / root * b @ a)


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return write_pair(tmp_path / "second", released_state(5, rank=2), released_state(6, rank=2))


def test_two_memory_adapters_add_up_with_weights_of_their_own(
    stock: WanImageToVideoPipeline, released: Path, second: Path
) -> None:
    load_memory_lora(stock, released, alpha=4, weight=0.5)
    load_memory_lora(stock, second, alpha=2, use_rslora=False, adapter_name="style", weight=0.25)
    expected = merged(merged(plain(), released, 0.5 * 4 / 2), second, 0.25 * 2 / 2)
    assert close(outputs(stock), outputs(expected))
    stock.set_adapters(["memory", "style"], [0.0, 1.0])
    assert close(outputs(stock), outputs(merged(plain(), second, 1.0)))
    stock.delete_adapters("style")
    stock.set_adapters("memory", 1.0)
    assert close(outputs(stock), outputs(merged(plain(), released, 2.0)))


@pytest.mark.parametrize("memory_first", [True, False])
def test_stacks_with_an_adapter_that_diffusers_loaded(
    stock: WanImageToVideoPipeline, released: Path, tmp_path: Path, memory_first: bool
) -> None:
    """A step-distilled adapter: ComfyUI's layout, diffusers' own loader, other modules than ours."""
    few_steps = {
        k.replace("base_model.model", "diffusion_model"): v
        for k, v in released_state(7, rank=2).items()
        if ".ffn." not in k
    }
    save_file(few_steps, tmp_path / "lightning.safetensors")
    if memory_first:
        load_memory_lora(stock, released, alpha=4)
    stock.load_lora_weights(tmp_path / "lightning.safetensors", adapter_name="lightning")
    stock.load_lora_weights(tmp_path / "lightning.safetensors", adapter_name="lightning", load_into_transformer_2=True)
    if not memory_first:
        load_memory_lora(stock, released, alpha=4)
        assert set(stock.get_active_adapters()) == {"lightning", "memory"}
    stock.set_adapters(["memory", "lightning"], [1.0, 0.5])
    expected = merged(plain(), released, 4 / 2)
    zeros = {f"{k}": torch.zeros_like(v) for k, v in released_state(7, rank=2).items() if ".ffn." in k}
    rest = {k.replace("diffusion_model", "base_model.model"): v for k, v in few_steps.items()} | zeros
    expected = merged(expected, write_pair(tmp_path / "rest", rest, rest), 0.5)
    assert close(outputs(stock), outputs(expected))


def test_fuse_unfuse_and_unload(stock: WanImageToVideoPipeline, released: Path, second: Path) -> None:
    load_memory_lora(stock, released, alpha=4)
    loaded = outputs(stock)
    stock.fuse_lora(components=["transformer", "transformer_2"])
    assert close(outputs(stock), loaded)
    with pytest.raises(ValueError, match=r"fused adapters; call pipe\.unfuse_lora"):
        load_memory_lora(stock, second, adapter_name="style")
    stock.unfuse_lora(components=["transformer", "transformer_2"])
    stock.unload_lora_weights()
    assert close(outputs(stock), outputs(plain()))
    load_memory_lora(stock, released, alpha=4)
    assert close(outputs(stock), loaded)


@pytest.mark.parametrize("name", ["memory", "wan2.2", ""])
def test_impossible_adapter_names_are_refused(stock: WanImageToVideoPipeline, released: Path, name: str) -> None:
    load_memory_lora(stock, released)
    with pytest.raises(ValueError, match="adapter_name"):
        load_memory_lora(stock, released, adapter_name=name)


def test_a_trained_adapter_is_saved_from_its_transformers(tmp_path: Path) -> None:
    transformer = expert(1)
    transformer.add_adapter(memory_lora_config(rank=4, alpha=6), "memory")
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    transformer.eval()
    save_memory_lora({"high_noise": transformer}, tmp_path)
    again = pipeline(expert(1), None)
    assert load_memory_lora(again, tmp_path) == AdapterInfo(rank=4, alpha=6)
    assert close(outputs(again), outputs(pipeline(transformer, None)))


def test_only_memory_adapters_are_saved(stock: WanImageToVideoPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter called 'memory'; it has: none"):
        save_memory_lora(stock, tmp_path)
    config = memory_lora_config(rank=4)
    config.target_modules = {"attn1.to_q", "proj_out"}
    stock.transformer.add_adapter(config, "memory")
    with pytest.raises(ValueError, match=r"missing or unexpected \(38\)"):
        save_memory_lora({"high_noise": stock.transformer}, tmp_path)
    with pytest.raises(ValueError, match="layout must be one of storymem, released, diffusers, comfyui"):
        write_memory_lora({"high_noise": {}}, tmp_path, info=AdapterInfo(), layout="kohya")
    assert not list(tmp_path.iterdir())
