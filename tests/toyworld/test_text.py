"""The toy tokenizer and text encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, T5Tokenizer

from toyworld.text import TEXT_TOKENS, count_tokens, embed, load_tokenizer, seeded_text_encoder, train_tokenizer
from toyworld.world import HELD_OUT, story


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> T5Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, stories=150)
    return load_tokenizer(folder)


def held_out_prompts() -> list[str]:
    return [shot.prompt for seed in range(10) for shot in story(HELD_OUT + seed, looks=True).shots]


def test_auto_tokenizer_loads_it_back(tokenizer: T5Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for prompt in held_out_prompts():
        assert again(prompt).input_ids == tokenizer(prompt).input_ids


def test_prompts_fit_and_have_no_unknown_pieces(tokenizer: T5Tokenizer) -> None:
    prompts = held_out_prompts()
    assert count_tokens(tokenizer, prompts) <= TEXT_TOKENS
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(prompts).input_ids)


def test_tokens_say_the_prompt(tokenizer: T5Tokenizer) -> None:
    for prompt in held_out_prompts():
        assert tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True) == prompt


def test_most_words_are_one_token(tokenizer: T5Tokenizer) -> None:
    words = ["Ada", "walks", "in", "the", "desert", "at", "night"]
    assert len(tokenizer(" ".join(words)).input_ids) <= len(words) + 2


def test_embeddings_are_zero_beyond_the_prompt(tokenizer: T5Tokenizer) -> None:
    encoder = seeded_text_encoder(len(tokenizer))
    prompts = ["Ada waits on the moon.", ""]
    hidden = embed(tokenizer, encoder, prompts)
    assert hidden.shape == (2, TEXT_TOKENS, encoder.config.d_model)
    for row, ids in zip(hidden, tokenizer(prompts).input_ids, strict=True):
        assert (row[len(ids) :] == 0).all()
        assert (row[: len(ids)].abs().sum(-1) > 0).all()


def test_the_encoder_depends_on_its_seed_alone(tokenizer: T5Tokenizer) -> None:
    one, two, other = (seeded_text_encoder(len(tokenizer), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.shared.weight, two.shared.weight)
    assert not torch.equal(one.shared.weight, other.shared.weight)
