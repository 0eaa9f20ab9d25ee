"""Attention kernels, compiled blocks and caches across steps: chosen, refused, and without a trace in the next shot."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest
import torch
from diffusers.hooks import PyramidAttentionBroadcastConfig

from storymem.config import build_settings
from storymem.wan import acceleration
from storymem.wan.acceleration import (
    check_acceleration,
    choose_attention,
    compiled_graphs,
)
from storymem.wan.loading import load_pipeline
from storymem.wan.lora import memory_lora_config
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.settings import ModelSettings, RuntimeSettings, SamplerSettings, StepAdapterSettings, check_speed
from storymem.weights import Weights
from tests.wan.tiny import CPU, counting, generate, pictures, settings

STEPS = 6  # two of the high-noise expert, four of the other
SAMPLER = SamplerSettings(steps=STEPS)
GUIDED: dict[str, Any] = {"num_inference_steps": STEPS, "negative_prompt": "fog", "guidance_scale": 3.0}


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


# Attention


def test_auto_on_the_cpu_is_torchs_own() -> None:
    chosen = choose_attention("auto", torch.device("cpu"), dtype=torch.bfloat16, head_dim=128)
    assert chosen.name == "native"
    assert "cpu" in chosen.reason


@pytest.mark.parametrize("name", ["flash3", "flash2", "cudnn", "sage"])
def test_a_kernel_that_does_not_run_here_is_refused_before_loading(name: str) -> None:
    runtime = build_settings(RuntimeSettings, {"device": "cpu", "attention": name})
    absent = settings(weights={"name": "i2v", "source": "/nowhere"}, has_text_to_video=False)
    message = (
        f"runtime.attention={name} cannot be used here: it runs on CUDA devices, and the device is cpu. Use one of: "
    )
    with pytest.raises(ValueError, match=re.escape(message + "auto, native")):
        check_acceleration(absent, SAMPLER, runtime)


def test_native_is_put_on_the_experts_and_on_nothing_else(plain: WanMemoryToVideoPipeline) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry.get_active_backend()
    named = load_pipeline(deep(), runtime=RuntimeSettings(device="cpu", attention="native"))
    assert {block.attn1.processor._attention_backend.value for block in named.transformer_2.blocks} == {"native"}
    assert _AttentionBackendRegistry.get_active_backend() == before
    assert torch.equal(generate(named), generate(plain))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["auto", "native", "cudnn"])
def test_kernels_of_torch_make_the_same_shot_on_cuda(name: str) -> None:
    model = deep(dtype="bfloat16")
    shots = [
        generate(load_pipeline(model, runtime=RuntimeSettings(device="cuda", attention=kind)), memory=pictures(2))
        for kind in ("native", name)
    ]
    assert (shots[0] - shots[1]).norm() < 0.05 * shots[0].norm()


# Caches across steps

CACHES = ["first_block", "taylor"]


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_at_threshold_zero_changes_nothing(plain: WanMemoryToVideoPipeline, cache: str) -> None:
    pipe = caching(cache, 0)
    with computed(pipe) as forwards:
        shot = generate(pipe, memory=pictures(2), **GUIDED)
    assert len(forwards) == 2 * STEPS
    torch.testing.assert_close(shot, generate(plain, memory=pictures(2), **GUIDED), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("cache", "threshold"), [("first_block", 9), ("taylor", 2)])
def test_a_shot_leaves_nothing_for_the_next(plain: WanMemoryToVideoPipeline, cache: str, threshold: float) -> None:
    first = {"prompt": "an owl", "memory": pictures(3), **GUIDED}
    second = {"memory": pictures(1), **GUIDED}
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
def test_the_passes_of_guidance_have_caches_of_their_own(cache: str, threshold: float) -> None:
    pipe = caching(cache, threshold)
    with computed(pipe) as one_pass:
        single = generate(pipe, num_inference_steps=STEPS, guidance_scale=1.0)
    with computed(pipe) as two_passes:
        double = generate(pipe, num_inference_steps=STEPS, guidance_scale=3.0, negative_prompt="a fox")
    # With the same text in both passes guidance changes nothing, unless one pass is answered from the other's cache.
    assert len(two_passes) == 2 * len(one_pass)
    torch.testing.assert_close(double, single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("cache", "threshold"), [("first_block", 9), ("taylor", 2)])
def test_at_the_switch_the_first_expert_forgets(cache: str, threshold: float) -> None:
    pipe = caching(cache, threshold)
    holding: list[list[str]] = []

    def look(_pipe: Any, _step: int, _t: Any, _tensors: Any) -> dict:
        holding.append([name for name, expert in pipe.experts.items() if holds_state(expert)])
        return {}

    generate(pipe, callback_on_step_end=look, memory=pictures(1), **GUIDED)
    assert holding == [["transformer"]] * 2 + [["transformer_2"]] * 4
    assert not any(holds_state(expert) for expert in pipe.experts.values()), "after the shot nothing is held"


def holds_state(expert: Any) -> bool:
    hooks = [
        hook for m in expert.modules() if hasattr(m, "_diffusers_hook") for hook in m._diffusers_hook.hooks.values()
    ]
    return any(hook.state_manager._state_cache for hook in hooks if hasattr(hook, "state_manager"))


# Caches of diffusers that keep one state for both passes


def broadcasting(mode: str) -> WanMemoryToVideoPipeline:
    """With PyramidAttentionBroadcast in every other forward of every block."""
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
def test_passes_that_see_different_memory_are_refused_with_a_cache_for_both(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, memory = broadcasting(mode), pictures(2)
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
    plain = load_pipeline(settings(memory_attention=mode), runtime=CPU)
    assert torch.equal(shot, generate(plain, memory=memory, negative_sees_memory=False, **GUIDED))


# Compiled blocks


@pytest.fixture
def _dynamo_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are traced and counted, but run as they are: compiling them takes half a minute each on a CPU."""
    torch._dynamo.reset()
    monkeypatch.setattr(acceleration._counted, "backend", "eager")
    yield
    torch._dynamo.reset()


