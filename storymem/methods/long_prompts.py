"""Texts longer than the 77 tokens of CLIP for Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def encode_long_prompts(pipe: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings [N, 77 k, D] and pooled embeddings [N, P] of ``texts``, each in k parts of up to 75 tokens.

    A part has a start and an end token of its own; shorter texts get empty parts. Of texts that fit into one part these
    are the embeddings of ``StableDiffusionXLPipeline.encode_prompt``. Pooled are those of the first part.
    """
    ids = [
        [tokenizer(text, add_special_tokens=False, truncation=False).input_ids for text in texts]
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
    ]
    room = pipe.tokenizer.model_max_length - 2
    parts = max(1, max(-(-len(one) // room) for of_tokenizer in ids for one in of_tokenizer))
    embeds, pooled = [], torch.empty(0)
    for tokenizer, encoder, of_tokenizer in zip(
        (pipe.tokenizer, pipe.tokenizer_2), (pipe.text_encoder, pipe.text_encoder_2), ids, strict=True
    ):
        of_parts = []
        for part in range(parts):
            tokens = [_framed(tokenizer, one[part * room : (part + 1) * room], room + 2) for one in of_tokenizer]
            found = encoder(torch.tensor(tokens, device=pipe._execution_device), output_hidden_states=True)
            of_parts.append(found.hidden_states[-2])
            if part == 0:
                pooled = found[0]  # of the second encoder, which is the last here
        embeds.append(torch.cat(of_parts, dim=1))
    return torch.cat(embeds, dim=-1), pooled


def _framed(tokenizer: Any, tokens: list[int], length: int) -> list[int]:
    framed = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
    return framed + [tokenizer.pad_token_id] * (length - len(framed))
