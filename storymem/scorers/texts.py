"""CLIP's tokenizer, with a count of what it cuts off."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch
from open_clip import SimpleTokenizer
from torch import Tensor

logger = logging.getLogger(__name__)


@cache  # reading the vocabulary takes longer than building a small model
def _tokenizer(context_length: int) -> SimpleTokenizer:
    return SimpleTokenizer(context_length=context_length)


class ClipTokenizer:
    """open_clip's byte-pair tokenizer at a fixed context length.

    A text beyond the context keeps its first tokens and the end-of-text token, in CLIP and in ViCLIP. What is
    cut no longer counts in any score, so it is counted here: `texts_truncated` of `texts_seen`.
    """

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self.texts_seen = 0
        self.texts_truncated = 0
        self._tokenizer = _tokenizer(context_length)

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text before truncation, start and end of text included."""
        return [len(self._tokenizer.encode(text)) + 2 for text in texts]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 [N, context_length], padded with 0; truncation is counted and warned of."""
        truncated = sum(count > self.context_length for count in self.token_counts(texts))
        self.texts_seen += len(texts)
        self.texts_truncated += truncated
        if truncated:
            logger.warning(
                "%d of %d texts are longer than %d tokens and were cut",
                truncated,
                len(texts),
                self.context_length,
            )
        return self._tokenizer(list(texts)) if texts else torch.zeros(0, self.context_length, dtype=torch.int64)
