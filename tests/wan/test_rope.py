"""Negative RoPE: where memory slots lie in time."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from storymem.wan.loading import load_pipeline
from storymem.wan.rope import MemoryRotaryPosEmbed, install_memory_rope, temporal_positions
from tests.wan.tiny import CPU, settings

HEAD, TABLE = 24, 64


def rope(memory_frames: int, stride: int = 5) -> MemoryRotaryPosEmbed:
    made = MemoryRotaryPosEmbed(HEAD, (1, 2, 2), TABLE)
    made.memory_frames, made.stride = memory_frames, stride
    return made


def rotations(positions: list[int], channels: int) -> torch.Tensor:
    """exp(i * position * frequency), complex [positions, channels / 2], from the definition of RoPE."""
    frequencies = 10000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angles = torch.tensor(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def as_complex(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs of channels that turn together, complex [..., channels / 2]."""
    assert torch.equal(cos[..., 0::2], cos[..., 1::2])
    assert torch.equal(sin[..., 0::2], sin[..., 1::2])
    return torch.complex(cos[..., 0::2].double(), sin[..., 0::2].double())


@pytest.mark.parametrize(
    ("memory", "slots", "stride", "expected"),
    [
        (0, 3, 5, [0, 1, 2]),
        (1, 2, 5, [-5, 0, 1]),
        (3, 4, 5, [-15, -10, -5, 0, 1, 2, 3]),
        (3, 2, 1, [-3, -2, -1, 0, 1]),
        (2, 0, 7, [-14, -7]),
    ],
)
def test_positions(memory: int, slots: int, stride: int, expected: list[int]) -> None:
    assert temporal_positions(memory, slots, stride) == expected


@pytest.mark.parametrize("stride", [0, -5])
def test_a_stride_that_is_not_positive_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=f"1 or more, not {stride}"):
        temporal_positions(2, 3, stride)


@pytest.mark.parametrize("shape", [(1, 36, 3, 4, 6), (2, 36, 7, 2, 2)])
def test_without_memory_it_is_wans_own(shape: tuple[int, ...]) -> None:
    latents = torch.empty(shape)
    theirs = WanRotaryPosEmbed(HEAD, (1, 2, 2), TABLE)(latents)
    for ours, other in zip(rope(0)(latents), theirs, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize(("memory", "stride"), [(1, 5), (3, 5), (4, 1), (2, 13)])
def test_rotations_are_those_of_the_definition_on_all_three_axes(memory: int, stride: int) -> None:
    slots, rows, columns = memory + 3, 2, 3
    cos, sin = rope(memory, stride)(torch.empty(1, 36, slots, 2 * rows, 2 * columns))
    assert cos.shape == sin.shape == (1, slots * rows * columns, 1, HEAD)
    ours = as_complex(cos, sin).reshape(slots, rows, columns, HEAD // 2)

    side = 2 * (HEAD // 6)
    time = rotations([-stride * k for k in range(memory, 0, -1)] + [0, 1, 2], HEAD - 2 * side)
    height, width = rotations(list(range(rows)), side), rotations(list(range(columns)), side)
    expected = torch.cat(
        [
            time[:, None, None].expand(-1, rows, columns, -1),
            height[None, :, None].expand(slots, -1, columns, -1),
            width[None, None].expand(slots, rows, -1, -1),
        ],
        dim=-1,
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_a_query_sees_memory_at_its_distance_in_time() -> None:
    """q at slot t and k at a memory slot meet as q and k at distance t + S: RoPE is relative."""
    channels = HEAD - 4 * (HEAD // 6)  # the temporal ones
    cos, sin = rope(1, stride=5)(torch.empty(1, 36, 4, 2, 2))
    turned = as_complex(cos, sin)[0, :, 0, : channels // 2]
    cos, sin = rope(0)(torch.empty(1, 36, 9, 2, 2))
    plain = as_complex(cos, sin)[0, :, 0, : channels // 2]
    for t in range(3):
        torch.testing.assert_close(turned[1 + t] * turned[0].conj(), plain[t + 5], rtol=0, atol=1e-6)


def test_memory_beyond_the_table_is_refused() -> None:
    rope(7, stride=9)(torch.empty(1, 36, 8, 2, 2))  # reaches -63, the last row
    with pytest.raises(ValueError, match=r"8 memory frames at RoPE stride 8 reach position -64; .* ends at 63"):
        rope(8, stride=8)(torch.empty(1, 36, 9, 2, 2))


def test_installing_twice_is_harmless() -> None:
    transformer = load_pipeline(settings(), runtime=CPU, text_encoder=False).transformer
    first = install_memory_rope(transformer)
    first.memory_frames = 2
    assert install_memory_rope(transformer) is first is transformer.rope
    assert first.memory_frames == 2


def test_installing_keeps_shape_table_device_and_weights() -> None:
    from diffusers import WanTransformer3DModel

    arguments = settings().network.transformer | {"in_channels": 36, "rope_max_seq_len": 77}
    transformer = WanTransformer3DModel(**arguments)
    keys, table = list(transformer.state_dict()), transformer.rope.freqs_cos
    ours = install_memory_rope(transformer)
    assert (ours.max_seq_len, ours.patch_size) == (77, (1, 2, 2))
    assert torch.equal(ours.freqs_cos, table)
    assert ours.freqs_cos.dtype == table.dtype
    assert list(transformer.state_dict()) == keys, "the table is not part of a checkpoint"

    with torch.device("meta"):
        large = WanTransformer3DModel(**arguments)
    assert install_memory_rope(large).freqs_cos.device.type == "meta"
