"""How networks run: devices, precision, attention kernels, compiled blocks, step caches, placement."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest
import torch
from diffusers.hooks import PyramidAttentionBroadcastConfig
from torch import nn

from storymem.config import build_settings
from storymem.wan import runtime as runtimes
from storymem.wan.eight_bits import ScaledLinear, in_8_bits
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import memory_lora_config
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.runtime import (
    check_machine,
    check_runtime,
    choose_attention,
    compiled_graphs,
    place,
    resolve_device,
)
from storymem.wan.settings import ModelSettings, RuntimeSettings, SamplerSettings
from tests.wan.tiny import CPU, adapt, counting, generate, images, settings

HAS_ACCELERATOR = torch.accelerator.is_available()
STEPS = 6  # two of the high-noise expert, four of the other
SAMPLER = SamplerSettings(steps=STEPS)
GUIDED: dict[str, Any] = {"num_inference_steps": STEPS, "negative_prompt": "fog", "guidance_scale": 3.0}
STORED = RuntimeSettings(device="cpu", precision="fp8_storage")
COMPILED = RuntimeSettings(device="cpu", compile="blocks")


def deep(**changes: Any) -> ModelSettings:
    """The tiny model with four blocks: caches treat the first, the last and those between differently."""
    network = asdict(settings().network)
    network["transformer"]["num_layers"] = 4
    return settings(network=network, **changes)


@pytest.fixture(scope="module")
def plain() -> WanMemoryToVideoPipeline:
    return load_pipeline(deep(), runtime=CPU)


def caching(cache: str, threshold: float) -> WanMemoryToVideoPipeline:
    values = {"device": "cpu", "cache": cache, "cache_threshold": threshold}
    return load_pipeline(deep(), sampler=SAMPLER, runtime=build_settings(RuntimeSettings, values))


@contextmanager
def computed(pipe: WanMemoryToVideoPipeline) -> Iterator[list[str]]:
    """The expert of each forward inside the block that was computed beyond its first block."""
    found: list[str] = []
    handles = [
        expert.blocks[1].attn1.register_forward_hook(lambda *_, name=name: found.append(name))
        for name, expert in pipe.experts.items()
    ]
    yield found
    for handle in handles:
        handle.remove()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# Devices


def test_auto_is_the_accelerator_or_the_cpu() -> None:
    expected = torch.accelerator.current_accelerator().type if HAS_ACCELERATOR else "cpu"
    assert resolve_device("auto").type == expected
    assert resolve_device("cpu") == resolve_device("cpu:0") == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:99", "xpu", "gpu", "", "meta", "hpu"])
def test_an_absent_device_is_refused_in_one_line(device: str) -> None:
    with pytest.raises(ValueError, match=f"runtime.device={device} cannot be used here.*try auto or cpu") as error:
        check_runtime(RuntimeSettings(device=device))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ({"offload": "group"}, r"runtime.offload=group.*use runtime.offload=none"),
        ({"attention": "flash2"}, r"runtime.attention=flash2 cannot be used here: it runs on CUDA devices"),
    ],
)
def test_a_machine_that_cannot_run_it_is_reported_before_loading(runtime: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pipeline(settings(dtype="bfloat16"), runtime=RuntimeSettings(device="cpu", **runtime))


def test_threads_and_tiling_are_set() -> None:
    before = torch.get_num_threads()
    try:
        pipe = load_pipeline(settings(), runtime=RuntimeSettings(device="cpu", threads=2, vae_tiling=True))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert pipe.vae.use_tiling
    assert generate(pipe, output_type="np").shape == (1, 9, 32, 48, 3)


# Precision


def linears(expert: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in expert.named_modules() if isinstance(module, nn.Linear)}


def test_only_the_linears_of_blocks_are_stored_in_8_bits() -> None:
    pipe = load_pipeline(settings(), runtime=STORED)
    for expert in pipe.experts.values():
        small = {name for name, weight in expert.named_parameters() if weight.dtype == torch.int8}
        assert {name.rsplit(".", 1)[0] for name in small} == {n for n in linears(expert) if n.startswith("blocks.")}
        assert {weight.dtype for name, weight in expert.named_parameters() if name not in small} == {torch.float32}
    expected = generate(load_pipeline(settings(), runtime=CPU), memory=images(2))
    assert 0 < relative(generate(pipe, memory=images(2)), expected) < 0.1


def test_sums_of_8_bit_weights_do_not_overflow_float16() -> None:
    linear = nn.Linear(4096, 2)
    nn.init.constant_(linear.weight, 0.02)
    stored = ScaledLinear(*in_8_bits(linear.weight), linear.bias)
    inputs = torch.ones(1, 4096)
    torch.testing.assert_close(stored(inputs.half()).float(), linear(inputs), rtol=0.01, atol=0.1)


def adapted(runtime: RuntimeSettings) -> Any:
    """An expert with an adapter that has an effect, in ``runtime.precision``."""
    model = settings()
    pipe = load_pipeline(model, runtime=CPU, text_encoder=False)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(memory_lora_config(rank=4), adapter_name="memory")
    for name, weight in pipe.transformer.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape).mul(0.1)
    runtimes.accelerate(pipe, model, runtime)
    return pipe.transformer.eval()


def forward(expert: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 36, 3, 4, 6, generator=generator), torch.randn(1, 16, 32, generator=generator)
    with torch.no_grad():
        return expert(latents, torch.tensor([500.0]), text).sample


def test_adapters_keep_their_precision() -> None:
    whole, stored = adapted(CPU), adapted(STORED)
    weights = dict(whole.named_parameters())
    for name, weight in stored.named_parameters():
        if "lora_" in name:
            assert torch.equal(weight, weights[name]), name
        elif name.endswith("base_layer.weight"):
            assert weight.dtype == torch.int8, name
    assert 0 < relative(forward(stored), forward(whole)) < 0.1
    stored.set_adapters(["memory"], [0.0])
    assert relative(forward(stored), forward(whole)) > 0.1, "the adapter has an effect on 8-bit weights"


# Attention


@pytest.mark.parametrize("name", ["flash3", "flash2", "cudnn", "sage"])
def test_a_kernel_that_does_not_run_here_is_refused(name: str) -> None:
    runtime = build_settings(RuntimeSettings, {"device": "cpu", "attention": name})
    absent = settings(weights={"name": "i2v", "source": "/nowhere"}, has_text_to_video=False)
    message = (
        f"runtime.attention={name} cannot be used here: it runs on CUDA devices, and the device is cpu. Use one of: "
    )
    with pytest.raises(ValueError, match=re.escape(message + "auto, native")):
        check_machine(absent, runtime)


def test_auto_on_the_cpu_is_torchs_own_kernel() -> None:
    name, reason = choose_attention(settings(dtype="bfloat16"), RuntimeSettings(), torch.device("cpu"))
    assert (name, "cpu" in reason) == ("native", True)


def test_a_named_kernel_is_set_on_the_experts_alone(plain: WanMemoryToVideoPipeline) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry.get_active_backend()
    named = load_pipeline(deep(), runtime=RuntimeSettings(device="cpu", attention="native"))
    assert {block.attn1.processor._attention_backend.value for block in named.transformer_2.blocks} == {"native"}
    assert _AttentionBackendRegistry.get_active_backend() == before
    assert torch.equal(generate(named), generate(plain))


def test_a_named_kernel_is_set_quietly(caplog: pytest.LogCaptureFixture) -> None:
    diffusers = logging.getLogger("diffusers")
    diffusers.addHandler(caplog.handler)
    try:
        load_pipeline(deep(), runtime=RuntimeSettings(device="cpu", attention="native"))
    finally:
        diffusers.removeHandler(caplog.handler)
    assert "experimental" not in caplog.text


# Step caches


@pytest.mark.parametrize("cache", ["first_block", "taylor"])
def test_a_cache_at_threshold_zero_changes_nothing(plain: WanMemoryToVideoPipeline, cache: str) -> None:
    pipe = caching(cache, 0)
    with computed(pipe) as forwards:
        shot = generate(pipe, memory=images(2), **GUIDED)
    assert len(forwards) == 2 * STEPS
    torch.testing.assert_close(shot, generate(plain, memory=images(2), **GUIDED), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("cache", "threshold"), [("first_block", 9), ("taylor", 2)])
def test_nothing_of_a_shot_reaches_the_next(plain: WanMemoryToVideoPipeline, cache: str, threshold: float) -> None:
    first = {"prompt": "an owl", "memory": images(3), **GUIDED}
    second = {"memory": images(1), **GUIDED}
    pipe = caching(cache, threshold)
    with computed(pipe) as forwards:
        alone = generate(pipe, **second)
    assert len(forwards) < 2 * STEPS, "something is skipped"
    assert not torch.equal(alone, generate(plain, **second))
    generate(pipe, **first)
    assert torch.equal(generate(pipe, **second), alone)

    def stop(_pipe: Any, step: int, _t: Any, _tensors: Any) -> dict:
        if step == 4:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, callback_on_step_end=stop, **first)
    assert torch.equal(generate(pipe, **second), alone)


@pytest.mark.parametrize(("cache", "threshold"), [("first_block", 9), ("taylor", 2)])
def test_each_pass_of_guidance_has_its_own_cache(cache: str, threshold: float) -> None:
    pipe = caching(cache, threshold)
    with computed(pipe) as one_pass:
        single = generate(pipe, num_inference_steps=STEPS, guidance_scale=1.0)
    with computed(pipe) as two_passes:
        double = generate(pipe, num_inference_steps=STEPS, guidance_scale=3.0, negative_prompt="a fox")
    # With the same text in both passes guidance changes nothing, unless one pass is answered from the other's cache.
    assert len(two_passes) == 2 * len(one_pass)
    torch.testing.assert_close(double, single, rtol=1e-5, atol=1e-5)


def broadcasting(mode: str) -> WanMemoryToVideoPipeline:
    """With PyramidAttentionBroadcast, which keeps one state for both passes, in every other forward of every block."""
    pipe = load_pipeline(settings(memory_attention=mode), runtime=CPU)
    for expert in pipe.experts.values():
        expert.enable_cache(
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(-1, 1001),
                spatial_attention_block_identifiers=("blocks",),
                current_timestep_callback=lambda: pipe.current_timestep,
            )
        )
    return pipe


@pytest.mark.parametrize("mode", ["joint", "cached"])
def test_a_cache_for_both_passes_is_refused_if_they_differ(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe, memory = broadcasting(mode), images(2)
    with (
        counting(pipe.transformer, pipe.vae.encoder) as calls,
        pytest.raises(ValueError, match="negative_sees_memory=False"),
    ):
        generate(pipe, memory=memory, negative_sees_memory=False, **GUIDED)
    assert not any(calls.values()), "refused before anything is computed"
    generate(pipe, memory=memory, **GUIDED)
    assert "PyramidAttentionBroadcast of diffusers keeps one state for both passes" in caplog.text
    caplog.clear()
    generate(pipe, memory=memory, guidance_scale=1.0)
    assert not caplog.text
    for expert in pipe.experts.values():
        expert.disable_cache()  # as advised
    shot = generate(pipe, memory=memory, negative_sees_memory=False, **GUIDED)
    unaltered = load_pipeline(settings(memory_attention=mode), runtime=CPU)
    assert torch.equal(shot, generate(unaltered, memory=memory, negative_sees_memory=False, **GUIDED))


# Compiled blocks


@pytest.fixture
def _eager_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are traced and counted, but run as they are: compiling them takes half a minute each on a CPU."""
    torch._dynamo.reset()
    monkeypatch.setattr(runtimes, "_COMPILER", "eager")
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_eager_backend")
@pytest.mark.parametrize("mode", ["joint", "cached"])
def test_a_block_is_compiled_once_for_each_size_of_memory(mode: str) -> None:
    plain, pipe = (load_pipeline(deep(memory_attention=mode), runtime=runtime) for runtime in (CPU, COMPILED))
    for each in (plain, pipe) if mode == "joint" else ():
        torch.manual_seed(0)
        adapt(each, "memory", "steps")
    before, counts = compiled_graphs(), []
    for memory in (0, 2, 0):
        shot = generate(pipe, memory=images(memory), num_inference_steps=2, guidance_scale=1.0)
        counts.append(compiled_graphs() - before)
        expected = generate(plain, memory=images(memory), num_inference_steps=2, guidance_scale=1.0)
        torch.testing.assert_close(shot, expected, rtol=1e-4, atol=1e-4)
    assert counts == [1, 2, 2], "for all blocks of both experts"


