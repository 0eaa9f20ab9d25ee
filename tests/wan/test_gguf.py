"""Experts from GGUF files: written by the format's own library, read by diffusers, adapted and sampled as any other."""

from __future__ import annotations

import importlib.util
import os
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from benchmarks.layouts import original_expert
from storymem.io import NotFiniteError
from storymem.wan.estimate import estimate_shot
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import memory_lora_config
from storymem.wan.runtime import check_machine
from storymem.wan.settings import ModelSettings
from storymem.wan.sources import check_weights, inspect_weights, required_weights
from storymem.weights import MissingWeights
from tests.wan.layouts import scaled_fp8
from tests.wan.tiny import CPU, generate, images, settings

HAS_GGUF = importlib.util.find_spec("gguf") is not None
needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="needs gguf")


def wide(**changes: Any) -> ModelSettings:
    """The tiny model with rows of a multiple of 32 numbers, which the format's blocks need."""
    network = asdict(settings().network)
    network["transformer"] |= {"num_attention_heads": 2, "attention_head_dim": 48, "ffn_dim": 96}
    return settings(network=network, **changes)


def write(path: Path, expert: Any) -> None:
    """The linears of the blocks in 8 bits, all else in float32."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, "wan")
    for name, weight in expert.state_dict().items():
        numbers = weight.float().numpy()
        if name.startswith("blocks.") and numbers.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    """A model whose folder has no transformers: they are GGUF files beside it."""
    folder = tmp_path_factory.mktemp("gguf")
    pipe = load_pipeline(wide(), runtime=CPU)
    for name, expert in zip(("high", "low"), pipe.experts.values(), strict=True):
        write(folder / f"{name}.gguf", expert)
    pipe.transformer = pipe.transformer_2 = None
    pipe.tokenizer = None
    pipe.text_encoder = None
    pipe.save_pretrained(folder / "others")
    files = {f"{name}_noise": {"name": name, "source": str(folder / f"{name}.gguf")} for name in ("high", "low")}
    weights = {"name": "others", "source": str(folder / "others")}
    return wide(weights=weights, gguf=files, has_text_to_video=False)


def shot(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(1, 16, 32, generator=generator)
    return generate(pipe, prompt_embeds=text, guidance_scale=1.0, memory=images(2))


@needs_gguf
def test_a_shot_from_gguf_files_is_near_the_exact_one(saved: ModelSettings) -> None:
    exact = load_pipeline(wide(), runtime=CPU, text_encoder=False)
    rounded = load_pipeline(saved, runtime=CPU, text_encoder=False)
    assert rounded.transformer.blocks[0].attn1.to_q.weight.dtype == torch.uint8
    assert rounded.transformer.proj_out.weight.dtype == torch.float32
    expected, found = shot(exact), shot(rounded)
    assert 0 < ((found - expected).norm() / expected.norm()).item() < 0.05
    assert not torch.equal(rounded.transformer.proj_out.weight, rounded.transformer_2.proj_out.weight)
    in_8_bits = load_pipeline(saved, runtime=replace(CPU, precision="fp8_storage"), text_encoder=False)
    assert torch.equal(shot(in_8_bits), found), "they keep their bits, with the preset of a small card too"


@needs_gguf
def test_adapters_on_gguf_weights(saved: ModelSettings) -> None:
    pipe = load_pipeline(saved, runtime=CPU, text_encoder=False)
    plain = shot(pipe)
    for expert in pipe.experts.values():
        expert.add_adapter(memory_lora_config(rank=4), adapter_name="memory")
        assert {weight.dtype for name, weight in expert.named_parameters() if "lora_" in name} == {torch.float32}
        for name, weight in expert.named_parameters():
            if "lora_B" in name:
                weight.data.fill_(0.05)
    assert not torch.allclose(shot(pipe), plain, atol=1e-3)


@needs_gguf
def test_weights_are_mapped_and_the_file_never_changes(saved: ModelSettings) -> None:
    assert saved.gguf is not None
    path = saved.gguf.high_noise.path
    before = path.read_bytes()
    network = load_pipeline(saved, runtime=CPU, text_encoder=False).transformer
    assert str(path) in Path("/proc/self/maps").read_text(), "no copy in RAM"
    network.blocks[0].attn1.to_q.weight.data.zero_()
    network.blocks[0].norm2.weight.data.zero_()
    assert path.read_bytes() == before


@needs_gguf
def test_the_estimate_is_that_of_the_loaded_weights(saved: ModelSettings) -> None:
    pipe = load_pipeline(saved, runtime=CPU, text_encoder=False)
    networks = [*pipe.experts.values(), pipe.vae]
    loaded = sum(weight.nbytes for network in networks for weight in network.parameters())
    denoise = next(stage for stage in estimate_shot(saved, CPU, memory_frames=0).stages if stage.name == "denoise")
    assert denoise.weights == pytest.approx(loaded, rel=0.02)


def test_files_are_required_and_named_when_missing(tmp_path: Path) -> None:
    files = {f"{name}_noise": {"name": name, "source": f"./{name}.gguf"} for name in ("high", "low")}
    model = wide(weights={"name": "others", "source": str(tmp_path)}, gguf=files, has_text_to_video=False)
    names = [weights.name for weights in required_weights(model, text_to_video=False, continuity="none")]
    assert names == ["others", "high", "low"]
    with pytest.raises(MissingWeights, match=r"high.gguf does not exist"):
        load_pipeline(model, runtime=CPU)


def test_what_does_not_go_together_is_refused() -> None:
    files = {f"{name}_noise": {"name": name, "source": f"./{name}.gguf"} for name in ("high", "low")}
    with pytest.raises(ValueError, match="gguf holds the experts alone: weights must name"):
        wide(gguf=files)


# By header alone; these files are written here, so that no reader of the format is needed.


def gguf_file(path: Path, state: dict[str, torch.Tensor], kind: int = 0, architecture: bytes = b"wan") -> Path:
    """A GGUF file of version 3 with tensors of one type (0: float32)."""
    texts = [(b"general.architecture", architecture), (b"general.name", b"a" * 40)]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(state), len(texts))
    for key, value in texts:
        head += struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    offset = 0
    for name, tensor in state.items():
        head += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", tensor.ndim)
        head += struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape)) + struct.pack("<IQ", kind, offset)
        offset += -(-tensor.numel() * 4 // 32) * 32
    head += bytes(-len(head) % 32)
    with path.open("wb") as file:
        file.write(head)
        for tensor in state.values():
            data = tensor.float().numpy().tobytes()
            file.write(data + bytes(-len(data) % 32))
    return path


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base folder without its transformers."""
    pipe = load_pipeline(wide(), runtime=CPU)
    pipe.transformer = pipe.transformer_2 = None
    folder = tmp_path_factory.mktemp("base") / "others"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(WanTransformer3DModel(**wide().network.transformer, in_channels=36).state_dict())


