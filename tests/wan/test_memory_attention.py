"""Cached memory: the function it computes, that keeping keys and values changes nothing, and that nothing is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from storymem.wan.loading import load_pipeline
from storymem.wan.memory_attention import (
    install_memory_attention,
    memory_input,
    reading_memory,
    slot_tokens,
    token_timesteps,
)
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.rope import install_memory_rope
from storymem.wan.settings import ModelSettings, RuntimeSettings, SamplerSettings, check_speed
from tests.wan.tiny import CPU, LATENT, SLOTS, STEPS, generate, pictures, settings

SHAPE = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 40,
    "text_dim": 20,
    "freq_dim": 32,
    "in_channels": 36,
    "out_channels": 16,
}
TOKENS = LATENT[0] * LATENT[1] // 4  # of a slot
GUIDED: dict[str, Any] = {"negative_prompt": "fog", "guidance_scale": 3.0}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def cached_model(**changes: Any) -> ModelSettings:
    """The tiny model in the cached mode with three blocks: first, last and one between."""
    network = asdict(settings().network)
    network["transformer"]["num_layers"] = 3
    return settings(network=network, **{"memory_attention": "cached"} | changes)


@pytest.fixture(scope="module")
def cached() -> WanMemoryToVideoPipeline:
    return load_pipeline(cached_model(), runtime=CPU)


def network() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(**SHAPE).eval()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch: int = 1, time: float = 700.0, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": drawn(batch, 36, SLOTS, *LATENT, seed=seed),
        "timestep": torch.full((batch,), time),
        "encoder_hidden_states": drawn(batch, 16, 20, seed=seed + 1),
        "return_dict": False,
    }


def together(of: WanTransformer3DModel, memory: Tensor, video: dict[str, Any]) -> Tensor:
    """The prediction for memory and video in one forward."""
    frames, latents = memory.shape[2], torch.cat([memory_input(memory), video["hidden_states"]], dim=2)
    timesteps = torch.cat([torch.zeros(1, frames), video["timestep"][:, None].expand(-1, SLOTS)], dim=1)
    changes = {"hidden_states": latents, "timestep": token_timesteps(timesteps, latents, of)}
    attention = install_memory_attention(of)
    with attention.whole(frames, stride=5, tokens=frames * slot_tokens(latents, of)), torch.no_grad():
        return of(**video | changes)[0]


# The function


class Masked(WanAttnProcessor):
    """diffusers' own attention, under a mask over queries and keys; rows without any key give zero."""

    def __init__(self, mask: Tensor, zero: Tensor) -> None:
        super().__init__()
        self.mask, self.zero = mask, zero

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any) -> Tensor:
        text, _, rotary = args
        return super().__call__(attn, hidden_states, text, self.mask, rotary) * ~self.zero[:, None]


@pytest.mark.parametrize("frames", [1, 3])
def test_it_is_wans_attention_under_a_mask(frames: int) -> None:
    memory, video = drawn(1, 16, frames, *LATENT, seed=5), inputs()
    theirs = network()
    tokens = (frames + SLOTS) * TOKENS
    of_memory = torch.arange(tokens) < frames * TOKENS
    mask = ~of_memory[:, None] | of_memory[None, :]  # memory's queries see memory's keys alone
    for block in theirs.blocks:
        block.attn1.set_processor(Masked(mask, torch.zeros_like(of_memory)))
        block.attn2.set_processor(Masked(torch.ones(tokens, 16, dtype=torch.bool), of_memory))
    rope = install_memory_rope(theirs)
    rope.memory_frames, rope.stride = frames, 5
    clean = torch.cat([memory, torch.ones(1, 4, frames, *LATENT), memory], dim=1)
    with torch.no_grad():
        (expected,) = theirs(
            torch.cat([clean, video["hidden_states"]], dim=2),
            torch.where(of_memory, 0.0, 700.0)[None],
            video["encoder_hidden_states"],
            return_dict=False,
        )
    torch.testing.assert_close(together(network(), memory, video), expected, **CLOSE)


def test_memory_depends_on_nothing_but_memory() -> None:
    of, memory = network(), drawn(1, 16, 2, *LATENT, seed=5)
    first = together(of, memory, inputs())[:, :, :2]
    assert torch.equal(together(of, memory, inputs(time=20.0, seed=9))[:, :, :2], first)
    other = together(of, memory + 1, inputs())
    assert not torch.equal(other[:, :, :2], first)
    assert not torch.equal(other[:, :, 2:], together(of, memory, inputs())[:, :, 2:])


@pytest.mark.parametrize("cache", ["device", "cpu", "recompute"])
@pytest.mark.parametrize("batch", [1, 2])
def test_reading_is_computing_together(cache: Any, batch: int) -> None:
    of, memory = network(), drawn(1, 16, 3, *LATENT, seed=5)
    steps = [inputs(batch, time, seed) for time, seed in ((700.0, 0), (20.0, 3))]
    with reading_memory([of], memory, stride=5, cache=cache), torch.no_grad():
        read = [of(**video)[0] for video in steps]
    for prediction, video in zip(read, steps, strict=True):
        alone = [{k: v[b : b + 1] if isinstance(v, Tensor) else v for k, v in video.items()} for b in range(batch)]
        expected = torch.cat([together(of, memory, sample)[:, :, 3:] for sample in alone])
        torch.testing.assert_close(prediction, expected, **CLOSE)


