"""Experts from GGUF files: written by the format's own library, read by diffusers, adapted and sampled as any other."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from storymem.wan.gguf import check_gguf
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import memory_lora_config
from storymem.wan.memory_estimate import estimate_memory
from storymem.wan.precision import check_precision
from storymem.wan.settings import ModelSettings, RuntimeSettings
from storymem.wan.sources import required_weights
from storymem.weights import MissingWeights
from tests.wan.tiny import CPU, generate, pictures, settings

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
    return generate(pipe, prompt_embeds=text, guidance_scale=1.0, memory=pictures(2))


@needs_gguf
def test_a_shot_from_gguf_files_is_near_the_exact_one(saved: ModelSettings) -> None:
    exact = load_pipeline(wide(), runtime=CPU, text_encoder=False)
    rounded = load_pipeline(saved, runtime=CPU, text_encoder=False)
    assert rounded.transformer.blocks[0].attn1.to_q.weight.dtype == torch.uint8
    assert rounded.transformer.proj_out.weight.dtype == torch.float32
    expected, found = shot(exact), shot(rounded)
    assert 0 < ((found - expected).norm() / expected.norm()).item() < 0.05
    assert not torch.equal(rounded.transformer.proj_out.weight, rounded.transformer_2.proj_out.weight)


@needs_gguf
def test_adapters_lie_on_gguf_weights(saved: ModelSettings) -> None:
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
def test_memory_is_that_of_the_files(saved: ModelSettings) -> None:
    assert saved.gguf is not None
    size = saved.gguf.high_noise.path.stat().st_size
    weights, rounded = (
        next(stage for stage in estimate_memory(model, CPU, memory_frames=0).stages if stage.name == "denoise").weights
        for model in (wide(), saved)
    )
    assert rounded < weights
    assert abs((rounded - 2 * size) - (estimate_memory(saved, CPU, memory_frames=0).stages[4].weights - 2 * size)) < 4


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
    model = wide(weights={"name": "others", "source": "."}, gguf=files, has_text_to_video=False)
    with pytest.raises(ValueError, match=r"model\.gguf have few bits already; use as_is"):
        check_precision(model, RuntimeSettings(precision="fp8_storage"), torch.device("cpu"))


@pytest.mark.skipif(HAS_GGUF, reason="gguf is installed")
def test_the_reader_is_asked_for_with_its_command() -> None:
    with pytest.raises(ValueError, match=r"model.gguf needs the reader.*pip install 'gguf>=0.10'"):
        check_gguf(CPU)