def check(others: Path, path: Path) -> ModelSettings:
    files = {f"{noise}_noise": {"name": noise, "source": str(path)} for noise in ("high", "low")}
    model = wide(weights={"name": "others", "source": str(others)}, gguf=files, has_text_to_video=False)
    check_weights(model, text_to_video=False)
    return model


def test_a_whole_file_passes(others: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    check(others, gguf_file(tmp_path / "a.gguf", weights))
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in original_expert(weights).items()}
    check(others, gguf_file(tmp_path / "b.gguf", prefixed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("proj_out.bias"), r"a\.gguf does not contain.*missing \(1\).*proj_out\.bias"),
        (lambda s: s.update(stray=torch.ones(1)), r"unexpected \(1\).*stray"),
        (
            lambda s: s.update({"patch_embedding.weight": s["patch_embedding.weight"][:, :16]}),
            r"misshapen \(1\).*patch_embedding\.weight is \[96, 16, 1, 2, 2\], not \[96, 36, 1, 2, 2\]",
        ),
    ],
)
def test_a_file_of_another_network_is_refused(
    others: Path, weights: dict[str, torch.Tensor], tmp_path: Path, change: Callable[[dict], Any], message: str
) -> None:
    state = dict(weights)
    change(state)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        check(others, gguf_file(tmp_path / "a.gguf", state))


