"""Floating-point operations of a forward of the denoiser, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Operations (a multiply-add counts as two) of one forward of ``WanTransformer3DModel`` at batch size 1.

    ``linear`` grows with the number of tokens, ``attention`` (self-attention) with its square.
    """

    tokens: int
    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention


@dataclass(frozen=True, kw_only=True)
class CachedFlops:
    """Operations of the ``cached`` memory mode.

    Args:
        prefill: the forward of the memory alone, once for each expert in a shot.
        read: a forward of the video alone, which reads what the prefill kept.
        whole: a forward of both, where nothing is kept.
    """

    prefill: ForwardFlops
    read: ForwardFlops
    whole: ForwardFlops


def forward_flops(
    transformer: Mapping[str, Any],
    *,
    slots: int,
    height: int,
    width: int,
    text_tokens: int,
    in_channels: int = 36,
) -> ForwardFlops:
    """Operations of a forward on latents [in_channels, slots, height, width].

    Args:
        transformer: the arguments or the config of a ``WanTransformer3DModel``.
        slots: latent frames, memory included: M + T.
        height: of the latents (pixels / 8).
        width: of the latents (pixels / 8).
        text_tokens: length of the padded prompt.
        in_channels: channels of the input; 36 with a condition, 16 for text-to-video.
    """
    tokens = _tokens(transformer, slots, height, width)
    return _flops(transformer, video=tokens, pairs=tokens * tokens, text_tokens=text_tokens, in_channels=in_channels)


def cached_flops(
    transformer: Mapping[str, Any],
    *,
    memory_frames: int,
    slots: int,
    height: int,
    width: int,
    text_tokens: int,
) -> CachedFlops:
    """Operations of the ``cached`` memory mode (:mod:`storymem.wan.segments`).

    Args:
        memory_frames: M.
        slots: T, latent frames of the shot alone.

    The other arguments are those of :func:`forward_flops`.
    """
    memory, video = (_tokens(transformer, count, height, width) for count in (memory_frames, slots))
    own, read = memory * memory, video * (memory + video)
    return CachedFlops(
        prefill=_flops(transformer, memory=memory, pairs=own, text_tokens=text_tokens),
        read=_flops(transformer, video=video, pairs=read, text_tokens=text_tokens),
        whole=_flops(
            transformer,
            memory=memory,
            video=video,
            pairs=own + read,
            text_tokens=text_tokens,
            timesteps=2 if memory else 1,
        ),
    )


def _tokens(transformer: Mapping[str, Any], slots: int, height: int, width: int) -> int:
    p_t, p_h, p_w = transformer.get("patch_size", (1, 2, 2))
    return (slots // p_t) * (height // p_h) * (width // p_w)


def _flops(
    transformer: Mapping[str, Any],
    *,
    pairs: int,
    text_tokens: int,
    video: int = 0,
    memory: int = 0,
    in_channels: int = 36,
    timesteps: int = 1,
) -> ForwardFlops:
    """Of a forward of ``video`` tokens and ``memory`` tokens, which skip the text; ``pairs`` of query and key meet."""
    tokens, patch = video + memory, math.prod(transformer.get("patch_size", (1, 2, 2)))
    dim = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    layers, ffn = transformer["num_layers"], transformer["ffn_dim"]
    # Self-attention's q, k, v, o and the feed-forward network see every token.
    block = tokens * (4 * dim * dim + 2 * dim * ffn)
    if video:  # cross-attention's q and o see these; its k and v see the text
        block += (video + text_tokens) * 2 * dim * dim + 2 * video * text_tokens * dim
    embeddings = (
        tokens * dim * patch * (in_channels + transformer.get("out_channels", 16))
        + (text_tokens if video else 0) * (transformer["text_dim"] * dim + dim * dim)
        + timesteps * (transformer["freq_dim"] * dim + dim * dim + 6 * dim * dim)
    )
    return ForwardFlops(
        tokens=tokens,
        linear=2 * (layers * block + embeddings),
        attention=2 * layers * 2 * pairs * dim,
    )
