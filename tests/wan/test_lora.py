"""Memory adapters: every layout in, every layout out, at its scale, with nothing left over or guessed."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from storymem.wan.lora import (
    AdapterInfo,
    adapted_linears,
    load_memory_lora,
    memory_lora_config,
    read_memory_lora,
    save_memory_lora,
    write_memory_lora,
)
from storymem.weights import MissingWeights
from tests.references import folders_with

LAYOUTS = ["storymem", "released", "diffusers", "comfyui"]
TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40}
A14B = {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}
OTHERS = {"in_channels": 36, "out_channels": 16, "text_dim": 24, "freq_dim": 32}
# The published names, written out here once more: what the original network calls the ten linears of a block.
ORIGINAL = [f"{attention}.{x}" for attention in ("self_attn", "cross_attn") for x in "qkvo"] + ["ffn.0", "ffn.2"]
ADAPTED = [f"attn{n}.to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out.0")] + ["ffn.net.0.proj", "ffn.net.2"]
TO_DIFFUSERS = dict(zip(ORIGINAL, ADAPTED, strict=True))


def expert(seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(**TINY, **OTHERS).eval()


def pipeline(transformer: nn.Module | None, transformer_2: nn.Module | None) -> WanImageToVideoPipeline:
    others = dict.fromkeys(["tokenizer", "text_encoder", "vae", "scheduler", "image_processor", "image_encoder"])
    return WanImageToVideoPipeline(**others, transformer=transformer, transformer_2=transformer_2)


@pytest.fixture
def pipe() -> WanImageToVideoPipeline:
    return pipeline(expert(1), expert(2))


@torch.no_grad()
def outputs(pipe: WanImageToVideoPipeline) -> Tensor:
    """What both experts compute for one fixed input."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 36, 2, 4, 4, generator=generator)
    text = torch.randn(1, 5, 24, generator=generator)
    experts = [x for x in (pipe.transformer, pipe.transformer_2) if x is not None]
    return torch.stack([x(latents, torch.tensor([500.0]), text, return_dict=False)[0] for x in experts])