def test_another_architecture_is_named(others: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.gguf \(architecture 'flux'\) does not contain the weights of this model"):
        check(others, gguf_file(tmp_path / "a.gguf", {"double_blocks.0.qkv": torch.ones(4, 4)}, architecture=b"flux"))
    with pytest.raises(ValueError, match=r"(\w|\.)+ is of type 39, which diffusers does not read"):
        check(others, gguf_file(tmp_path / "a.gguf", weights, kind=39))
    with pytest.raises(ValueError, match=r"one has rows of 1, which are not blocks of 32"):
        check(others, gguf_file(tmp_path / "a.gguf", {"one": torch.tensor(1.0)}, kind=8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[: len(b) // 2], r"it has [\d,]+ bytes, and its header states [\d,]+"),
        (lambda b: b[:500], r"cut off"),
        (lambda b: b[:10], r"cut off or damaged"),
        (lambda b: b"", r"cut off or damaged"),
        (lambda b: b"GGML" + b[4:], r"does not begin as one"),
        (lambda b: b[:4] + struct.pack("<I", 77) + b[8:], r"version 77"),
        (lambda b: b[:8] + struct.pack("<Q", 1 << 60) + b[16:], r"1,152,921,504,606,846,976 tensors"),
        (lambda b: b[:16] + struct.pack("<Q", 1 << 60) + b[24:], r"1,152,921,504,606,846,976 entries"),
        (lambda b: b[:24] + struct.pack("<Q", 1 << 62) + b[32:], r"[\d,]+ bytes of a text"),
        (lambda b: b[:8] + struct.pack("<QQ", 0, 1) + nested(100_000), r"cut off or damaged"),
        (lambda b: b[:8] + struct.pack("<QQ", 0, 1) + long_list(), r"1,152,921,504,606,846,976 elements of a list"),
        (
            lambda b: moved(b, "proj_out.bias"),
            r"proj_out\.bias begins at byte 0, .* before it ends at [\d,]+",
        ),
    ],
)
def test_damage_is_reported_without_reading_on(
    others: Path, weights: dict[str, torch.Tensor], tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = gguf_file(tmp_path / "a.gguf", weights)
    path.write_bytes(damage(path.read_bytes()))
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"a\.gguf is not a readable GGUF file \(.*{message}"):
        check(others, path)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer.*git lfs pull"),
        (b"<!doctype html>", "a web page, of a broken download"),
    ],
)
def test_other_formats_are_named(others: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.gguf is not a readable GGUF file, but {message}"):
        check(others, tmp_path / "a.gguf")


@pytest.mark.parametrize("name", ["vae", "text_encoder"])
def test_only_experts_are_read_from_gguf(tmp_path: Path, name: str) -> None:
    path = gguf_file(tmp_path / "a.gguf", {"one": torch.ones(4)}, architecture=b"t5encoder")
    weights = {"name": "others", "source": "."}
    model = settings(weights=weights, has_text_to_video=False, **{name: {"name": name, "source": str(path)}})
    (found,) = (it for it in inspect_weights(model, text_to_video=False) if it.weights.name == name)
    message = f"a GGUF file, from which only experts are read: use a file of another format for {name}"
    assert found.problem == f"{path} is {message}"


def nested(depth: int) -> bytes:
    return struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth


def long_list() -> bytes:
    return struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9) + struct.pack("<IQ", 0, 1 << 60)


def moved(content: bytes, name: str) -> bytes:
    """A tensor with the offset of the first one."""
    place = content.index(name.encode()) + len(name) + 4 + 8 + 4  # after the count of dimensions, the one, and the type
    return content[:place] + bytes(8) + content[place + 8 :]


