"""CLIP's tokenizer, with its own or a smaller vocabulary, and a count of what it cuts off."""

from __future__ import annotations

import gzip
import hashlib
import logging
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Self

import torch
from open_clip import SimpleTokenizer
from torch import Tensor

from storymem.io import FileError, check_regular
from storymem.scorers.checkpoint import CheckpointError

logger = logging.getLogger(__name__)


VOCABULARY_FILE = "bpe_vocabulary.txt.gz"  # beside the weights of a network with fewer rows than CLIP's


_MAX_VOCABULARY = 16 << 20  # bytes when unpacked; CLIP's own has 3.2 million


@cache  # reading the vocabulary takes longer than building a small model
def _tokenizer(context_length: int, vocabulary: Path | None, content: str) -> SimpleTokenizer:
    """``content`` is the hash of the file, which may change."""
    if vocabulary is None:
        return SimpleTokenizer(context_length=context_length)
    return SimpleTokenizer(str(vocabulary), context_length=context_length)


def _checked(vocabulary: Path) -> str:
    """The hash of a vocabulary, once it is known to be text of a sensible size. Raises ``FileError``."""
    try:
        with gzip.open(check_regular(vocabulary)) as opened:
            content = opened.read(_MAX_VOCABULARY + 1)
        content.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise FileError(f"{vocabulary} is not a gzipped list of merges in UTF-8: {error}") from None
    if len(content) > _MAX_VOCABULARY:
        raise FileError(f"{vocabulary} unpacks to more than {_MAX_VOCABULARY:,} bytes; no vocabulary has as many")
    return hashlib.sha256(content).hexdigest()


class ClipTokenizer:
    """open_clip's byte-pair tokenizer at a fixed context length.

    vocabulary: a gzipped list of merges in the form of open_clip's own, which is the default; `vocab_size` is the
    number of ids it gives, 512 + merges + 2.

    A text beyond the context keeps its first tokens and the end-of-text token, in CLIP and in ViCLIP. What is
    cut no longer counts in any score, so it is counted here: `texts_truncated` of `texts_seen`.
    """

    def __init__(self, context_length: int, vocabulary: Path | None = None) -> None:
        self.context_length = context_length
        self.texts_seen = 0
        self.texts_truncated = 0
        self._tokenizer = _tokenizer(context_length, vocabulary, "" if vocabulary is None else _checked(vocabulary))
        self.vocab_size: int = self._tokenizer.eot_token_id + 1  # the last; merges written twice count twice

    @classmethod
    def from_folder(cls, folder: str | Path, context_length: int, rows: int) -> Self:
        """The tokenizer of a model's folder: by the vocabulary in it, or CLIP's where there is none.

        Raises:
            FileError: if the vocabulary is damaged.
            CheckpointError: if it gives more ids than the model has rows of embeddings (which may be padded).
        """
        path = Path(folder) / VOCABULARY_FILE
        has_own = path.exists()
        tokenizer = cls(context_length, path if has_own else None)
        if tokenizer.vocab_size > rows:
            whose = f"its {VOCABULARY_FILE}" if has_own else f"CLIP's vocabulary (it has no {VOCABULARY_FILE})"
            raise CheckpointError(f"the model in {folder} embeds {rows} tokens, but {whose} has {tokenizer.vocab_size}")
        return tokenizer

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
