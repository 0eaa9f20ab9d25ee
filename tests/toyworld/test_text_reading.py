"""The toy text encoder's schooling: what is asked, what prompts say, and that training teaches it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import T5Tokenizer

from toyworld.fitting import Run, Schedule
from toyworld.prompts import read_prompt
from toyworld.text import load_tokenizer, seeded_text_encoder, train_tokenizer
from toyworld.text_reading import (
    NOT_SAID,
    QUESTIONS,
    Reader,
    answers,
    draw_prompts,
    read_right,
    reading_loss,
    train_text_encoder,
)
from toyworld.world import HELD_OUT, story


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> T5Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, stories=150)
    return load_tokenizer(folder)


def test_a_prompt_with_looks_says_everything_and_a_plain_one_no_look() -> None:
    for seed in range(12):
        for looks in (False, True):
            shot = story(seed, shots=2, looks=looks).shots[0]
            told = {
                name: words[answer]
                for (name, words), answer in zip(QUESTIONS.items(), answers(shot, looks=looks), strict=True)
                if answer != NOT_SAID
            }
            said = read_prompt(shot.prompt)
            assert (told["place"], told["time"], told["framing"], told["action"]) == (
                said.place,
                said.time,
                said.framing,
                said.action,
            )
            assert ("first colour" in told, "flag" in told) == (looks, looks)
            assert ("second colour" in told) == (looks and len(shot.cast) == 2)
            if looks:
                assert f"{told['first shape']} {told['first colour']} creature" in shot.prompt
                assert f"a {told['flag']} flag" in shot.prompt


def test_prompts_depend_on_the_step_alone_and_half_of_them_say_looks() -> None:
    (prompts, told), (again, _), (others, _) = (draw_prompts(step, 32) for step in (3, 3, 4))
    assert prompts == again
    assert prompts != others
    assert sum("creature" in prompt for prompt in prompts) == 16
    assert sum("meet" in prompt or " and " in prompt for prompt in prompts) >= 4
    flag = list(QUESTIONS).index("flag")
    assert [bool(answer != NOT_SAID) for answer in told[:, flag]] == ["flag" in prompt for prompt in prompts]


def test_training_teaches_the_encoder_to_be_read(tokenizer: T5Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    reader, held_out = Reader(seeded_text_encoder(len(tokenizer))), draw_prompts(0, 48, start=HELD_OUT)
    table = reader.encoder.shared.weight.detach().clone()
    before = reading_loss(reader, tokenizer, *held_out).item()
    schedule = Schedule(steps=20, learning_rate=1e-2, warmup=5, ema=0.5, log_every=100)
    train_text_encoder(Run(tmp_path), schedule, reader, tokenizer, size=16, held_out=4)
    assert reading_loss(reader, tokenizer, *held_out).item() < before - 0.05
    assert not torch.equal(reader.encoder.shared.weight, table)


def test_the_share_of_right_answers_is_counted_over_prompts_that_answer(tokenizer: T5Tokenizer) -> None:
    reader = Reader(seeded_text_encoder(len(tokenizer)))
    for answer in reader.answers:
        torch.nn.init.zeros_(answer.weight)
        torch.nn.init.zeros_(answer.bias)
        answer.bias.data[1] = 1.0  # always the second answer
    right = read_right(reader, tokenizer, size=64)
    _, told = draw_prompts(0, 64, start=HELD_OUT)
    for name, answer in zip(QUESTIONS, told.unbind(1), strict=True):
        said = answer[answer != NOT_SAID]
        assert right[name] == pytest.approx((said == 1).float().mean().item())