def test_pipes_and_folders_are_refused(others: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.gguf")
    for path in (tmp_path / "a.gguf", tmp_path):
        with pytest.raises(ValueError, match=r"is not a regular file|is a folder"):
            check(others, path)


@pytest.mark.parametrize(("suffix", "per_row"), [("scale_weight", False), ("weight_scale", True)])
def test_scaled_fp8_is_widened_by_its_factors(
    others: Path, weights: dict[str, torch.Tensor], tmp_path: Path, suffix: str, per_row: bool
) -> None:
    """Without its factors the film would be noise."""
    plain, scaled = tmp_path / "plain.safetensors", tmp_path / "fp8_scaled.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in original_expert(weights).items()}, plain)
    save_file(scaled_fp8(original_expert(weights), suffix, per_row=per_row), scaled)
    exact, rounded = (load_pipeline(check(others, path), runtime=CPU, text_encoder=False) for path in (plain, scaled))
    assert all(torch.equal(it, weights[name]) for name, it in exact.transformer.state_dict().items())
    expected, found = shot(exact), shot(rounded)
    assert 0 < ((found - expected).norm() / expected.norm()).item() < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.0.ffn.0.scale_weight"), r"blocks\.0\.ffn\.0\.weight is scaled fp8, .*no factor"),
        (lambda s: s.update({"blocks.0.ffn.0.scale_weight": torch.ones(7)}), r"ffn\.0\.scale_weight is not the factor"),
        (lambda s: s.update({"blocks.9.scale_weight": torch.ones(1)}), r"blocks\.9\.scale_weight is not the factor"),
        (lambda s: s.update({"blocks.0.ffn.0.weight": torch.tensor(1.0)}), r"misshapen.*is \[\], not \[96, 96\]"),
        (lambda s: s.update({"blocks.0.absmax": torch.ones(1)}), r"unexpected \(1\).*blocks\.0\.absmax"),
        (lambda s: s.update({"head.head.bias": torch.ones(64).byte()}), r"head\.head\.bias is U8"),
    ],
)
def test_scaled_fp8_with_a_key_that_is_not_understood_is_refused(
    others: Path, weights: dict[str, torch.Tensor], tmp_path: Path, change: Callable[[dict], Any], message: str
) -> None:
    state = scaled_fp8(original_expert(weights))
    change(state)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"(?s)a\\.safetensors.*{message}"):
        check(others, tmp_path / "a.safetensors")


@needs_gguf
def test_nan_is_named_when_loaded(saved: ModelSettings, tmp_path: Path) -> None:
    """Also in the scales of blocks of 8 bits."""
    expert = load_pipeline(saved, runtime=CPU, text_encoder=False).transformer
    for name in ("blocks.0.ffn.net.0.proj.weight", "proj_out.bias"):
        path = tmp_path / f"{name}.gguf"
        torch.manual_seed(0)
        exact = WanTransformer3DModel(**wide().network.transformer, in_channels=36)
        dict(exact.named_parameters())[name].data.view(-1)[5] = float("nan")
        write(path, exact)
        files = {f"{noise}_noise": {"name": noise, "source": str(path)} for noise in ("high", "low")}
        model = wide(weights=asdict(saved)["weights"], gguf=files, has_text_to_video=False)
        with pytest.raises(NotFiniteError, match=rf"gguf: {name} holds NaN or infinite"):
            load_pipeline(model, runtime=CPU, text_encoder=False)
    assert expert is not None


@pytest.mark.skipif(HAS_GGUF, reason="gguf is installed")
def test_a_missing_reader_is_reported_with_its_command() -> None:
    files = {f"{noise}_noise": {"name": noise, "source": f"{noise}.gguf"} for noise in ("high", "low")}
    with pytest.raises(ValueError, match=r"model.gguf needs the reader.*pip install 'gguf>=0.10'"):
        check_machine(wide(gguf=files, weights={"name": "others", "source": "."}, has_text_to_video=False), CPU)