@pytest.mark.usefixtures("_eager_backend")
def test_step_caches_stay_outside_the_compiled_blocks() -> None:
    runtime = RuntimeSettings(device="cpu", compile="blocks", cache="first_block", cache_threshold=9)
    pipe, before = load_pipeline(deep(), runtime=runtime), compiled_graphs()
    shot = generate(pipe, memory=images(2), **GUIDED)
    assert compiled_graphs() - before == 1
    expected = generate(caching("first_block", 9), memory=images(2), **GUIDED)
    torch.testing.assert_close(shot, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_make_the_same_shot(plain: WanMemoryToVideoPipeline) -> None:
    torch._dynamo.reset()
    shot = generate(load_pipeline(deep(), runtime=COMPILED), memory=images(2))
    torch.testing.assert_close(shot, generate(plain, memory=images(2)), rtol=1e-4, atol=1e-4)


def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"runtime\.compile=blocks needs a C\+\+ compiler"):
        check_machine(deep(), COMPILED)


def test_the_choices_are_described() -> None:
    described = check_machine(deep(), RuntimeSettings(device="cpu", cache="taylor"))
    assert described == "attention native (torch's own, because the device is cpu), cache taylor at 2"


# Placement


def test_streamed_blocks_make_the_same_shot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Group offloading, with the CPU for both places; the text encoder is on no device as a whole."""
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    expected = generate(load_pipeline(settings(), runtime=CPU), memory=images(2))
    pipe = load_pipeline(settings(), runtime=CPU)
    monkeypatch.setattr(pipe.text_encoder, "to", None)
    place(pipe, RuntimeSettings(device="cpu", offload="group"), device=torch.device("cpu"))
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    streamed = {name for name, part in modules.items() if _is_group_offload_enabled(part)}
    assert streamed == {"transformer", "transformer_2", "text_encoder"}
    assert torch.equal(generate(pipe, memory=images(2)), expected)