def released_state(seed: int, rank: int = 4, blocks: int = 2, dim: int = 24, ffn: int = 40) -> dict[str, Tensor]:
    """An adapter under the released files' keys, for the tiny transformer."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for block in range(blocks):
        for name in ORIGINAL:
            inside = ffn if name == "ffn.2" else dim
            outside = ffn if name == "ffn.0" else dim
            key = f"base_model.model.blocks.{block}.{name}"
            state[f"{key}.lora_A.weight"] = 0.3 * torch.randn(rank, inside, generator=generator)
            state[f"{key}.lora_B.weight"] = 0.3 * torch.randn(outside, rank, generator=generator)
    return state


def write_pair(folder: Path, high: dict[str, Tensor], low: dict[str, Tensor], stem: str = "backbone_") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(high, folder / f"{stem}high_noise.safetensors")
    save_file(low, folder / f"{stem}low_noise.safetensors")
    return folder


@pytest.fixture
def released(tmp_path: Path) -> Path:
    return write_pair(tmp_path / "adapter", released_state(3), released_state(4))


def merged(pipe: WanImageToVideoPipeline, folder: Path, scale: float) -> WanImageToVideoPipeline:
    """W + scale * B @ A, done on plain transformers."""
    for transformer, noise in ((pipe.transformer, "high"), (pipe.transformer_2, "low")):
        state = load_file(folder / f"backbone_{noise}_noise.safetensors")
        for key in [key for key in state if ".lora_A." in key]:
            block, linear = re.findall(r"blocks\.(\d+)\.(.+)\.lora_A", key)[0]
            weight = transformer.get_submodule(f"blocks.{block}.{TO_DIFFUSERS[linear]}").weight
            weight.data += scale * state[key.replace("lora_A", "lora_B")] @ state[key]
    return pipe


def plain() -> WanImageToVideoPipeline:
    return pipeline(expert(1), expert(2))


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 2e-6 * b.norm())


# --- scale ------------------------------------------------------------------------------------------------


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
    pipe: WanImageToVideoPipeline, released: Path, arguments: dict, scale: float
) -> None:
    load_memory_lora(pipe, released, **arguments)
    assert close(outputs(pipe), outputs(merged(plain(), released, scale)))


def test_rank_is_read_from_the_file_module_by_module(pipe: WanImageToVideoPipeline, tmp_path: Path) -> None:
    wide, narrow = released_state(3, rank=4), released_state(3, rank=2)
    mixed = {key: (narrow if "self_attn" in key else wide)[key] for key in wide}
    info = load_memory_lora(pipe, write_pair(tmp_path, mixed, mixed), alpha=6)
    layers = pipe.transformer.blocks[1]
    assert info.rank == 4
    assert layers.attn1.to_q.scaling["memory"] == pytest.approx(6 / math.sqrt(2))
    assert layers.ffn.net[2].scaling["memory"] == pytest.approx(6 / math.sqrt(4))
    before = outputs(pipe)
    for layout in LAYOUTS:
        save_memory_lora(pipe, tmp_path / layout, layout=layout)
        again = plain()
        load_memory_lora(again, tmp_path / layout)
        assert close(outputs(again), before), layout


def test_adapter_takes_the_dtype_of_the_weights_it_adapts(released: Path) -> None:
    pipe = pipeline(expert(1).to(torch.bfloat16), expert(2))
    load_memory_lora(pipe, released)
    assert pipe.transformer.blocks[0].attn1.to_q.lora_A["memory"].weight.dtype == torch.bfloat16
    assert pipe.transformer_2.blocks[0].attn1.to_q.lora_A["memory"].weight.dtype == torch.float32


# --- layouts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("use_rslora", [True, False])
def test_round_trip_through_a_layout_keeps_output_and_description(
    pipe: WanImageToVideoPipeline, released: Path, tmp_path: Path, layout: str, use_rslora: bool
) -> None:
    load_memory_lora(pipe, released, alpha=5, use_rslora=use_rslora, weight=0.5)
    about = AdapterInfo(
        memory_attention="cached",
        rope_stride=3,
        conditioning="mi2v",
        training={"steps": 20_000, "data": ["a"]},
    )
    save_memory_lora(pipe, tmp_path / "saved", layout=layout, metadata=about)
    again = plain()
    info = load_memory_lora(again, tmp_path / "saved", weight=0.5)
    assert close(outputs(again), outputs(pipe))
    assert not close(outputs(again), outputs(plain()))
    assert (info.memory_attention, info.rope_stride, info.conditioning) == ("cached", 3, "mi2v")
    assert info.training == about.training
    assert info.rank == 4
    stated = {"released": (4, True), "comfyui": (5 * (2 if use_rslora else 1), False)}.get(layout, (5, use_rslora))
    assert (info.alpha, info.use_rslora) == pytest.approx(stated)


def test_released_layout_gives_back_the_released_tensors(
    pipe: WanImageToVideoPipeline, released: Path, tmp_path: Path
) -> None:
    load_memory_lora(pipe, released, alpha=4)  # the rank: what readers of this layout take
    for path in save_memory_lora(pipe, tmp_path / "again", layout="released"):
        ours, theirs, pickled = (
            load_file(path),
            load_file(released / path.name),
            torch.load(path.with_suffix(".pth"), weights_only=True),
        )
        assert ours.keys() == theirs.keys() == pickled.keys()
        assert all(torch.equal(ours[key], theirs[key]) and torch.equal(ours[key], pickled[key]) for key in theirs)


@pytest.mark.parametrize(("alpha", "use_rslora"), [(16, True), (4, False), (2.5, True)])
def test_the_published_code_reads_the_released_layout_at_the_right_strength(
    pipe: WanImageToVideoPipeline, released: Path, tmp_path: Path, alpha: float, use_rslora: bool
) -> None:
    """It opens the ``.pth`` and takes alpha = rank with rsLoRA, whatever the adapter was trained with."""
    load_memory_lora(pipe, released, alpha=alpha, use_rslora=use_rslora)
    folder = tmp_path / "out"
    save_memory_lora(pipe, folder, layout="released")
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
    assert close(outputs(by_us), outputs(pipe))
    assert torch.equal(outputs(from_pth), outputs(by_us)), "the .pth carries its description too"


def test_diffusers_own_loader_reads_two_layouts_to_the_same_output(
    pipe: WanImageToVideoPipeline, released: Path, tmp_path: Path
) -> None:
    load_memory_lora(pipe, released, alpha=5)
    (both,) = save_memory_lora(pipe, tmp_path / "out", layout="diffusers")
    by_pipeline, by_transformer = plain(), plain()
    by_pipeline.load_lora_weights(tmp_path / "out")
    by_pipeline.transformer_2.load_lora_adapter(tmp_path / "out", prefix="transformer_2", weight_name=both.name)
    assert close(outputs(by_pipeline), outputs(pipe))
    experts = (by_transformer.transformer, by_transformer.transformer_2)
    for path, transformer in zip(save_memory_lora(pipe, tmp_path / "out", layout="storymem"), experts, strict=True):
        transformer.load_lora_adapter(tmp_path / "out", prefix=None, weight_name=path.name)
    assert close(outputs(by_transformer), outputs(pipe))


def test_comfyui_alpha_over_rank_is_the_scale(pipe: WanImageToVideoPipeline, released: Path, tmp_path: Path) -> None:
    load_memory_lora(pipe, released, alpha=5)
    high, low = save_memory_lora(pipe, tmp_path / "out", layout="comfyui")
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
    assert close(outputs(by_diffusers), outputs(pipe))


def test_folders_saved_by_peft_and_by_diffusers(pipe: WanImageToVideoPipeline, released: Path, tmp_path: Path) -> None:
    load_memory_lora(pipe, released, alpha=5)
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).save_lora_adapter(tmp_path / "diffusers" / name, adapter_name="memory")
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
        assert close(outputs(again), outputs(pipe)), folder


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


# --- true size --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def a14b() -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel(**A14B, **OTHERS)


def a14b_shapes(rank: int = 128) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for block in range(40):
        for name in ORIGINAL:
            key = f"base_model.model.blocks.{block}.{name}"
            shapes[f"{key}.lora_A.weight"] = (rank, 13824 if name == "ffn.2" else 5120)
            shapes[f"{key}.lora_B.weight"] = (13824 if name == "ffn.0" else 5120, rank)
    return shapes


def true_size(path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """A file of these tensors in 16 bits, sparse on disk: it has a header and no content."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * shape[1]
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_an_adapter_of_true_size_is_checked_key_by_key_without_its_weights(
    a14b: WanTransformer3DModel, tmp_path: Path
) -> None:
    shapes = a14b_shapes()
    for noise in ("high", "low"):
        true_size(tmp_path / f"backbone_{noise}_noise.safetensors", shapes)
    adapters = read_memory_lora({"high_noise": a14b, "low_noise": a14b}, tmp_path)
    inside_blocks = {n for n, m in a14b.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks.")}
    for adapter in adapters.values():
        assert adapter.parts.keys() == inside_blocks
        assert len(inside_blocks) == 40 * 10
        assert sorted(key for parts in adapter.parts.values() for key in parts.values()) == sorted(shapes)
        assert adapter.info == AdapterInfo(rank=128, alpha=128, use_rslora=True)


def test_long_lists_are_counted_but_not_printed_in_full(a14b: WanTransformer3DModel, tmp_path: Path) -> None:
    shapes = {key.replace("blocks.", "layers."): shape for key, shape in a14b_shapes().items()}
    true_size(tmp_path / "strange.safetensors", shapes)
    with pytest.raises(ValueError, match=r"(?s)missing \(800\).*792 more.*unexpected \(800\).*792 more") as error:
        read_memory_lora({"high_noise": a14b}, tmp_path / "strange.safetensors")
    assert len(str(error.value).splitlines()) < 30


def test_training_config_adapts_exactly_the_four_hundred_linears(a14b: WanTransformer3DModel) -> None:
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**A14B, **OTHERS)
        transformer.add_adapter(memory_lora_config(), "memory")
    adapted = {name for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == set(adapted_linears(a14b))
    layer = transformer.blocks[39].ffn.net[2]
    assert layer.scaling["memory"] == pytest.approx(128 / math.sqrt(128))
    assert layer.lora_dropout["memory"].p == 0.05


# --- what is refused --------------------------------------------------------------------------------------


def test_all_key_mistakes_are_listed_at_once(pipe: WanImageToVideoPipeline, tmp_path: Path) -> None:
    state = released_state(4)
    del state["base_model.model.blocks.1.self_attn.q.lora_B.weight"]
    state["base_model.model.blocks.0.cross_attn.k_img.lora_A.weight"] = torch.zeros(4, 24)
    state["base_model.model.blocks.2.ffn.0.lora_A.weight"] = torch.zeros(4, 24)
    state["base_model.model.blocks.0.ffn.0.lora_A.weight"] = torch.zeros(4, 25)
    state["base_model.model.blocks.1.ffn.2.lora_B.weight"] = torch.zeros(24, 3)
    state["base_model.model.blocks.0.ffn.2.lora_B.default.weight"] = torch.zeros(24, 4)
    folder = write_pair(tmp_path, released_state(3), state)
    with pytest.raises(ValueError, match=r"backbone_low_noise\.safetensors does not fit") as error:
        load_memory_lora(pipe, folder)
    message = str(error.value)
    assert "missing (1):\n    blocks.1.self_attn.q.lora_B" in message
    assert "unexpected (2)" in message
    assert "cross_attn.k_img.lora_A.weight" in message
    assert "blocks.2.ffn.0.lora_A.weight" in message
    assert "given twice (1)" in message
    assert "misshapen (2)" in message
    assert "blocks.0.ffn.0.lora_A.weight is [4, 25], not [4, 24]" in message
    assert "blocks.1.ffn.2.lora_B.weight is [24, 3], not [24, 4]" in message
    assert not getattr(pipe.transformer, "peft_config", {}), "the good expert must not have been touched either"


def test_pth_is_read_as_tensors(pipe: WanImageToVideoPipeline, released: Path, tmp_path: Path) -> None:
    torch.save(released_state(3), tmp_path / "backbone_high_noise.pth")
    torch.save(released_state(4), tmp_path / "backbone_low_noise.pth", _use_new_zipfile_serialization=False)
    load_memory_lora(pipe, tmp_path)
    other = plain()
    load_memory_lora(other, released)
    assert torch.equal(outputs(pipe), outputs(other))


class Payload:
    """A pickle that would write a file when opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.target, "code ran"))


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_pickle_with_code_is_refused_and_does_not_run(pipe: WanImageToVideoPipeline, tmp_path: Path, save) -> None:
    save({"a": Payload(tmp_path / "trace")}, tmp_path / "backbone_high_noise.pth")
    torch.save(released_state(4), tmp_path / "backbone_low_noise.pth")
    with pytest.raises(ValueError, match=r"backbone_high_noise\.pth is not a readable file of tensors"):
        load_memory_lora(pipe, tmp_path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], {"a": 1}, {1: torch.zeros(2)}, {"a": torch.zeros(2).to_sparse()}]
)
def test_pth_that_is_no_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "backbone_high_noise.pth")
    with pytest.raises(ValueError, match="does not contain a state dict"):
        load_memory_lora(pipeline(expert(1), None), tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arguments_that_contradict_the_file_are_refused(
    pipe: WanImageToVideoPipeline, released: Path, tmp_path: Path, layout: str
) -> None:
    load_memory_lora(pipe, released, alpha=5)
    save_memory_lora(pipe, tmp_path / "out", layout=layout)
    with pytest.raises(ValueError, match=r"states alpha=.*contradicts alpha=7"):
        load_memory_lora(plain(), tmp_path / "out", alpha=7)


def test_missing_weights_name_what_is_missing_and_what_is_there(
    pipe: WanImageToVideoPipeline, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MissingWeights, match=r"(?s)4\.9 GB.*hf download Kevin-thu/StoryMem .*Wan2\.2-MI2V-A14B"):
        load_memory_lora(pipe, "Kevin-thu/StoryMem", subfolder="Wan2.2-MI2V-A14B")
    (released / "backbone_low_noise.safetensors").unlink()
    with pytest.raises(MissingWeights, match=r"backbone_high_noise\.safetensors, so nothing for the low_noise"):
        load_memory_lora(pipe, released)
    with pytest.raises(MissingWeights, match=r"chosen as subfolder=: adapter"):
        load_memory_lora(pipe, released.parent)
    load_memory_lora(pipeline(expert(1), None), released.parent, subfolder="adapter")


def test_two_candidates_for_one_expert_are_refused(pipe: WanImageToVideoPipeline, released: Path) -> None:
    save_file(released_state(3), released / "old_high_noise.safetensors")
    with pytest.raises(ValueError, match=r"more than one adapter file.*backbone_high_noise.*old_high_noise"):
        load_memory_lora(pipe, released)


def test_one_file_without_a_named_expert_is_refused_for_two(pipe: WanImageToVideoPipeline, tmp_path: Path) -> None:
    save_file(released_state(3), tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not name the expert"):
        load_memory_lora(pipe, tmp_path)


def test_one_file_for_both_must_hold_both(released: Path, tmp_path: Path) -> None:
    both = plain()
    load_memory_lora(both, released)
    (path,) = save_memory_lora(both, tmp_path / "out", layout="diffusers")
    half = {key: tensor for key, tensor in load_file(path).items() if key.startswith("transformer.")}
    save_file(half | {"blocks.0.ffn.net.2.lora_A.weight": torch.zeros(4, 40)}, path)
    unclear = r"blocks\.0\.ffn\.net\.2\.lora_A\.weight"
    with pytest.raises(ValueError, match=rf"(?s)unexpected \(1\):\s+{unclear}"):
        load_memory_lora(plain(), path)
    save_file(half, path)
    with pytest.raises(ValueError, match=r"(?s)missing \(40\):\s+blocks\.0\.self_attn\.q\.lora_A"):
        load_memory_lora(plain(), path)


def test_a_pipeline_with_one_expert_needs_that_file_only(released: Path) -> None:
    (released / "backbone_high_noise.safetensors").unlink()
    low_only = pipeline(None, expert(2))
    load_memory_lora(low_only, released)
    both = plain()
    load_memory_lora(both, write_pair(released, released_state(3), released_state(4)))
    assert torch.equal(outputs(low_only)[0], outputs(both)[1])


@pytest.mark.parametrize("folders", [("", ""), ("high_noise", "low_noise")], ids=["one folder", "two folders"])
def test_experts_of_two_different_adapters_are_refused(tmp_path: Path, folders: tuple[str, str]) -> None:
    infos = [AdapterInfo(rank=4), AdapterInfo(rank=4, memory_attention="cached")]
    for expert, folder, info in zip(("high_noise", "low_noise"), folders, infos, strict=True):
        (path,) = write_memory_lora({expert: _diffusers_state(3)}, tmp_path / folder, info=info)
        if folder:
            path.rename(path.with_name("adapter.safetensors"))
    with pytest.raises(ValueError, match=r"memory_attention.*'joint'.*'cached'"):
        load_memory_lora(plain(), tmp_path)


def _diffusers_state(seed: int) -> dict[str, Tensor]:
    state = {}
    for key, tensor in released_state(seed).items():
        block, name, matrix = re.findall(r"blocks\.(\d+)\.(.+)\.(lora_[AB]\.weight)", key)[0]
        state[f"blocks.{block}.{TO_DIFFUSERS[name]}.{matrix}"] = tensor
    return state


# --- metadata ---------------------------------------------------------------------------------------------


def test_files_carry_their_description_and_other_readers_see_it(tmp_path: Path) -> None:
    info = AdapterInfo(rank=4, alpha=5, memory_attention="cached", training={"learning_rate": 1e-5})
    (path,) = write_memory_lora({"high_noise": _diffusers_state(3)}, tmp_path, info=info)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["storymem"])["memory_attention"] == "cached"
    assert json.loads(metadata["storymem"])["training"] == {"learning_rate": 1e-5}
    assert json.loads(metadata["lora_adapter_metadata"])["use_rslora"] is True
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name], "no temporary files stay behind"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{"version": 2}', "has version 2"),
        ('{"version": 1, "ranks": 4}', "ranks: unknown key"),
        ('{"version": 1, "memory_attention": "sparse"}', "memory_attention: input should be 'joint' or 'cached'"),
        ("[1]", "must be a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path: Path, entry: str, message: str) -> None:
    save_file(released_state(3), tmp_path / "backbone_high_noise.safetensors", metadata={"storymem": entry})
    with pytest.raises(ValueError, match=message):
        load_memory_lora(pipeline(expert(1), None), tmp_path)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"alpha": math.nan}, {"rope_stride": 0}])
def test_impossible_descriptions_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AdapterInfo(**wrong)


# --- with other adapters ----------------------------------------------------------------------------------


@pytest.fixture
def second(tmp_path: Path) -> Iterator[Path]:
    return write_pair(tmp_path / "second", released_state(5, rank=2), released_state(6, rank=2))


def test_two_memory_adapters_add_up_with_weights_of_their_own(
    pipe: WanImageToVideoPipeline, released: Path, second: Path
) -> None:
    load_memory_lora(pipe, released, alpha=4, weight=0.5)
    load_memory_lora(pipe, second, alpha=2, use_rslora=False, adapter_name="style", weight=0.25)
    expected = merged(merged(plain(), released, 0.5 * 4 / 2), second, 0.25 * 2 / 2)
    assert close(outputs(pipe), outputs(expected))
    pipe.set_adapters(["memory", "style"], [0.0, 1.0])
    assert close(outputs(pipe), outputs(merged(plain(), second, 1.0)))
    pipe.delete_adapters("style")
    pipe.set_adapters("memory", 1.0)
    assert close(outputs(pipe), outputs(merged(plain(), released, 2.0)))


@pytest.mark.parametrize("memory_first", [True, False])
def test_stacks_with_an_adapter_that_diffusers_loaded(
    pipe: WanImageToVideoPipeline, released: Path, tmp_path: Path, memory_first: bool
) -> None:
    """A step-distilled adapter: ComfyUI's layout, diffusers' own loader, other modules than ours."""
    few_steps = {
        k.replace("base_model.model", "diffusion_model"): v
        for k, v in released_state(7, rank=2).items()
        if ".ffn." not in k
    }
    save_file(few_steps, tmp_path / "lightning.safetensors")
    if memory_first:
        load_memory_lora(pipe, released, alpha=4)
    pipe.load_lora_weights(tmp_path / "lightning.safetensors", adapter_name="lightning")
    pipe.load_lora_weights(tmp_path / "lightning.safetensors", adapter_name="lightning", load_into_transformer_2=True)
    if not memory_first:
        load_memory_lora(pipe, released, alpha=4)
        assert set(pipe.get_active_adapters()) == {"lightning", "memory"}
    pipe.set_adapters(["memory", "lightning"], [1.0, 0.5])
    expected = merged(plain(), released, 4 / 2)
    zeros = {f"{k}": torch.zeros_like(v) for k, v in released_state(7, rank=2).items() if ".ffn." in k}
    rest = {k.replace("diffusion_model", "base_model.model"): v for k, v in few_steps.items()} | zeros
    expected = merged(expected, write_pair(tmp_path / "rest", rest, rest), 0.5)
    assert close(outputs(pipe), outputs(expected))


def test_fuse_unfuse_and_unload(pipe: WanImageToVideoPipeline, released: Path, second: Path) -> None:
    load_memory_lora(pipe, released, alpha=4)
    loaded = outputs(pipe)
    pipe.fuse_lora(components=["transformer", "transformer_2"])
    assert close(outputs(pipe), loaded)
    with pytest.raises(ValueError, match=r"fused adapters; call pipe\.unfuse_lora"):
        load_memory_lora(pipe, second, adapter_name="style")
    pipe.unfuse_lora(components=["transformer", "transformer_2"])
    pipe.unload_lora_weights()
    assert close(outputs(pipe), outputs(plain()))
    load_memory_lora(pipe, released, alpha=4)
    assert close(outputs(pipe), loaded)


@pytest.mark.parametrize("name", ["memory", "wan2.2", ""])
def test_impossible_adapter_names_are_refused(pipe: WanImageToVideoPipeline, released: Path, name: str) -> None:
    load_memory_lora(pipe, released)
    with pytest.raises(ValueError, match="adapter_name"):
        load_memory_lora(pipe, released, adapter_name=name)


# --- training and saving ----------------------------------------------------------------------------------


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


def test_only_memory_adapters_are_saved(pipe: WanImageToVideoPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter called 'memory'; it has: none"):
        save_memory_lora(pipe, tmp_path)
    config = memory_lora_config(rank=4)
    config.target_modules = {"attn1.to_q", "proj_out"}
    pipe.transformer.add_adapter(config, "memory")
    with pytest.raises(ValueError, match=r"missing or unexpected \(38\)"):
        save_memory_lora({"high_noise": pipe.transformer}, tmp_path)
    with pytest.raises(ValueError, match="layout must be one of storymem, released, diffusers, comfyui"):
        write_memory_lora({"high_noise": {}}, tmp_path, info=AdapterInfo(), layout="kohya")
    assert not list(tmp_path.iterdir())
