"""Memory adapters that do not fit: of true size by their headers, damaged, incomplete, contradictory, unclear."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

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
from tests.wan.adapters import (
    A14B,
    LAYOUTS,
    ORIGINAL,
    OTHERS,
    diffusers_state,
    expert,
    outputs,
    pipeline,
    plain,
    released_state,
    write_pair,
)


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


def test_all_key_mistakes_are_listed_at_once(stock: WanImageToVideoPipeline, tmp_path: Path) -> None:
    state = released_state(4)
    del state["base_model.model.blocks.1.self_attn.q.lora_B.weight"]
    state["base_model.model.blocks.0.cross_attn.k_img.lora_A.weight"] = torch.zeros(4, 24)
    state["base_model.model.blocks.2.ffn.0.lora_A.weight"] = torch.zeros(4, 24)
    state["base_model.model.blocks.0.ffn.0.lora_A.weight"] = torch.zeros(4, 25)
    state["base_model.model.blocks.1.ffn.2.lora_B.weight"] = torch.zeros(24, 3)
    state["base_model.model.blocks.0.ffn.2.lora_B.default.weight"] = torch.zeros(24, 4)
    folder = write_pair(tmp_path, released_state(3), state)
    with pytest.raises(ValueError, match=r"backbone_low_noise\.safetensors does not fit") as error:
        load_memory_lora(stock, folder)
    message = str(error.value)
    assert "missing (1):\n    blocks.1.self_attn.q.lora_B" in message
    assert "unexpected (2)" in message
    assert "cross_attn.k_img.lora_A.weight" in message
    assert "blocks.2.ffn.0.lora_A.weight" in message
    assert "given twice (1)" in message
    assert "misshapen (2)" in message
    assert "blocks.0.ffn.0.lora_A.weight is [4, 25], not [4, 24]" in message
    assert "blocks.1.ffn.2.lora_B.weight is [24, 3], not [24, 4]" in message
    assert not getattr(stock.transformer, "peft_config", {}), "the good expert must not have been touched either"


def test_pth_is_read_as_tensors(stock: WanImageToVideoPipeline, released: Path, tmp_path: Path) -> None:
    torch.save(released_state(3), tmp_path / "backbone_high_noise.pth")
    torch.save(released_state(4), tmp_path / "backbone_low_noise.pth", _use_new_zipfile_serialization=False)
    load_memory_lora(stock, tmp_path)
    other = plain()
    load_memory_lora(other, released)
    assert torch.equal(outputs(stock), outputs(other))


class Payload:
    """A pickle that would write a file when opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.target, "code ran"))


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_pickle_with_code_is_refused_and_does_not_run(stock: WanImageToVideoPipeline, tmp_path: Path, save) -> None:
    save({"a": Payload(tmp_path / "trace")}, tmp_path / "backbone_high_noise.pth")
    torch.save(released_state(4), tmp_path / "backbone_low_noise.pth")
    with pytest.raises(ValueError, match=r"backbone_high_noise\.pth is not a readable file of tensors"):
        load_memory_lora(stock, tmp_path)
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
    stock: WanImageToVideoPipeline, released: Path, tmp_path: Path, layout: str
) -> None:
    load_memory_lora(stock, released, alpha=5)
    save_memory_lora(stock, tmp_path / "out", layout=layout)
    with pytest.raises(ValueError, match=r"states alpha=.*contradicts alpha=7"):
        load_memory_lora(plain(), tmp_path / "out", alpha=7)


def test_missing_weights_name_what_is_missing_and_what_is_there(
    stock: WanImageToVideoPipeline, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MissingWeights, match=r"(?s)4\.9 GB.*hf download Kevin-thu/StoryMem .*Wan2\.2-MI2V-A14B"):
        load_memory_lora(stock, "Kevin-thu/StoryMem", subfolder="Wan2.2-MI2V-A14B")
    (released / "backbone_low_noise.safetensors").unlink()
    with pytest.raises(MissingWeights, match=r"backbone_high_noise\.safetensors, so nothing for the low_noise"):
        load_memory_lora(stock, released)
    with pytest.raises(MissingWeights, match=r"chosen as subfolder=: adapter"):
        load_memory_lora(stock, released.parent)
    load_memory_lora(pipeline(expert(1), None), released.parent, subfolder="adapter")


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
    for name, folder, info in zip(("high_noise", "low_noise"), folders, infos, strict=True):
        (path,) = write_memory_lora({name: diffusers_state(3)}, tmp_path / folder, info=info)
        if folder:
            path.rename(path.with_name("adapter.safetensors"))
    with pytest.raises(ValueError, match=r"memory_attention.*'joint'.*'cached'"):
        load_memory_lora(plain(), tmp_path)


def test_files_carry_their_description_and_other_readers_see_it(tmp_path: Path) -> None:
    info = AdapterInfo(rank=4, alpha=5, memory_attention="cached", training={"learning_rate": 1e-5})
    (path,) = write_memory_lora({"high_noise": diffusers_state(3)}, tmp_path, info=info)
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