def test_fused_projections_give_the_same() -> None:
    of, memory = network(), drawn(1, 16, 2, *LATENT, seed=5)
    expected = together(of, memory, inputs())
    for block in of.blocks:
        block.attn1.fuse_projections()
    torch.testing.assert_close(together(of, memory, inputs()), expected, **CLOSE)


# The pipeline


@pytest.mark.parametrize("frames", [0, 3, 10])
def test_shots_with_and_without_the_cache_agree(cached: WanMemoryToVideoPipeline, frames: int) -> None:
    """Over both experts and both passes of guidance."""
    memory, shots = pictures(frames), {}
    for cache in ("recompute", "device", "cpu"):
        cached.memory_cache = cache  # type: ignore[assignment]
        shots[cache] = generate(cached, memory=memory, **GUIDED)
    cached.memory_cache = "device"
    assert shots["device"].shape == (1, 16, SLOTS, *LATENT)
    for shot in shots.values():
        torch.testing.assert_close(shot, shots["recompute"], **CLOSE)
    assert torch.equal(shots["device"], shots["cpu"])
    if frames:
        assert (shots["device"] - generate(cached, **GUIDED)).norm() > 1e-3


def test_one_cache_serves_a_batch(cached: WanMemoryToVideoPipeline) -> None:
    memory = pictures(2)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = generate(
        cached,
        memory=memory,
        prompt=["a fox", "two owls"],
        generator=generators,
        **GUIDED | {"negative_prompt": ["fog", "rain"]},
    )
    for seed, prompt, negative, shot in zip((3, 4), ("a fox", "two owls"), ("fog", "rain"), both, strict=True):
        changes = GUIDED | {"prompt": prompt, "negative_prompt": negative}
        alone = generate(cached, memory=memory, generator=torch.Generator().manual_seed(seed), **changes)
        torch.testing.assert_close(shot, alone[0], rtol=1e-4, atol=1e-4)


def test_content_order_and_stride_of_memory_matter(cached: WanMemoryToVideoPipeline) -> None:
    one, two = pictures(2)
    shots = [generate(cached, memory=memory) for memory in ([one, two], [two, one], [one])]
    shots.append(generate(cached, memory=[one, two], rope_stride=1))
    for number, shot in enumerate(shots):
        for other in shots[:number]:
            assert (shot - other).norm() / other.norm() > 1e-4


@contextmanager
def tokens_seen(pipe: WanMemoryToVideoPipeline) -> Iterator[dict[str, list[int]]]:
    """How many tokens each expert's last block sees, forward by forward."""
    seen: dict[str, list[int]] = {name: [] for name in pipe.experts}
    handles = [
        expert.blocks[-1].register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].shape[1]))
        for name, expert in pipe.experts.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def test_memory_is_computed_once_for_each_expert_and_steps_see_the_shot_alone(
    cached: WanMemoryToVideoPipeline,
) -> None:
    with tokens_seen(cached) as seen:
        generate(cached, memory=pictures(3), **GUIDED)
    once = [3 * TOKENS, *[SLOTS * TOKENS] * STEPS]  # half of the steps, two passes each
    assert seen == {"transformer": once, "transformer_2": once}


def kept(pipe: WanMemoryToVideoPipeline) -> list[int]:
    """Bytes of keys and values that each expert holds."""
    layers = [install_memory_attention(expert).layers for expert in pipe.experts.values()]
    return [sum(t.nbytes for layer in of for t in layer.kept or ()) for of in layers]


def test_an_expert_drops_what_the_one_before_it_kept(cached: WanMemoryToVideoPipeline) -> None:
    held: list[list[int]] = []
    generate(cached, memory=pictures(3), callback_on_step_end=lambda *_: held.append(kept(cached)) or {})
    dim, layers = 2 * 24, 3
    each = layers * 2 * 3 * TOKENS * dim * 4
    assert held == [[each, 0], [each, 0], [0, each], [0, each]]


def test_nothing_is_left_after_a_shot_and_after_a_failure(cached: WanMemoryToVideoPipeline) -> None:
    class StopError(Exception):
        pass

    def fail(*_: object) -> dict:
        assert kept(cached)[0] > 0
        raise StopError

    def state() -> list[tuple[str, int, int]]:
        memories = [install_memory_attention(expert) for expert in cached.experts.values()]
        return [(m.role, m.tokens, m.rope.memory_frames) for m in memories]

    hooks = [dict(expert._forward_pre_hooks) for expert in cached.experts.values()]
    plain, one, two = generate(cached), pictures(2, seed=1), pictures(3, seed=2)
    expected = generate(load_pipeline(cached_model(), runtime=CPU), memory=two)
    for cache in ("device", "recompute"):
        cached.memory_cache = cache  # type: ignore[assignment]
        with pytest.raises(StopError):
            generate(cached, memory=one, callback_on_step_end=fail if cache == "device" else _raise(StopError))
        assert (kept(cached), state()) == ([0, 0], [("none", 0, 0)] * 2)
        assert torch.equal(generate(cached), plain)
        generate(cached, memory=one)
        assert (kept(cached), state()) == ([0, 0], [("none", 0, 0)] * 2)
        torch.testing.assert_close(generate(cached, memory=two), expected, **CLOSE)
        assert [dict(expert._forward_pre_hooks) for expert in cached.experts.values()] == hooks
    cached.memory_cache = "device"


