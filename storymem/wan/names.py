"""Names of a Wan transformer's parts: diffusers' own, and those of the original network, which most files use."""

from __future__ import annotations

from typing import Any

from storymem.wan.spec import Expert

#: The attribute of a diffusers pipeline that holds each expert; also the prefix of its keys in a file for both.
COMPONENTS: dict[Expert, str] = {"high_noise": "transformer", "low_noise": "transformer_2"}

#: The ten linears of a block that a memory adapter changes: the original name and diffusers' name.
ADAPTED_LINEARS: dict[str, str] = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_OTHERS_IN_A_BLOCK = {
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "norm3": "norm2",
    "modulation": "scale_shift_table",
}
_OUTSIDE = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_ORIGINAL_IN_A_BLOCK = {ours: original for original, ours in (ADAPTED_LINEARS | _OTHERS_IN_A_BLOCK).items()}
_ORIGINAL_OUTSIDE = {ours: original for original, ours in _OUTSIDE.items()}


def experts_of(pipe: Any) -> dict[Expert, Any]:
    """The transformers of a pipeline, of which one may be absent; a ``ValueError`` if both are."""
    experts = {expert: getattr(pipe, name, None) for expert, name in COMPONENTS.items()}
    present = {expert: transformer for expert, transformer in experts.items() if transformer is not None}
    if not present:
        raise ValueError(f"{type(pipe).__name__} has neither a transformer nor a transformer_2 to adapt")
    return present


def original_name(name: str) -> str:
    """The original name of a module or table: ``blocks.0.attn1.to_q`` -> ``blocks.0.self_attn.q``."""
    if name.startswith("blocks."):
        _, block, inside = name.split(".", 2)
        return f"blocks.{block}.{_ORIGINAL_IN_A_BLOCK.get(inside, inside)}"
    return _ORIGINAL_OUTSIDE.get(name, name)