def with_two_adapters(pipe: WanMemoryToVideoPipeline) -> WanMemoryToVideoPipeline:
    for number, expert in enumerate(pipe.experts.values()):
        for name in ("memory", "steps"):
            expert.add_adapter(memory_lora_config(rank=2, alpha=2, dropout=0.0), adapter_name=name)
        expert.set_adapter(["memory", "steps"])
        generator = torch.Generator().manual_seed(number)
        for name, weight in expert.named_parameters():
            if "lora_" in name:
                weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    return pipe


COMPILED = RuntimeSettings(device="cpu", compile="blocks")


@pytest.mark.usefixtures("_dynamo_alone")
@pytest.mark.parametrize("adapters", [False, True])
def test_a_block_is_compiled_once_for_each_size_of_memory(adapters: bool) -> None:
    plain, pipe = load_pipeline(deep(), runtime=CPU), load_pipeline(deep(), runtime=COMPILED)
    if adapters:
        plain, pipe = with_two_adapters(plain), with_two_adapters(pipe)
    before, counts = compiled_graphs(), []
    for memory in (0, 2, 0):
        shot = generate(pipe, memory=pictures(memory), num_inference_steps=2, guidance_scale=1.0)
        counts.append(compiled_graphs() - before)
        expected = generate(plain, memory=pictures(memory), num_inference_steps=2, guidance_scale=1.0)
        torch.testing.assert_close(shot, expected, rtol=1e-4, atol=1e-4)
    assert counts == [1, 2, 2], "for all blocks of both experts"


@pytest.mark.usefixtures("_dynamo_alone")
def test_caches_stay_outside_the_compiled_blocks() -> None:
    runtime = RuntimeSettings(device="cpu", compile="blocks", cache="first_block", cache_threshold=9)
    pipe, before = load_pipeline(deep(), runtime=runtime), compiled_graphs()
    shot = generate(pipe, memory=pictures(2), **GUIDED)
    assert compiled_graphs() - before == 1
    expected = generate(caching("first_block", 9), memory=pictures(2), **GUIDED)
    torch.testing.assert_close(shot, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_make_the_same_shot(plain: WanMemoryToVideoPipeline) -> None:
    torch._dynamo.reset()
    shot = generate(load_pipeline(deep(), runtime=COMPILED), memory=pictures(2))
    torch.testing.assert_close(shot, generate(plain, memory=pictures(2)), rtol=1e-4, atol=1e-4)


def test_without_a_compiler_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"runtime\.compile=blocks needs a C\+\+ compiler"):
        check_acceleration(deep(), SAMPLER, COMPILED)


# What does not go together


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cache_threshold": 0.1}, "needs a cache"),
        ({"cache": "first_block", "cache_threshold": -1}, "0 or more"),
        ({"cache": "taylor", "cache_threshold": 1.5}, "number of steps, not 1.5"),
        ({"cache": "taylor", "guidance_batch": True}, "guidance_batch does not combine with cache: taylor"),
        ({"guidance_parallel": True, "guidance_batch": True}, "use one of them"),
        ({"cache": "first_block", "context_parallel": "ring"}, "would skip different steps"),
        ({"attention": "flsh"}, "attention"),
    ],
    ids=str,
)
def test_runtimes_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_settings(RuntimeSettings, values)


def test_runtimes_that_a_sampler_rules_out() -> None:
    with pytest.raises(ValueError, match=r"sampler\.guidance=1 has only one"):
        check_speed(deep(), SamplerSettings(guidance=1), RuntimeSettings(guidance_batch=True))
    few = SamplerSettings(adapter=StepAdapterSettings(weights=Weights(name="few", source="owner/few")), steps=4)
    with pytest.raises(ValueError, match=r"the 4 steps of a step-distilled sampler do not: use runtime\.cache=none"):
        check_speed(deep(), few, RuntimeSettings(cache="first_block"))


def test_one_block_leaves_the_first_block_cache_nothing_to_skip() -> None:
    with pytest.raises(ValueError, match=r"skips all blocks but the first, and the networks of .* have only one"):
        check_speed(settings(), SAMPLER, RuntimeSettings(cache="first_block"))
    check_speed(deep(), SAMPLER, RuntimeSettings(cache="first_block"))


def test_what_is_fast_is_said() -> None:
    runtime = RuntimeSettings(device="cpu", cache="taylor", compile="blocks")
    assert check_acceleration(deep(), SAMPLER, runtime) == (
        "attention native (torch's own, since the device is cpu), compiled blocks, cache taylor at 2"
    )
