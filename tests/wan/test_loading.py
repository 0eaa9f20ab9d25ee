"""One door for all networks: random ones, saved ones, with and without an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from storymem.wan.loading import load_pipeline
from storymem.wan.lora import save_memory_lora
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.schedule import WanUniPCScheduler
from storymem.wan.settings import ModelSettings, SamplerSettings
from storymem.weights import MissingWeights
from tests.wan.tiny import CPU, adapt, generate, images, settings, shot_by_text, text_to_video


def local(path: Path) -> dict[str, Any]:
    return {"name": path.name, "source": str(path)}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return module.state_dict()


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def saved(pipe: WanMemoryToVideoPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline of ``tiny_model`` as a diffusers folder."""
    folder = tmp_path_factory.mktemp("saved") / "i2v"
    pipe.save_pretrained(folder)
    return folder


# Networks built from their configuration


def test_parts_can_be_left_out_without_changing_the_others(
    tiny_model: ModelSettings, pipe: WanMemoryToVideoPipeline
) -> None:
    texts = load_pipeline(tiny_model, runtime=CPU, experts=False)
    experts = load_pipeline(tiny_model, runtime=CPU, text_encoder=False)
    assert texts.experts == {}
    assert experts.text_encoder is None
    assert experts.tokenizer is None
    assert same(texts.text_encoder, pipe.text_encoder)
    low = load_pipeline(tiny_model, runtime=CPU, text_encoder=False, experts=["low_noise"])
    assert list(low.experts) == ["transformer_2"], "for training one of them, the other is not read"
    assert same(low.transformer_2, pipe.transformer_2)
    assert same(experts.transformer, pipe.transformer)
    assert same(experts.transformer_2, pipe.transformer_2)
    assert same(texts.vae, pipe.vae)
    assert same(experts.vae, pipe.vae)
    assert not same(pipe.transformer, pipe.transformer_2), "the experts have seeds of their own"

    with torch.no_grad():
        embeds, negative = texts.encode_prompt("a fox", max_sequence_length=16)
    shot = generate(experts, prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert torch.equal(shot, generate(pipe))


def test_random_weights_are_those_of_the_seed_and_leave_torchs_own_alone(
    pipe: WanMemoryToVideoPipeline, tiny_model: ModelSettings
) -> None:
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    again, other = (load_pipeline(model, runtime=CPU) for model in (tiny_model, settings(seed=1)))
    assert torch.equal(torch.rand(3), expected)
    for name in ("transformer", "transformer_2", "vae", "text_encoder"):
        assert same(getattr(again, name), getattr(pipe, name))
        assert not same(getattr(other, name), getattr(pipe, name))


def test_settings_reach_the_pipeline() -> None:
    pipe = load_pipeline(
        settings(rope_stride=2, boundary=0.5), runtime=CPU, sampler=SamplerSettings(shift=7.0), text_encoder=False
    )
    assert pipe.config.rope_stride == 2
    assert pipe.config.boundary_ratio == 0.5
    assert pipe.scheduler.config.flow_shift == 7.0
    assert not pipe.transformer.training


def test_what_diffusers_keeps_in_float32_stays_in_float32(tmp_path: Path, pipe: WanMemoryToVideoPipeline) -> None:
    half = load_pipeline(settings(dtype="bfloat16"), runtime=CPU)
    half.save_pretrained(tmp_path)
    loaded = WanMemoryToVideoPipeline.from_pretrained(
        tmp_path, torch_dtype={"default": torch.bfloat16, "vae": torch.float32}
    )
    for name in ("transformer", "transformer_2", "vae"):
        ours = {key: value.dtype for key, value in weights(getattr(half, name)).items()}
        theirs = {key: value.dtype for key, value in weights(getattr(loaded, name)).items()}
        assert ours == theirs
    kinds = {value.dtype for value in weights(half.transformer).values()}
    assert kinds == {torch.bfloat16, torch.float32}
    assert half.transformer.rope.freqs_cos.dtype == torch.float32

    memory = images(2)
    full, shot = generate(pipe, memory=memory), generate(half, memory=memory)
    assert 0 < (shot.float() - full).norm() / full.norm() < 0.2


# Weights from a folder


def test_a_saved_folder_gives_the_same_shots(pipe: WanMemoryToVideoPipeline, saved: Path) -> None:
    model = settings(weights=local(saved), has_text_to_video=False, rope_stride=3)
    loaded = load_pipeline(model, runtime=CPU)
    assert type(loaded.scheduler) is WanUniPCScheduler
    assert loaded.config.rope_stride == 3, "settings override those of the folder"
    memory = images(2)
    expected = generate(pipe, memory=memory, rope_stride=3)
    torch.testing.assert_close(generate(loaded, memory=memory), expected, rtol=1e-4, atol=1e-4)


def test_parts_of_a_saved_folder_can_be_left_out(pipe: WanMemoryToVideoPipeline, saved: Path) -> None:
    model = settings(weights=local(saved), has_text_to_video=False)
    texts = load_pipeline(model, runtime=CPU, experts=False)
    experts = load_pipeline(model, runtime=CPU, text_encoder=False)
    assert texts.experts == {}
    assert experts.text_encoder is None
    assert same(texts.text_encoder, pipe.text_encoder)
    assert same(experts.transformer_2, pipe.transformer_2)
    high = load_pipeline(model, runtime=CPU, text_encoder=False, experts=["high_noise"])
    assert list(high.experts) == ["transformer"]
    assert same(high.transformer, pipe.transformer)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_text_encoder_is_as_transformers_loads_it(saved: Path, dtype: str) -> None:
    model = settings(weights=local(saved), has_text_to_video=False, dtype=dtype)
    found = load_pipeline(model, runtime=CPU, experts=False).text_encoder
    expected = UMT5EncoderModel.from_pretrained(saved / "text_encoder", dtype=getattr(torch, dtype))
    assert same(found, expected)
    assert {name: it.dtype for name, it in weights(found).items()} == {
        name: it.dtype for name, it in weights(expected).items()
    }
    assert found.shared.weight is found.encoder.embed_tokens.weight, "the largest matrix, once"


def test_a_text_to_video_folder_gives_the_same_shots(pipe: WanMemoryToVideoPipeline, saved: Path) -> None:
    expected = shot_by_text(settings(), pipe.vae)
    folder = saved.parent / "t2v"
    random = text_to_video(settings(), pipe.vae)
    assert random.config.boundary_ratio == 0.875
    assert random.transformer.config.in_channels == 16
    random.save_pretrained(folder)

    model = settings(weights=local(saved), text_to_video=local(folder) | {"file": "transformer*/*"})
    torch.testing.assert_close(shot_by_text(model, pipe.vae), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        shot_by_text(model, pipe.vae, sampler=SamplerSettings(text_to_video_shift=2.0)), expected, atol=1e-2
    )


def test_text_to_video_needs_no_adapter(pipe: WanMemoryToVideoPipeline) -> None:
    absent = {"weights": {"name": "adapter", "source": "/nowhere"}}
    assert shot_by_text(settings(adapter=absent), pipe.vae).isfinite().all()


# The adapter


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A memory adapter for the tiny networks, in the sub-folders of the release."""
    pipe = adapt(load_pipeline(settings(), runtime=CPU, text_encoder=False))
    save_memory_lora(pipe, tmp_path / "adapter" / "mi2v")
    for expert in pipe.experts.values():
        for name, weight in expert.named_parameters():
            if "lora_B" in name:
                weight.data.neg_()
    save_memory_lora(pipe, tmp_path / "adapter" / "mm2v")
    return tmp_path / "adapter"


def with_adapter(folder: Path, **changes: Any) -> ModelSettings:
    folders = {"none": "mi2v", "mi2v": "mi2v", "mm2v": "mm2v"}
    return settings(adapter={"weights": local(folder), "folders": folders} | changes)


def test_the_adapter_of_the_continuity_is_loaded(pipe: WanMemoryToVideoPipeline, adapter: Path) -> None:
    model, memory = with_adapter(adapter), images(2)
    none, mi2v, mm2v = (
        generate(load_pipeline(model, runtime=CPU, continuity=continuity), memory=memory)
        for continuity in ("none", "mi2v", "mm2v")
    )
    bare = generate(pipe, memory=memory)
    assert torch.equal(none, mi2v)
    assert (mi2v - bare).norm() / bare.norm() > 1e-3
    assert (mi2v - mm2v).norm() / bare.norm() > 1e-3


def test_the_adapters_weight_is_its_strength(pipe: WanMemoryToVideoPipeline, adapter: Path) -> None:
    memory = images(2)
    bare = generate(pipe, memory=memory)

    def change(weight: float) -> float:
        shot = generate(load_pipeline(with_adapter(adapter, weight=weight), runtime=CPU), memory=memory)
        return float((shot - bare).norm() / bare.norm())

    assert change(0.0) < 1e-6
    assert 0 < change(0.5) < change(1.0)


def test_an_adapter_in_the_folder_itself(adapter: Path) -> None:
    direct = settings(adapter={"weights": local(adapter / "mm2v")})
    by_folder = load_pipeline(with_adapter(adapter), runtime=CPU, continuity="mm2v")
    assert torch.equal(generate(load_pipeline(direct, runtime=CPU)), generate(by_folder))


def test_a_missing_adapter_is_reported_with_its_folder(adapter: Path) -> None:
    with pytest.raises(MissingWeights, match="adapter/gone"):
        load_pipeline(with_adapter(adapter, folders={"none": "gone"}), runtime=CPU)
