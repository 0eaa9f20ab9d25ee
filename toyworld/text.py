"""The toy text encoder: a small SentencePiece vocabulary of the world's sentences and a small UMT5 encoder."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from storymem.io import write_text
from storymem.wan.texts import KNOWN_WORDS
from toyworld.world import story

VOCABULARY = 320
TEXT_TOKENS = 80  # prompts are padded to this length; the longest with looks has 72 tokens


def world_sentences(stories: int) -> Iterable[str]:
    """Prompts of training stories, with looks (which holds the plain wording too)."""
    for seed in range(stories):
        for shot in story(seed, looks=True).shots:
            yield shot.prompt


def train_tokenizer(folder: Path, *, stories: int = 2000) -> T5Tokenizer:
    """Train a vocabulary and save it as a tokenizer that `AutoTokenizer` loads back.

    SentencePiece finds the pieces by byte-pair merging (its unigram trainer never proposes a whole word that shares
    no part with another); the tokenizer then takes the fewest pieces, so nearly every word is one token.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(world_sentences(stories)),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        num_threads=1,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    words = [(pieces.id_to_piece(i), -1.0) for i in range(3, pieces.vocab_size())]
    tokenizer = T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), *words],
        extra_ids=0,
        model_max_length=TEXT_TOKENS,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_known_words(folder: Path, *, stories: int = 300) -> None:
    """Write every word of the world's sentences beside a tokenizer; in 300 stories all occur."""
    words = {word for sentence in world_sentences(stories) for word in re.findall(r"[\w-]+", sentence)}
    once = {word for word in words if word.islower() or word.lower() not in words}
    write_text(folder / KNOWN_WORDS, "\n".join(sorted(once, key=str.lower)) + "\n")


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """A fresh encoder: 2 layers of width 128, which begin by looking at neighbours."""
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=64,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    _look_at_neighbours(encoder)
    return encoder


def _look_at_neighbours(encoder: UMT5EncoderModel) -> None:
    """Set the relative attention biases: of four heads one to the token before, one to the next, one backwards.

    Position decides which noun an adjective belongs to; biases that start at 0 are learnt last.
    """
    for block in encoder.encoder.block:
        bias = block.layer[0].SelfAttention.relative_attention_bias.weight.data  # [16 buckets, 4 heads]
        past = len(bias) // 2  # buckets of the same token and of those before it; then of those after it
        bias.zero_()
        bias[1, 0] = bias[past + 1, 1] = 5.0
        bias[:past, 2], bias[past:, 2] = -0.7 * torch.arange(past), -5.0


def tokens_of(tokenizer: T5Tokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids [B, 80], padded."""
    return tokenizer(
        list(prompts), padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def embed_tokens(encoder: UMT5EncoderModel, tokens: Tensor) -> Tensor:
    """Embeddings [B, 80, 128], zero beyond a prompt's end, as Wan's pipelines give them to the network."""
    tokens = tokens.to(encoder.device)
    mask = (tokens != encoder.config.pad_token_id).long()
    hidden = encoder(tokens, mask).last_hidden_state
    return hidden * mask[..., None].to(hidden.dtype)


def load_tokenizer(folder: Path) -> T5Tokenizer:
    """The tokenizer that `train_tokenizer` saved."""
    return T5Tokenizer.from_pretrained(folder)


class TextEmbedder:
    """A frozen text encoder with its tokenizer: texts to embeddings [B, 80, 128]; each text is tokenised once."""

    def __init__(self, tokenizer: T5Tokenizer, encoder: UMT5EncoderModel) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder.eval().requires_grad_(False)
        self._tokens: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embed texts on the encoder's device."""
        if new := list(set(texts) - set(self._tokens)):
            self._tokens.update(zip(new, tokens_of(self.tokenizer, new), strict=True))
        return embed_tokens(self.encoder, torch.stack([self._tokens[text] for text in texts]))