def _raise(error: type[Exception]) -> Any:
    def fail(*_: object) -> dict:
        raise error

    return fail


def test_joint_is_diffusers_attention_and_no_memory_is_the_same_in_both_modes(cached: WanMemoryToVideoPipeline) -> None:
    joint = load_pipeline(cached_model(memory_attention="joint"), runtime=CPU)
    assert {type(p) for expert in joint.experts.values() for p in expert.attn_processors.values()} == {WanAttnProcessor}
    assert torch.equal(generate(joint), generate(cached))
    memory = pictures(2)
    assert (generate(joint, memory=memory) - generate(cached, memory=memory)).norm() > 1e-3


def test_noise_is_of_the_shot_alone(cached: WanMemoryToVideoPipeline) -> None:
    noise = torch.randn(1, 16, SLOTS, *LATENT, generator=torch.Generator().manual_seed(0))
    assert torch.equal(generate(cached, memory=pictures(2), latents=noise), generate(cached, memory=pictures(2)))
    with pytest.raises(ValueError, match=r"latents must be \[1, 16, 3, 4, 6\], not \[1, 16, 5, 4, 6\]"):
        generate(cached, memory=pictures(2), latents=torch.zeros(1, 16, 2 + SLOTS, *LATENT))


def test_a_saved_pipeline_keeps_its_mode(cached: WanMemoryToVideoPipeline, tmp_path: Path) -> None:
    cached.save_pretrained(tmp_path)
    again = WanMemoryToVideoPipeline.from_pretrained(tmp_path)
    memory = pictures(2)
    torch.testing.assert_close(generate(again, memory=memory), generate(cached, memory=memory), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="memory_attention must be joint or cached, not 'shared'"):
        WanMemoryToVideoPipeline.from_pretrained(tmp_path, memory_attention="shared")


# Beside everything else that runs forwards


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_batch": True},
        {"cache": "first_block", "cache_threshold": 0.0},
        {"cache": "taylor", "cache_threshold": 0.0},
        {"attention": "native"},
        {"memory_cache": "cpu"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_it_goes_with_what_makes_forwards_fast(cached: WanMemoryToVideoPipeline, changes: dict[str, Any]) -> None:
    fast = load_pipeline(cached_model(), runtime=RuntimeSettings(device="cpu", **changes))
    for frames in (3, 2):  # no shot may see what a step cache holds of the one before, or of the memory
        memory = pictures(frames, seed=frames)
        shot = generate(fast, memory=memory, **GUIDED)
        torch.testing.assert_close(shot, generate(cached, memory=memory, **GUIDED), rtol=1e-4, atol=1e-4)


def test_it_goes_with_streamed_blocks(cached: WanMemoryToVideoPipeline) -> None:
    streamed = load_pipeline(cached_model(), runtime=CPU)
    for expert in streamed.experts.values():
        expert.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        )
    memory = pictures(3)
    torch.testing.assert_close(generate(streamed, memory=memory), generate(cached, memory=memory), **CLOSE)


def test_compiled_blocks_share_one_graph_for_each_size_of_memory(cached: WanMemoryToVideoPipeline) -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, _inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = load_pipeline(cached_model(), runtime=CPU)
    for expert in compiled.experts.values():
        for block in expert.blocks:
            block.forward = torch.compile(block.forward, dynamic=False, backend=counting)
    for frames, expected in ((0, 1), (2, 2), (3, 3), (2, 3)):
        memory = pictures(frames)
        shot = generate(compiled, memory=memory)
        torch.testing.assert_close(shot, generate(cached, memory=memory), rtol=1e-4, atol=1e-4)
        assert len(graphs) == expected


def test_what_was_set_on_the_attention_before_stays() -> None:
    of = network()
    of.set_attention_backend("native")
    install_memory_attention(of)
    backends = {p._attention_backend.value for p in of.attn_processors.values()}
    assert backends == {"native"}
    assert install_memory_attention(of) is install_memory_attention(of)


def test_keeping_nothing_in_another_place_is_refused() -> None:
    runtime = RuntimeSettings(memory_cache="cpu")
    with pytest.raises(ValueError, match=r"runtime\.memory_cache=cpu is for model\.memory_attention=cached"):
        check_speed(settings(), SamplerSettings(), runtime)
    check_speed(cached_model(), SamplerSettings(), runtime)
