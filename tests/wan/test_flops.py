"""The plan's arithmetic, counted a second time by torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from storymem.wan.flops import cached_flops, forward_flops
from storymem.wan.segments import memory_cached
from storymem.wan.transformer import SegmentCache, enable_layouts

TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 40,
    "text_dim": 20,
    "freq_dim": 32,
    "out_channels": 16,
}
A14B = {
    "num_layers": 40,
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "ffn_dim": 13824,
    "text_dim": 4096,
    "freq_dim": 256,
    "out_channels": 16,
}


@pytest.mark.parametrize(
    ("changes", "slots", "height", "width", "text_tokens", "in_channels"),
    [
        ({}, 3, 4, 6, 16, 36),
        ({}, 13, 8, 12, 24, 36),
        ({}, 1, 2, 2, 8, 16),
        ({"num_layers": 3, "num_attention_heads": 4, "ffn_dim": 72, "text_dim": 48}, 5, 6, 4, 16, 36),
        ({"freq_dim": 64, "out_channels": 8}, 2, 4, 4, 16, 16),
    ],
)
def test_torch_counts_the_same(
    changes: dict[str, Any], slots: int, height: int, width: int, text_tokens: int, in_channels: int
) -> None:
    config = TINY | changes
    with torch.device("meta"):
        network = WanTransformer3DModel(**config, in_channels=in_channels)
        latents = torch.empty(1, in_channels, slots, height, width)
        text = torch.empty(1, text_tokens, config["text_dim"])
        timestep = torch.empty(1)
    with FlopCounterMode(display=False) as counter:
        network(latents, timestep, text)
    flops = forward_flops(
        config, slots=slots, height=height, width=width, text_tokens=text_tokens, in_channels=in_channels
    )
    assert flops.tokens == slots * height * width // 4
    assert flops.total == counter.get_total_flops()


def test_a_networks_own_config_is_understood() -> None:
    with torch.device("meta"):
        network = WanTransformer3DModel(**TINY, in_channels=36)
    shape = {"slots": 4, "height": 4, "width": 4, "text_tokens": 16}
    assert forward_flops(network.config, **shape) == forward_flops(TINY, **shape)


def test_the_published_size_with_ten_memory_frames() -> None:
    flops = forward_flops(A14B, slots=10 + 21, height=60, width=104, text_tokens=512)
    assert flops.tokens == 48360
    assert flops.attention / 1e15 == pytest.approx(1.9, abs=0.05)
    # Below 2 * tokens * 14.3e9 weights = 1.38: cross-attention's k and v see 512 text tokens, not the video's.
    assert flops.linear / 1e15 == pytest.approx(1.18, abs=0.01)
    two_layers = A14B | {"num_layers": 2}
    with torch.device("meta"):
        network = WanTransformer3DModel(**two_layers, in_channels=36)
        inputs = torch.empty(1, 36, 31, 60, 104), torch.empty(1), torch.empty(1, 512, 4096)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    flops = forward_flops(two_layers, slots=31, height=60, width=104, text_tokens=512)
    assert flops.total == counter.get_total_flops()


def test_the_published_size_without_memory() -> None:
    flops = forward_flops(A14B, slots=21, height=60, width=104, text_tokens=512)
    assert flops.tokens == 32760
    assert flops.attention / 1e15 == pytest.approx(0.9, abs=0.05)
    assert flops.total == flops.linear + flops.attention


@pytest.mark.parametrize("memory_frames", [1, 3, 10])
def test_torch_counts_the_same_in_cached_memory(memory_frames: int) -> None:
    with torch.device("meta"):
        network = WanTransformer3DModel(**TINY, in_channels=36)
        enable_layouts(network)
        inputs = {"timestep": torch.empty(1), "encoder_hidden_states": torch.empty(1, 16, 20), "return_dict": False}
    flops = cached_flops(TINY, memory_frames=memory_frames, slots=3, height=4, width=6, text_tokens=16)
    layout, cache = memory_cached(memory_frames, 3), SegmentCache()

    def counted(frames: int, **arguments: Any) -> int:
        latents = torch.empty(1, 36, frames, 4, 6, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(hidden_states=latents, **inputs, **arguments)
        return counter.get_total_flops()

    assert counted(memory_frames + 3, layout=layout) == flops.whole.total
    assert counted(memory_frames, layout=layout.only({"memory"}), cache=cache) == flops.prefill.total
    assert counted(3, layout=layout, cache=cache) == flops.read.total
    assert (flops.prefill.tokens, flops.read.tokens) == (6 * memory_frames, 18)


def test_cached_memory_of_ten_frames_costs_at_most_a_quarter_more_at_the_published_size() -> None:
    size = {"height": 60, "width": 104, "text_tokens": 512}
    flops = cached_flops(A14B, memory_frames=10, slots=21, **size)
    without = forward_flops(A14B, slots=21, **size).total
    assert flops.read.total / without <= 1.25
    assert forward_flops(A14B, slots=31, **size).total / without > 1.8  # the published mode
    # A shot is 40 steps with two passes each; both experts prefill.
    assert (80 * flops.read.total + 2 * flops.prefill.total) / (80 * without) < 1.26
    assert cached_flops(A14B, memory_frames=0, slots=21, **size).whole.total == without
