"""The transformer over segments: compared with attention under a mask, with and without cached keys and values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from storymem.wan.loading import load_pipeline
from storymem.wan.pipeline import WanMemoryToVideoPipeline
from storymem.wan.segments import (
    Layout,
    Text,
    holocine,
    memento,
    memory_cached,
    memory_joint,
    single_shot,
    with_given,
)
from storymem.wan.settings import ModelSettings, RuntimeSettings
from storymem.wan.transformer import SegmentCache, enable_layouts
from tests.wan.tiny import CPU, LATENT, SLOTS, STEPS, adapt, generate, images, settings

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
TOKENS = LATENT[0] * LATENT[1] // 4  # of a latent frame
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


def network(*, stock: bool = False) -> WanTransformer3DModel:
    torch.manual_seed(0)
    made = WanTransformer3DModel(**SHAPE).eval()
    if not stock:
        enable_layouts(made)
    return made


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(frames: int, batch: int = 1, time: float = 700.0, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": drawn(batch, 36, frames, *LATENT, seed=seed),
        "timestep": torch.full((batch,), time),
        "encoder_hidden_states": drawn(batch, 16, 20, seed=seed + 1),
        "return_dict": False,
    }


# The function


class Weighted(WanAttnProcessor):
    """Attention written out: softmax over keys that count ``times`` [queries, keys], 0 for rows without any key."""

    def __init__(self, *times: Tensor) -> None:
        super().__init__()
        self.times = times

    def __call__(self, attn: Any, hidden_states: Tensor, text: Any, _mask: Any, rotary: Any) -> Tensor:
        results = []
        for times in self.times:
            bias = torch.where(times.any(dim=1, keepdim=True), times.log(), torch.zeros_like(times))
            results.append(super().__call__(attn, hidden_states, text, bias, rotary) * times.any(dim=1)[:, None])
        # Linear projections come after attention; without their bias the mean of results is that of attention.
        return torch.stack(results).mean(dim=0) if len(results) > 1 else results[0]


class Positions(WanRotaryPosEmbed):
    """Wan's rotary tables at temporal positions, from the definition of RoPE."""

    positions: tuple[int, ...]

    def forward(self, hidden_states: Tensor) -> Any:
        cos, sin = super().forward(hidden_states)
        frequencies = 10000.0 ** (-torch.arange(0, self.t_dim, 2, dtype=torch.float64) / self.t_dim)
        angles = torch.tensor(self.positions, dtype=torch.float64)[:, None] * frequencies
        angles = angles.repeat_interleave(2, dim=1).repeat_interleave(cos.shape[1] // len(self.positions), dim=0)
        cos, sin = cos.clone(), sin.clone()
        cos[0, :, 0, : self.t_dim], sin[0, :, 0, : self.t_dim] = angles.cos().to(cos), angles.sin().to(sin)
        return cos, sin


def foreign(layout: Layout, given: dict[str, Any]) -> Tensor:
    """The prediction by diffusers' transformer with attention written out from the layout, token by token."""
    theirs = network(stock=True)
    names = [s.name for s in layout.segments for _ in range(s.frames * TOKENS)]
    places = [i for s in layout.segments for i in range(s.frames * TOKENS)]

    def counts(query: int, key_set: int) -> list[float]:
        sets = next(s for s in layout.segments if s.name == names[query]).reads
        read = sets[min(key_set, len(sets) - 1)]
        return [
            float(sum(r == n if isinstance(r, str) else r.segment == n and i < r.frames * TOKENS for r in read))
            for n, i in zip(names, places, strict=True)
        ]

    most = max(len(segment.reads) for segment in layout.segments)
    seen = [torch.tensor([counts(query, key_set) for query in range(len(names))]) for key_set in range(most)]
    texts = torch.zeros(len(names), 16)
    for number, name in enumerate(names):
        text = next(segment for segment in layout.segments if segment.name == name).text
        for first, last in () if text is None else text.spans or ((0, 16),):
            texts[number, first:last] = 1
    for block in theirs.blocks:
        block.attn1.set_processor(Weighted(*seen))
        block.attn2.set_processor(Weighted(texts))
    rope = theirs.rope
    rope.__class__ = Positions
    rope.positions = sum((segment.positions for segment in layout.segments), ())
    fixed = [700.0 if s.timestep is None else s.timestep for s in layout.segments for _ in range(s.frames * TOKENS)]
    with torch.no_grad():
        return theirs(**given | {"timestep": torch.tensor(fixed)[None]})[0]


PIECES = [Text(spans=((0, 3), (5, 9), (12, 16))), Text(spans=((0, 3), (9, 16)))]
LAYOUTS = {
    "single shot": single_shot(3),
    "joint": memory_joint(3, 2),
    "cached": memory_cached(3, 2),
    "cached, one frame": memory_cached(1, 2),
    "cached, given": with_given(memory_cached(2, 3), 2),
    "given": with_given(single_shot(3), 1),
    "full": holocine([2, 1], PIECES, sparse=False),
    "sparse": holocine([2, 2], PIECES, sparse=True),
    "memory reads twice": memento([-40, -3], 2, subject=False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_attention_as_the_layout_states(name: str) -> None:
    layout = LAYOUTS[name]
    given = inputs(layout.frames)
    with torch.no_grad():
        (ours,) = network()(**given, layout=layout)
    torch.testing.assert_close(ours, foreign(layout, given), rtol=1e-4, atol=1e-5)


def test_several_texts_are_read_by_name() -> None:
    layout, given = memento([-9, -3], 2), inputs(5)
    prompt, subject = given["encoder_hidden_states"], drawn(1, 16, 20, seed=9)
    texts = {"prompt": prompt, "subject": subject}
    of = network()
    with torch.no_grad():
        (ours,) = of(**given | {"encoder_hidden_states": texts}, layout=layout)
        (other,) = of(**given | {"encoder_hidden_states": texts | {"subject": subject + 1}}, layout=layout)
        (same,) = of(**given | {"encoder_hidden_states": {"prompt": prompt, "subject": prompt}}, layout=layout)
    assert not torch.allclose(ours[:, :, :1], other[:, :, :1])
    plain = Layout(tuple(replace(s, text=Text()) if s.name == "subject" else s for s in layout.segments))
    with torch.no_grad():
        torch.testing.assert_close(of(**given, layout=plain)[0], same, **CLOSE)


def test_without_a_layout_it_is_wans_own() -> None:
    for shape, timestep in (
        ((2, 36, 4, 4, 6), torch.tensor([3.0, 900.0])),
        ((1, 36, 2, 4, 4), torch.rand(1, 8) * 1000),
    ):
        given = inputs(1, shape[0]) | {"hidden_states": drawn(*shape), "timestep": timestep}
        with torch.no_grad():
            assert torch.equal(network()(**given)[0], network(stock=True)(**given)[0])


def test_memory_depends_on_nothing_but_memory() -> None:
    of, layout = network(), memory_cached(2, 2)
    given, other = inputs(4), inputs(4, time=20.0, seed=9)
    other["hidden_states"][:, :, :2] = given["hidden_states"][:, :, :2]
    with torch.no_grad():
        first, second = (of(**each, layout=layout)[0] for each in (given, other))
    assert torch.equal(first[:, :, :2], second[:, :, :2])
    assert not torch.equal(first[:, :, 2:], second[:, :, 2:])


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["cached", "cached, given"])
def test_reading_what_is_cached_is_computing_together(name: str, batch: int, on_cpu: bool) -> None:
    of, layout = network(), LAYOUTS[name]
    count = layout.segments[0].frames
    memory = inputs(count, seed=5)
    cache = SegmentCache(on_cpu=on_cpu)
    with torch.no_grad():
        of(**memory, layout=layout.only(layout.constant), cache=cache)
        for time, seed in ((700.0, 0), (20.0, 3)):
            video = inputs(layout.frames - count, batch, time, seed)
            whole = torch.cat([memory["hidden_states"].expand(batch, -1, -1, -1, -1), video["hidden_states"]], dim=2)
            (expected,) = of(**video | {"hidden_states": whole}, layout=layout)
            (read,) = of(**video, layout=layout, cache=cache)
            torch.testing.assert_close(read, expected[:, :, count:], **CLOSE)


def test_frames_that_the_layout_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['memory', 'video'\] do not have 4 latent frames"):
        network()(**inputs(4), layout=memory_cached(3, 2))


def test_class_weights_and_backends_stay() -> None:
    of = network(stock=True)
    of.set_attention_backend("native")
    keys = list(of.state_dict())
    for _ in range(2):
        enable_layouts(of)
    assert type(of) is WanTransformer3DModel
    assert list(of.state_dict()) == keys
    assert {p._attention_backend.value for p in of.attn_processors.values()} == {"native"}
    given, layout = inputs(4), memory_joint(2, 2)
    with torch.no_grad():
        assert torch.equal(of(**given, layout=layout)[0], network()(**given, layout=layout)[0])
        assert torch.equal(copy.deepcopy(of)(**given, layout=layout)[0], of(**given, layout=layout)[0])


def test_hooks_that_wrap_the_stock_forward_are_refused() -> None:
    of = network(stock=True)
    of.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    with pytest.raises(ValueError, match="has hooks already"):
        enable_layouts(of)


def test_gradients_pass_checkpoints_in_every_layout() -> None:
    for layout in LAYOUTS.values():
        gradients = []
        for checkpoints in (False, True):
            of = network()
            if checkpoints:
                of.enable_gradient_checkpointing()
            of(**inputs(layout.frames), layout=layout)[0].square().mean().backward()
            gradients.append(of.blocks[0].attn1.to_q.weight.grad)
        torch.testing.assert_close(*gradients, **CLOSE)
        assert gradients[0].abs().max() > 0


class AttentionCalls(TorchFunctionMode):
    """What attention kernels are given: shapes and strides of queries, keys and values -> strides of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients: dict[tuple, set[tuple[int, ...]]] = {}

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is nn.functional.scaled_dot_product_attention:
            assert kwargs is not None
            assert kwargs["attn_mask"] is None
            given = [kwargs[name] for name in ("query", "key", "value")]
            assert all(tensor.numel() and tensor.stride(-1) == 1 for tensor in given)
            strides = self.gradients.setdefault(tuple((t.shape, t.stride()) for t in given), set())
            output.register_hook(lambda gradient: strides.add(gradient.stride()))
        return output


WITH_SUBJECT = {f"subject and memory of {frames}": memento(range(-frames, 0), 2) for frames in (1, 2)}


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), *WITH_SUBJECT.values()], ids=[*LAYOUTS, *WITH_SUBJECT])
def test_kernels_are_given_nothing_empty_and_gradients_of_one_layout(layout: Layout) -> None:
    """PyTorch runs cuDNN's backward, built for the strides of one gradient, for all calls with inputs of this form.

    In Memento's layout several reads have the same form: of memory and video, with as many frames of each; of subject
    and memory, with one memory frame.
    """
    given = inputs(layout.frames, batch=2)
    texts = dict.fromkeys(("prompt", "subject"), given["encoder_hidden_states"])
    with AttentionCalls() as calls:
        (prediction,) = network()(**given | {"encoder_hidden_states": texts}, layout=layout)
    prediction.square().mean().backward()
    assert len(calls.gradients) > 1
    assert all(len(strides) == 1 for strides in calls.gradients.values())


# The pipeline


@pytest.mark.parametrize("frames", [0, 3, 10])
def test_shots_with_and_without_the_cache_agree(cached: WanMemoryToVideoPipeline, frames: int) -> None:
    """Over both experts and both passes of guidance."""
    memory, shots = images(frames), {}
    for cache in ("recompute", "device", "cpu"):
        cached.memory_cache = cache
        shots[cache] = generate(cached, memory=memory, **GUIDED)
    cached.memory_cache = "device"
    assert shots["device"].shape == (1, 16, SLOTS, *LATENT)
    for shot in shots.values():
        torch.testing.assert_close(shot, shots["recompute"], **CLOSE)
    assert torch.equal(shots["device"], shots["cpu"])
    if frames:
        assert (shots["device"] - generate(cached, **GUIDED)).norm() > 1e-3


def test_one_cache_serves_a_batch(cached: WanMemoryToVideoPipeline) -> None:
    memory = images(2)
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


def weaken(pipe: Any, step: int, _timestep: Any, _tensors: Any) -> dict:
    for expert in pipe.experts.values():
        expert.set_adapters(["memory"], [0.5 if step == 0 else 1.0])
    return {}


@pytest.mark.parametrize("changes", [{"attention_kwargs": {"scale": 0.5}}, {"callback_on_step_end": weaken}])
def test_the_scale_of_an_adapter_reaches_cached_memory_too(changes: dict[str, Any]) -> None:
    pipe = adapt(load_pipeline(cached_model(), runtime=CPU))
    shots = {}
    for cache in ("device", "recompute"):
        pipe.memory_cache = cache
        shots[cache] = generate(pipe, memory=images(2), **changes)
    torch.testing.assert_close(shots["device"], shots["recompute"], rtol=1e-4, atol=1e-4)


def test_cached_keys_and_values_keep_no_larger_tensor_alive() -> None:
    of, layout = network(), memory_cached(2, 2)
    for block in of.blocks:
        block.attn1.fuse_projections()
    for on_cpu in (False, True):
        cache = SegmentCache(on_cpu=on_cpu)
        with torch.no_grad():
            of(**inputs(2), layout=layout.only(layout.constant), cache=cache)
        for tensor in cache.block(0).segments["memory"]:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_texts_and_timesteps_that_do_not_fit_are_refused() -> None:
    of, given = network(), inputs(3)
    beyond = holocine([1, 2], [Text(spans=((0, 3), (9, 17)))] * 2, sparse=False)
    with pytest.raises(ValueError, match="has 16 tokens"):
        of(**given, layout=beyond)
    with pytest.raises(ValueError, match=r"the texts \['subject'\], and only \['prompt'\]"):
        of(**given, layout=memento([-3], 1))
    with pytest.raises(ValueError, match="timesteps are for 4 of 2 segments"):
        of(**given | {"timestep": torch.zeros(1, 4)}, layout=memory_joint(1, 2))


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
        generate(cached, memory=images(3), **GUIDED)
    once = [3 * TOKENS, *[SLOTS * TOKENS] * STEPS]  # half of the steps, two passes each
    assert seen == {"transformer": once, "transformer_2": once}


def test_nothing_is_left_after_a_shot_and_after_a_failure(cached: WanMemoryToVideoPipeline) -> None:
    class StopError(Exception):
        pass

    def fail(*_: object) -> dict:
        raise StopError

    plain, one, two = generate(cached), images(2, seed=1), images(3, seed=2)
    expected = generate(load_pipeline(cached_model(), runtime=CPU), memory=two)
    for cache in ("device", "recompute"):
        cached.memory_cache = cache
        with pytest.raises(StopError):
            generate(cached, memory=one, callback_on_step_end=fail)
        assert torch.equal(generate(cached), plain)
        generate(cached, memory=one)
        torch.testing.assert_close(generate(cached, memory=two), expected, **CLOSE)
    cached.memory_cache = "device"


def test_no_memory_is_the_same_in_both_modes(cached: WanMemoryToVideoPipeline) -> None:
    joint = load_pipeline(cached_model(memory_attention="joint"), runtime=CPU)
    assert torch.equal(generate(joint), generate(cached))
    memory = images(2)
    assert (generate(joint, memory=memory) - generate(cached, memory=memory)).norm() > 1e-3


def test_noise_is_of_the_shot_alone(cached: WanMemoryToVideoPipeline) -> None:
    noise = torch.randn(1, 16, SLOTS, *LATENT, generator=torch.Generator().manual_seed(0))
    assert torch.equal(generate(cached, memory=images(2), latents=noise), generate(cached, memory=images(2)))
    with pytest.raises(ValueError, match=r"latents must be \[1, 16, 3, 4, 6\], not \[1, 16, 5, 4, 6\]"):
        generate(cached, memory=images(2), latents=torch.zeros(1, 16, 2 + SLOTS, *LATENT))


def test_a_saved_pipeline_keeps_its_mode(cached: WanMemoryToVideoPipeline, tmp_path: Path) -> None:
    cached.save_pretrained(tmp_path)
    again = WanMemoryToVideoPipeline.from_pretrained(tmp_path)
    memory = images(2)
    torch.testing.assert_close(generate(again, memory=memory), generate(cached, memory=memory), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="memory_attention must be joint or cached, not 'shared'"):
        WanMemoryToVideoPipeline.from_pretrained(tmp_path, memory_attention="shared")


# Beside everything else that runs forwards


@pytest.mark.parametrize(
    "changes",
    [
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
        memory = images(frames, seed=frames)
        shot = generate(fast, memory=memory, **GUIDED)
        torch.testing.assert_close(shot, generate(cached, memory=memory, **GUIDED), rtol=1e-4, atol=1e-4)
