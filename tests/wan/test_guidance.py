"""Guidance in one batch: the same shots as pass after pass, whatever the loop does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from storymem.wan.guidance import GuidanceBatch, batch_guidance
from storymem.wan.loading import load_pipeline
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.settings import RuntimeSettings
from tests.wan.tiny import CPU, STEPS, counting, generate, pictures, settings, shot_by_text

ONE_BATCH = RuntimeSettings(device="cpu", guidance_batch=True)
GUIDED: dict[str, Any] = {"negative_prompt": "fog", "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def counted() -> tuple[WanMemoryToVideoPipeline, GuidanceBatch]:
    pipe = load_pipeline(settings(), runtime=CPU)
    return pipe, batch_guidance(pipe.experts)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", [0, 3, 10])
def test_one_batch_makes_the_same_shot(pipe: WanMemoryToVideoPipeline, memory: int) -> None:
    batched = load_pipeline(settings(), runtime=ONE_BATCH)
    given = {**GUIDED, "guidance_scale_2": 2.0, "memory": pictures(memory)}
    with counting(batched.transformer_2.blocks[0]) as calls:
        ours = generate(batched, **given)
    close(ours, generate(pipe, **given))
    assert calls == {"WanTransformerBlock": 2}, "two of the four steps, one forward each, after the switch of experts"


def test_only_the_first_step_runs_pass_after_pass(counted: tuple[WanMemoryToVideoPipeline, GuidanceBatch]) -> None:
    pipe, batch = counted
    batch.forwards.clear()
    generate(pipe, **GUIDED)
    assert batch.forwards == {1: 2, 2: STEPS - 1}


def test_the_next_shot_has_texts_of_its_own(
    pipe: WanMemoryToVideoPipeline, counted: tuple[WanMemoryToVideoPipeline, GuidanceBatch]
) -> None:
    batched, _ = counted
    generate(batched, **GUIDED)
    other = {"prompt": "an owl", "negative_prompt": "rain", "guidance_scale": 2.0, "memory": pictures(2)}
    close(generate(batched, **other), generate(pipe, **other))


def test_without_guidance_nothing_is_computed_twice(
    pipe: WanMemoryToVideoPipeline, counted: tuple[WanMemoryToVideoPipeline, GuidanceBatch]
) -> None:
    batched, batch = counted
    embeds, _ = pipe.encode_prompt("a fox", do_classifier_free_guidance=False, max_sequence_length=16)
    generate(batched, prompt_embeds=embeds, negative_prompt_embeds=embeds + 1, guidance_scale=3.0)
    batch.forwards.clear()
    ours = generate(batched, prompt_embeds=embeds, guidance_scale=1.0)
    assert batch.forwards == {1: STEPS - 1, 2: 1}, "the first step still expects the negative prompt of the shot before"
    close(ours, generate(pipe, prompt_embeds=embeds, guidance_scale=1.0))


def test_a_callback_may_change_the_negative_prompt(
    pipe: WanMemoryToVideoPipeline, counted: tuple[WanMemoryToVideoPipeline, GuidanceBatch]
) -> None:
    def change(_pipe: Any, step: int, _t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"negative_prompt_embeds": tensors["negative_prompt_embeds"] * (1 if step else 2)}

    given = {
        **GUIDED,
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["latents", "negative_prompt_embeds"],
    }
    close(generate(counted[0], **given), generate(pipe, **given))


def test_several_videos_in_one_call(
    pipe: WanMemoryToVideoPipeline, counted: tuple[WanMemoryToVideoPipeline, GuidanceBatch]
) -> None:
    given = {**GUIDED, "num_videos_per_prompt": 2, "memory": pictures(1)}
    close(generate(counted[0], **given), generate(pipe, **given))


def test_a_first_shot_by_text_to_video(pipe: WanMemoryToVideoPipeline) -> None:
    def shot(runtime: RuntimeSettings) -> Tensor:
        return shot_by_text(settings(), pipe.vae, runtime=runtime)

    close(shot(ONE_BATCH), shot(CPU))


def test_cached_memory_serves_both_passes() -> None:
    model = settings(memory_attention="cached")
    given = {**GUIDED, "memory": pictures(3)}
    close(
        generate(load_pipeline(model, runtime=ONE_BATCH), **given), generate(load_pipeline(model, runtime=CPU), **given)
    )
