"""Floating-point operations of a forward of the denoiser, from shapes alone."""

from __future__ import annotations

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
    p_t, p_h, p_w = transformer.get("patch_size", (1, 2, 2))
    patch = p_t * p_h * p_w
    tokens = (slots // p_t) * (height // p_h) * (width // p_w)
    dim = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    layers, ffn = transformer["num_layers"], transformer["ffn_dim"]
    # Self-attention's q, k, v, o and cross-attention's q, o see every token; its k, v see the text.
    block = tokens * (6 * dim * dim + 2 * dim * ffn) + text_tokens * 2 * dim * dim
    cross_attention = 2 * tokens * text_tokens * dim
    embeddings = (
        tokens * dim * patch * (in_channels + transformer.get("out_channels", 16))
        + text_tokens * (transformer["text_dim"] * dim + dim * dim)
        + transformer["freq_dim"] * dim
        + dim * dim
        + 6 * dim * dim
    )
    return ForwardFlops(
        tokens=tokens,
        linear=2 * (layers * (block + cross_attention) + embeddings),
        attention=2 * layers * 2 * tokens * tokens * dim,
    )
