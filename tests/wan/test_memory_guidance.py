"""Guidance by the memory: the second pass of a step sees none, whatever else makes forwards fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import Tensor

from storymem.wan.loading import load_pipeline
from storymem.wan.memory_attention import reading_memory
from storymem.wan.memory_guidance import hiding_memory
from storymem.wan.parallel import GUIDANCE_PARALLEL
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.rope import install_memory_rope
from storymem.wan.settings import MemoryMode, ModelSettings, RuntimeSettings, SamplerSettings, check_speed
from tests.wan.tiny import CPU, SLOTS, generate, pictures, settings

MODES: tuple[MemoryMode, ...] = ("joint", "cached")
SCALE = 3.0
HIDDEN: dict[str, Any] = {"negative_prompt": "fog", "guidance_scale": SCALE, "guide_memory": True}


def model(mode: MemoryMode) -> ModelSettings:
    made = settings(memory_attention=mode)
    made.network.transformer["num_layers"] = 2  # caches need a first block and others
    return made


@pytest.fixture(scope="module", params=MODES)
def pipe(request: pytest.FixtureRequest) -> WanMemoryToVideoPipeline:
    return load_pipeline(model(request.param), runtime=CPU)


def guided_step(pipe: WanMemoryToVideoPipeline, **given: Any) -> tuple[list[dict[str, Any]], Tensor]:
    """The inputs of the two forwards of a one-step shot, and the noise prediction that the scheduler gets."""
    inputs: list[dict[str, Any]] = []
    predicted: list[Tensor] = []
    step: Callable[..., Any] = pipe.scheduler.step

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


def test_guidance_leads_from_a_shot_of_nothing_to_prompt_and_memory(pipe: WanMemoryToVideoPipeline) -> None:
    memory = pictures(3)
    (cond, uncond), predicted = guided_step(pipe, memory=memory, **HIDDEN)
    expert, latents = pipe.transformer, pipe.encode_memory(memory).transpose(0, 2)
    rope, slots = install_memory_rope(expert), cond["hidden_states"].shape[2] - SLOTS
    with torch.no_grad():
        (without,) = expert(**uncond | {"hidden_states": uncond["hidden_states"][:, :, slots:]})
        if pipe.config.memory_attention == "cached":
            with reading_memory([expert], latents, stride=5):
                (seeing,) = expert(**cond)
        else:
            rope.memory_frames = 3
            (seeing,) = expert(**cond)
            rope.memory_frames = 0
    video = seeing[:, :, slots:]
    expected = torch.cat([seeing[:, :, :slots], without + SCALE * (video - without)], dim=2)
    torch.testing.assert_close(predicted, expected, rtol=1e-5, atol=1e-5)


def test_the_second_pass_is_of_the_shot_alone(pipe: WanMemoryToVideoPipeline) -> None:
    tokens: list[int] = []
    block = pipe.transformer.blocks[0]
    hook = block.register_forward_pre_hook(lambda _module, args: tokens.append(args[0].shape[1]))
    generate(pipe, memory=pictures(3), num_inference_steps=1, **HIDDEN)
    hook.remove()
    slot = tokens[-1] // SLOTS
    cached = pipe.config.memory_attention == "cached"
    assert tokens == [*([3 * slot] if cached else []), (SLOTS if cached else 3 + SLOTS) * slot, SLOTS * slot]


def test_without_memory_there_is_nothing_to_hide(pipe: WanMemoryToVideoPipeline) -> None:
    assert torch.equal(generate(pipe, **HIDDEN), generate(pipe, **HIDDEN | {"guide_memory": False}))


def test_memory_pulls_further(pipe: WanMemoryToVideoPipeline) -> None:
    """With one text in both passes, published guidance does nothing and this one still leads to the memory."""
    same = {"negative_prompt": "a fox", "memory": pictures(3)}
    plain = generate(pipe, **same, guidance_scale=1.0)
    torch.testing.assert_close(generate(pipe, **same, guidance_scale=SCALE), plain, rtol=1e-4, atol=1e-4)
    pulled = generate(pipe, **same, guidance_scale=SCALE, guide_memory=True)
    assert (pulled - plain).abs().max() > 1e-2


def test_nothing_of_it_is_left_for_the_next_shot(pipe: WanMemoryToVideoPipeline) -> None:
    published = HIDDEN | {"memory": pictures(3), "guide_memory": False}
    before = generate(pipe, **published)

    def broken_off(*_: Any) -> dict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, memory=pictures(2), callback_on_step_end=broken_off, **HIDDEN)
    assert torch.equal(generate(pipe, **published), before)
    assert not torch.equal(generate(pipe, **HIDDEN | {"memory": pictures(3)}), before)


@pytest.mark.parametrize("cache", ["first_block", "taylor"])
def test_it_goes_with_caches_across_steps(pipe: WanMemoryToVideoPipeline, cache: Any) -> None:
    runtime = RuntimeSettings(device="cpu", cache=cache, cache_threshold=0.0)
    fast = load_pipeline(model(pipe.config.memory_attention), runtime=runtime)
    for frames in (3, 2):
        memory = pictures(frames, seed=frames)
        shot = generate(fast, memory=memory, **HIDDEN)
        torch.testing.assert_close(shot, generate(pipe, memory=memory, **HIDDEN), rtol=1e-4, atol=1e-4)


def test_it_goes_with_streamed_blocks(pipe: WanMemoryToVideoPipeline) -> None:
    streamed = load_pipeline(model(pipe.config.memory_attention), runtime=CPU)
    for expert in streamed.experts.values():
        expert.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        )
    for frames in (3, 2):  # hooks are put on and taken off around every shot
        memory = pictures(frames, seed=frames)
        shot = generate(streamed, memory=memory, **HIDDEN)
        torch.testing.assert_close(shot, generate(pipe, memory=memory, **HIDDEN), rtol=1e-5, atol=1e-5)


def test_without_guidance_it_is_refused(pipe: WanMemoryToVideoPipeline) -> None:
    with pytest.raises(ValueError, match="guide_memory needs guidance: guidance_scale must be above 1"):
        generate(pipe, memory=pictures(1), **HIDDEN | {"guidance_scale": 1.0})
    with pytest.raises(ValueError, match="guide_memory needs guidance above 1"):
        SamplerSettings(guidance=1.0, guide_memory=True)


def test_a_pipeline_whose_passes_see_the_same_says_so(pipe: WanMemoryToVideoPipeline) -> None:
    made = model(pipe.config.memory_attention)
    batched = load_pipeline(made, runtime=RuntimeSettings(device="cpu", guidance_batch=True))
    with pytest.raises(ValueError, match="as one batch, of one memory"):
        generate(batched, memory=pictures(1), **HIDDEN)
    kept_nowhere = load_pipeline(made, runtime=CPU)
    kept_nowhere.memory_cache = "recompute"
    with pytest.raises(ValueError, match="memory_cache must be device or cpu"):
        generate(kept_nowhere, memory=pictures(1), **HIDDEN)


def test_passes_in_two_processes_have_no_slots_in_common() -> None:
    expert = torch.nn.Linear(1, 1)
    HookRegistry.check_if_exists_or_initialize(expert).register_hook(ModelHook(), GUIDANCE_PARALLEL)
    with pytest.raises(ValueError, match="not guidance_parallel"), hiding_memory([expert], slots=2):
        pass
    with hiding_memory([expert], slots=0):  # what is kept in attention each process can hide from itself
        pass


@pytest.mark.parametrize(
    ("mode", "runtime", "message"),
    [
        ("joint", {"guidance_batch": True}, r"runtime\.guidance_batch gives both the same tokens"),
        ("cached", {"guidance_batch": True}, r"runtime\.guidance_batch gives both the same tokens"),
        ("cached", {"memory_cache": "recompute"}, r"use memory_cache=device or cpu"),
        ("joint", {"guidance_parallel": True}, r"needs what the other predicts"),
    ],
)
def test_where_both_passes_must_see_the_same_it_is_refused(mode: MemoryMode, runtime: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_speed(model(mode), SamplerSettings(guide_memory=True), RuntimeSettings(**runtime))
    check_speed(model(mode), SamplerSettings(), RuntimeSettings(**runtime))
