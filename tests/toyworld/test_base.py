"""Batches and loss of the base model's training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import T5Tokenizer

from storymem.wan.schedule import shifted, unshifted
from toyworld.base import (
    BOUNDARY,
    PEOPLE,
    RANGES,
    Denoiser,
    build_transformer,
    draw_batch,
    flow_loss,
    held_out_loss,
)
from toyworld.latents import LatentShots
from toyworld.text import seeded_text_encoder, train_tokenizer


@pytest.fixture(scope="module")
def data() -> LatentShots:
    rng = torch.Generator().manual_seed(0)
    return LatentShots(
        shots=torch.randn(6, 16, 5, 8, 12, generator=rng).half(),
        firsts=torch.randn(6, 16, 5, 8, 12, generator=rng).half(),
        blank=torch.randn(16, 5, 8, 12, generator=rng).half(),
        people=(torch.rand(6, 5, 8, 12, generator=rng) < 0.3).half(),
        prompts=[f"plain {i}" for i in range(6)],
        described=[f"with looks {i}" for i in range(6)],
    )


def test_the_shift_is_that_of_diffusers() -> None:
    levels = torch.linspace(1, 1 / 1000, 1000)
    foreign = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    torch.testing.assert_close(shifted(levels, 3.0), foreign.sigmas, rtol=1e-5, atol=1e-6)
    assert unshifted(float(shifted(torch.tensor(0.37), 3.0)), 3.0) == pytest.approx(0.37)


def test_a_step_always_draws_the_same_batch(data: LatentShots) -> None:
    one, two, other = (draw_batch(data, step, 8, (0.0, 1.0)) for step in (3, 3, 4))
    assert one.texts == two.texts
    for field in ("x0", "condition", "people", "noise", "levels"):
        assert torch.equal(getattr(one, field), getattr(two, field))
    assert not torch.equal(one.noise, other.noise)


@pytest.mark.parametrize("expert", ["base", "high", "low"])
def test_levels_stay_in_the_experts_range(data: LatentShots, expert: str) -> None:
    low, high = RANGES[expert]
    levels = torch.cat([draw_batch(data, step, 64, RANGES[expert]).levels for step in range(4)])
    assert levels.min() >= low - 1e-6
    assert levels.max() <= high + 1e-6
    assert levels.min() < low + 0.1
    assert levels.max() > high - 0.1
    assert RANGES["high"][0] == RANGES["low"][1] == BOUNDARY


def test_the_condition_is_a_first_frame_or_blank_and_the_mask_says_which(data: LatentShots) -> None:
    batch = draw_batch(data, 0, 64, (0.0, 1.0))
    assert batch.condition.shape == (64, 20, 5, 8, 12)
    mask, latents = batch.condition[:, :4], batch.condition[:, 4:]
    given = mask[:, :, 0].flatten(1).all(dim=1)
    assert 0.3 < given.float().mean() < 0.7
    assert (mask[:, :, 1:] == 0).all()
    assert (mask[~given] == 0).all()
    assert torch.equal(latents[~given], data.blank.float().expand(int((~given).sum()), -1, -1, -1, -1))
    firsts = {tuple(first.flatten()[:4].tolist()) for first in data.firsts.float()}
    assert all(tuple(row.flatten()[:4].tolist()) in firsts for row in latents[given])


def test_texts_are_plain_described_or_dropped(data: LatentShots) -> None:
    texts = [text for step in range(8) for text in draw_batch(data, step, 64, (0.0, 1.0)).texts]
    kinds = {kind: sum(text.startswith(kind) for text in texts) / len(texts) for kind in ("plain", "with looks")}
    assert kinds["plain"] == pytest.approx(0.45, abs=0.07)
    assert kinds["with looks"] == pytest.approx(0.45, abs=0.07)
    assert texts.count("") / len(texts) == pytest.approx(0.1, abs=0.05)


@pytest.fixture
def silent(tmp_path: Path) -> tuple[Denoiser, T5Tokenizer]:
    """A network that predicts nothing, and its tokenizer."""
    tokenizer = train_tokenizer(tmp_path, stories=20)
    model = Denoiser(build_transformer(), seeded_text_encoder(len(tokenizer)))
    torch.nn.init.zeros_(model.transformer.proj_out.weight)
    torch.nn.init.zeros_(model.transformer.proj_out.bias)
    return model, tokenizer


def test_the_loss_of_a_network_that_says_nothing_is_the_velocitys_power(
    data: LatentShots, silent: tuple[Denoiser, T5Tokenizer]
) -> None:
    batch = dataclasses.replace(draw_batch(data, 0, 4, (0.0, 1.0)), people=torch.zeros(4, 5, 8, 12))
    expected = (batch.noise - batch.x0).square().mean()
    torch.testing.assert_close(flow_loss(*silent, batch), expected)


def test_people_count_more_than_the_place(data: LatentShots, silent: tuple[Denoiser, T5Tokenizer]) -> None:
    batch = draw_batch(data, 0, 4, (0.0, 1.0))
    power = (batch.noise - batch.x0).square().mean(dim=1)
    weights = torch.where(batch.people > 0, PEOPLE, 1.0)
    torch.testing.assert_close(flow_loss(*silent, batch), (weights * power).sum() / weights.sum())


def test_the_held_out_loss_is_told_of_all_and_of_people(
    data: LatentShots, silent: tuple[Denoiser, T5Tokenizer]
) -> None:
    data = dataclasses.replace(data, people=torch.zeros_like(data.people).index_fill(1, torch.tensor([0]), 1))
    whole, people = held_out_loss(*silent, data, (0.0, 1.0), batches=1)
    batch = draw_batch(data, -1, 16, (0.0, 1.0))
    power = (batch.noise - batch.x0).square()
    assert whole == pytest.approx(float(power.mean()), rel=1e-4)
    assert people == pytest.approx(float(power[:, :, 0].mean()), rel=1e-4)


def test_at_full_noise_the_network_cannot_see_the_picture(data: LatentShots, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(tmp_path, stories=20)
    model = Denoiser(build_transformer(), seeded_text_encoder(len(tokenizer)))
    batch = dataclasses.replace(draw_batch(data, 0, 2, (0.0, 1.0)), levels=torch.ones(2))
    seen: list[torch.Tensor] = []
    model.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    flow_loss(model, tokenizer, batch)
    torch.testing.assert_close(seen[0][:, :16], batch.noise)
