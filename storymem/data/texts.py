"""Prompt embeds of a text, as a cache holds them; without the readers of videos, so that training needs none."""

from __future__ import annotations

from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from storymem.io import check_finite
from storymem.wan.pipeline import WanMemoryToVideoPipeline

NOT_FINITE = "its weights are damaged, or too large for their dtype: write model.dtype=float32 model.vae_dtype=float32"


def encode_text(pipe: WanMemoryToVideoPipeline, text: str, length: int) -> tuple[dict[str, Tensor], int]:
    """Prompt embeds of a text up to its last token, and how many tokens it has (those beyond ``length`` are cut).

    Raises:
        NotFiniteError: for NaN or infinity from the text encoder, naming the text.
    """
    embeds, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=length)
    rows = embeds[0].cpu()
    check_finite(rows, f"the text encoder's output for the caption {text[:80]!r}", NOT_FINITE)
    used = max(rows.abs().sum(dim=1).nonzero().flatten().tolist(), default=0) + 1  # padding follows
    return {"embeds": rows[:used].clone()}, len(pipe.tokenizer(prompt_clean(text), verbose=False).input_ids)
