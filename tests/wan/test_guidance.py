"""Guidance: both passes of a step, and a negative pass that sees no memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from storymem.wan.loading import load_pipeline
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.segments import memory_cached, memory_joint
from storymem.wan.settings import MemoryMode, ModelSettings, RuntimeSettings, SamplerSettings
from tests.wan.tiny import CPU, SLOTS, STEPS, counting, generate, images, settings

SCALE = 3.0
GUIDED: dict[str, Any] = {"negative_prompt": "fog", "guidance_scale": SCALE}
UNSEEN: dict[str, Any] = GUIDED | {"negative_sees_memory": False}


def model(mode: MemoryMode) -> ModelSettings:
    made = settings(memory_attention=mode)
    made.network.transformer["num_layers"] = 2  # caches need a first block and others
    return made


@pytest.fixture(scope="module", params=["joint", "cached"])
def guided(request: pytest.FixtureRequest) -> WanMemoryToVideoPipeline:
    return load_pipeline(model(request.param), runtime=CPU)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# Both passes


def test_without_guidance_there_is_one_forward_a_step(pipe: WanMemoryToVideoPipeline) -> None:
    with counting(pipe.transformer.blocks[0]) as calls:
        generate(pipe, guidance_scale=1.0)
    assert calls == {"WanTransformerBlock": STEPS // 2}


def test_a_callback_may_change_the_negative_prompt(pipe: WanMemoryToVideoPipeline) -> None:
    def change(_pipe: Any, step: int, _t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"negative_prompt_embeds": tensors["negative_prompt_embeds"] * (1 if step else 2)}

    watched = {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["latents", "negative_prompt_embeds"],
    }
    assert not torch.equal(generate(pipe, **GUIDED, **watched), generate(pipe, **GUIDED))


@pytest.mark.parametrize("cache", ["cpu", "recompute"])
def test_cached_memory_serves_both_passes(cache: Any) -> None:
    made = settings(memory_attention="cached")
    given = {**GUIDED, "memory": images(3)}
    elsewhere = RuntimeSettings(device="cpu", memory_cache=cache)
    close(*(generate(load_pipeline(made, runtime=runtime), **given) for runtime in (elsewhere, CPU)))


# A negative pass without memory


def guided_step(pipe: WanMemoryToVideoPipeline, **given: Any) -> tuple[list[dict[str, Any]], Tensor]:
    """The inputs of the forwards of a one-step shot, and the noise prediction that the scheduler gets."""
    inputs: list[dict[str, Any]] = []
    predicted: list[Tensor] = []
    step = pipe.scheduler.step

    def watched(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        predicted.append(model_output)
        return step(model_output, *args, **kwargs)

    hook = pipe.transformer.register_forward_pre_hook(lambda _module, _args, kw: inputs.append(kw), with_kwargs=True)
    pipe.scheduler.step = watched
    try:
        generate(pipe, num_inference_steps=1, **given)
    finally:
        pipe.scheduler.step = step
        hook.remove()
    return inputs, predicted[0]


def test_guidance_leads_from_a_shot_of_nothing_to_prompt_and_memory(guided: WanMemoryToVideoPipeline) -> None:
    (*prefill, cond, uncond), predicted = guided_step(guided, memory=images(3), **UNSEEN)
    joint = guided.config.memory_attention == "joint"
    whole, layout = cond["hidden_states"], memory_joint(3, SLOTS) if joint else memory_cached(3, SLOTS)
    if not joint:
        whole = torch.cat([prefill[0]["hidden_states"], whole], dim=2)
    plain = {"timestep": cond["timestep"], "return_dict": False}
    with torch.no_grad():
        (seeing,) = guided.transformer(
            whole, encoder_hidden_states=cond["encoder_hidden_states"], layout=layout, **plain
        )
        (without,) = guided.transformer(whole[:, :, 3:], encoder_hidden_states=uncond["encoder_hidden_states"], **plain)
    expected = without + SCALE * (seeing[:, :, 3:] - without)
    if joint:
        expected = torch.cat([seeing[:, :, :3], expected], dim=2)
    torch.testing.assert_close(predicted, expected, rtol=1e-5, atol=1e-5)


def test_the_second_pass_is_of_the_shot_alone(guided: WanMemoryToVideoPipeline) -> None:
    inputs, _ = guided_step(guided, memory=images(3), **UNSEEN)
    frames = [given["hidden_states"].shape[2] for given in inputs]
    joint = guided.config.memory_attention == "joint"
    assert frames == ([3 + SLOTS, SLOTS] if joint else [3, SLOTS, SLOTS])


def test_without_memory_there_is_nothing_to_hide(guided: WanMemoryToVideoPipeline) -> None:
    assert torch.equal(generate(guided, **UNSEEN), generate(guided, **GUIDED))


def test_memory_pulls_further(guided: WanMemoryToVideoPipeline) -> None:
    """With one text in both passes, published guidance does nothing and this one still leads to the memory."""
    same = {"negative_prompt": "a fox", "memory": images(3)}
    plain = generate(guided, **same, guidance_scale=1.0)
    torch.testing.assert_close(generate(guided, **same, guidance_scale=SCALE), plain, rtol=1e-4, atol=1e-4)
    pulled = generate(guided, **same, guidance_scale=SCALE, negative_sees_memory=False)
    assert (pulled - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    "runtime",
    [
        {"cache": "first_block", "cache_threshold": 0.0},
        {"cache": "taylor", "cache_threshold": 0.0},
        {"memory_cache": "recompute"},
    ],
    ids=lambda runtime: next(iter(runtime.values())),
)
def test_it_goes_with_caches(guided: WanMemoryToVideoPipeline, runtime: dict[str, Any]) -> None:
    mode = guided.config.memory_attention
    if mode == "joint" and "memory_cache" in runtime:
        return
    fast = load_pipeline(model(mode), runtime=RuntimeSettings(device="cpu", **runtime))
    for frames in (3, 2):
        memory = images(frames, seed=frames)
        shot = generate(fast, memory=memory, **UNSEEN)
        torch.testing.assert_close(shot, generate(guided, memory=memory, **UNSEEN), rtol=1e-4, atol=1e-4)


def test_it_goes_with_streamed_blocks(guided: WanMemoryToVideoPipeline) -> None:
    streamed = load_pipeline(model(guided.config.memory_attention), runtime=CPU)
    for expert in streamed.experts.values():
        expert.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        )
    for frames in (3, 2):
        memory = images(frames, seed=frames)
        shot = generate(streamed, memory=memory, **UNSEEN)
        torch.testing.assert_close(shot, generate(guided, memory=memory, **UNSEEN), rtol=1e-5, atol=1e-5)


def test_without_guidance_it_is_refused(guided: WanMemoryToVideoPipeline) -> None:
    with pytest.raises(ValueError, match="negative_sees_memory=False needs guidance: guidance_scale must be above 1"):
        generate(guided, memory=images(1), **UNSEEN | {"guidance_scale": 1.0})
    with pytest.raises(ValueError, match="negative_sees_memory=false needs guidance above 1"):
        SamplerSettings(guidance=1.0, negative_sees_memory=False)
