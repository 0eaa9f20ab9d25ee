"""What the text encoder reads of a text: where the text is truncated, and which words the encoder does not know."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from storymem.config import closest
from storymem.io import read_text, text_lines
from storymem.wan.places import component_path
from storymem.wan.settings import ModelSettings
from storymem.weights import MissingWeights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A file beside the tokenizer of a model that was trained on few words: all of them, one a line.
KNOWN_WORDS = "known_words.txt"

_WORD = r"[^\W_]+(?:['’-][^\W_]+)*"


def known_words(model: ModelSettings) -> frozenset[str] | None:
    """All words of a model that was trained on few; None for others, and where its weights are not on this machine."""
    folder = _tokenizer_of(model)
    if folder is None or not (folder / KNOWN_WORDS).exists():
        return None
    return frozenset(text_lines(read_text(folder / KNOWN_WORDS))) or None


def _tokenizer_of(model: ModelSettings) -> Path | None:
    """The folder of a model's tokenizer; None if its weights are random, or not on this machine."""
    try:
        folder = None if model.weights is None else component_path(model, "tokenizer")
    except MissingWeights:
        return None
    return folder if folder is not None and folder.is_dir() else None


class Reading(NamedTuple):
    """How a text is read: its tokens with the end token, the part that is truncated, and the unknown words."""

    tokens: int
    cut: str
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class TextReader:
    """Reads texts as the pipeline's text encoder does.

    Args:
        limit: tokens that are read, the end token among them.
        words: all words the model was trained on; None: it was trained on all kinds of text.
    """

    tokenizer: PreTrainedTokenizerBase
    limit: int
    words: frozenset[str] | None = None

    @classmethod
    def of(cls, model: ModelSettings) -> TextReader | None:
        """The reader of a model, None if its tokenizer is not on this machine; FileError if that is damaged."""
        if model.weights is None:
            from transformers import ByT5Tokenizer

            return cls(ByT5Tokenizer(), model.network.text_tokens)
        if _tokenizer_of(model) is None:
            return None
        from storymem.wan.components import load_component

        return cls(load_component(model, "tokenizer"), model.network.text_tokens, known_words(model))

    def read(self, text: str) -> Reading:
        """How ``text`` is read."""
        from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean

        text = prompt_clean(text)
        ids = self.tokenizer(text, verbose=False).input_ids
        return Reading(len(ids), self._cut(text, ids), tuple(self._unknown(text)))

    def nearest(self, word: str) -> str | None:
        """The known word most like ``word``."""
        alike = [form for known, form in self._forms.items() if known[0] == word[0].lower()]
        return closest(word, alike, cutoff=0.7)

    @cached_property
    def _forms(self) -> dict[str, str]:
        """The known words by their lower case, in order."""
        return {word.lower(): word for word in sorted(self.words or ()) if word}

    def _cut(self, text: str, ids: list[int]) -> str:
        """The words that are not read whole."""
        if len(ids) <= self.limit:
            return ""
        first = self.limit - 1  # of the tokens that are cut; the last one read is the end
        if self.tokenizer.is_fast:
            start = self.tokenizer(text, return_offsets_mapping=True, verbose=False).offset_mapping[first][0]
        else:
            rest = self.tokenizer.decode(ids[first:-1]).strip()
            start = text.rfind(rest)
            if start < 0:
                return rest
        begin = text.rfind(" ", 0, start + 1) + 1  # of the word, in languages that have spaces
        return text[begin if start - begin < 30 else start :]

    def _unknown(self, text: str) -> dict[str, None]:
        pieces = dict.fromkeys(re.findall(rf"{_WORD}|[^\w\s]|_", text))
        return {piece: None for piece in pieces if not self._knows(piece)}

    def _knows(self, piece: str) -> bool:
        if self.words is not None and re.fullmatch(_WORD, piece) and piece.lower() not in self._forms:
            return False
        unknown = self.tokenizer.unk_token_id
        return unknown is None or unknown not in self.tokenizer(piece, add_special_tokens=False).input_ids
