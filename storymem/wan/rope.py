"""Negative RoPE: memory slots get temporal positions before the shot (paper section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

DEFAULT_STRIDE = 5


def temporal_positions(memory_frames: int, video_slots: int, stride: int = DEFAULT_STRIDE) -> list[int]:
    """Temporal RoPE positions of all latent slots: (-M*S, ..., -2S, -S, 0, 1, ..., T-1).

    Args:
        memory_frames: M, the number of memory slots; each holds one frame.
        video_slots: T, the number of latent frames of the shot.
        stride: S, the distance between memory slots. The published adapters were trained with S = 5; S = 1 makes
            memory and shot contiguous.
    """
    if stride < 1:
        raise ValueError(f"the RoPE stride of the memory must be 1 or more, not {stride}")
    return [-stride * k for k in range(memory_frames, 0, -1)] + list(range(video_slots))


class MemoryRotaryPosEmbed(WanRotaryPosEmbed):
    """Wan's rotary embedding, told how many of the first latent slots are memory.

    ``memory_frames`` (M) and ``stride`` (S) are set by the pipeline or the training objective before a forward
    and concern the temporal axis alone; height and width are as in Wan. With M = 0 it is Wan's own embedding.
    """

    def __init__(
        self,
        attention_head_dim: int,
        patch_size: tuple[int, int, int],
        max_seq_len: int,
        theta: float = 10000.0,
    ) -> None:
        super().__init__(attention_head_dim, patch_size, max_seq_len, theta)
        self.memory_frames = 0
        self.stride = DEFAULT_STRIDE

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [1, tokens, 1, head_dim], for latents [B, C, M + T, h, w]."""
        cos, sin = super().forward(hidden_states)
        if self.memory_frames == 0:
            return cos, sin
        self.check_reach(self.memory_frames, self.stride)
        slots = hidden_states.shape[2] // self.patch_size[0]
        positions = temporal_positions(self.memory_frames, slots - self.memory_frames, self.stride)
        index = torch.tensor(positions, device=hidden_states.device)
        # Wan's table holds positions 0, 1, ...: cos(-x) = cos(x) and sin(-x) = -sin(x) give the negative ones.
        rows = index.abs()
        time_cos = self.freqs_cos[rows, : self.t_dim]
        time_sin = self.freqs_sin[rows, : self.t_dim] * index.sign().unsqueeze(1)
        return self._with_time(cos, time_cos, slots), self._with_time(sin, time_sin, slots)

    def check_reach(self, memory_frames: int, stride: int) -> None:
        """Raise ``ValueError`` if the oldest memory slot would lie outside this model's table of positions."""
        first = temporal_positions(memory_frames, 1, stride)[0]
        if -first >= self.max_seq_len:
            raise ValueError(
                f"{memory_frames} memory frames at RoPE stride {stride} reach position {first}; "
                f"this model's table ends at {self.max_seq_len - 1}: use fewer frames or a smaller stride"
            )

    def _with_time(self, table: Tensor, time: Tensor, slots: int) -> Tensor:
        """``table`` [1, slots * n, 1, D] with its temporal channels replaced by ``time`` [slots, t_dim]."""
        by_slot = table.unflatten(1, (slots, -1))
        time = time.to(table.dtype)[None, :, None, None, :].expand(*by_slot.shape[:-1], -1)
        return torch.cat([time, by_slot[..., self.t_dim :]], dim=-1).flatten(1, 2)


def install_memory_rope(transformer: Any) -> MemoryRotaryPosEmbed:
    """Give a ``WanTransformer3DModel`` the rotary embedding that knows memory; once is enough, twice is harmless."""
    rope = transformer.rope
    if isinstance(rope, MemoryRotaryPosEmbed):
        return rope
    # Built on the model's own device: its buffers are not in the checkpoint, so nothing else would move them.
    with torch.device(rope.freqs_cos.device):
        replacement = MemoryRotaryPosEmbed(rope.attention_head_dim, tuple(rope.patch_size), rope.max_seq_len)
    transformer.rope = replacement
    return replacement
