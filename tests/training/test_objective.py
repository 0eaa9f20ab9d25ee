"""Flow matching: against diffusers' own scheduler, by its invariants, and as the pipeline will use what is learnt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from storymem.training.objectives.flow import (
    bin_sums,
    mask_weights,
    noise_level,
    noised,
    shifted,
    slot_weights,
    unshifted,
)
from storymem.training.objectives.memory import MemoryBatch, MemoryObjective
from storymem.training.objectives.settings import MemoryObjectiveSettings
from storymem.wan.conditioning import condition_channels
from storymem.wan.segments import memory_cached, memory_joint, with_given
from tests.training.tiny import Recorder, expert


def test_shift_and_noise_are_those_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=4.0)
    u = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(shifted(u, 4.0), scheduler.sigmas, rtol=1e-5, atol=1e-6)
    x0, noise = torch.randn(2, 1, 16, 3, 4, 4)
    at = torch.tensor([123])
    theirs = scheduler.scale_noise(x0, scheduler.timesteps[at], noise)
    mine = noised(x0, noise, scheduler.sigmas[at][:, None].expand(-1, 3))
    torch.testing.assert_close(mine, theirs)


def test_velocity_leads_from_any_level_to_data_and_to_noise() -> None:
    x0, noise = torch.randn(2, 2, 16, 3, 4, 4)
    s = torch.tensor([[0.3, 0.3, 0.3], [0.8, 0.8, 0.8]])
    x, v, level = noised(x0, noise, s), noise - x0, s[:, None, :, None, None]
    torch.testing.assert_close(x - level * v, x0)
    torch.testing.assert_close(x + (1 - level) * v, noise)


def test_each_slot_may_have_its_own_level() -> None:
    x0, noise = torch.randn(2, 1, 16, 3, 4, 4)
    x = noised(x0, noise, torch.tensor([[0.0, 1.0, 0.5]]))
    assert torch.equal(x[:, :, 0], x0[:, :, 0])
    assert torch.equal(x[:, :, 1], noise[:, :, 1])


@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_levels_lie_in_the_experts_range_and_share_out_the_whole(shift: float) -> None:
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1].float()
    high = noise_level(u, expert="high_noise", boundary=0.9, shift=shift)
    low = noise_level(u, expert="low_noise", boundary=0.9, shift=shift)
    assert high.min() == pytest.approx(0.9)
    assert bool((high >= 0.9).all())
    assert bool((low < 0.9).all())
    assert low.min() == 0
    # Together, in the shares that the shifted uniform gives them, they are the shifted uniform.
    edge = unshifted(0.9, shift)
    whole = shifted(u, shift)
    for level in (0.2, 0.5, 0.85, 0.95):
        parts = edge * (low < level).float().mean() + (1 - edge) * (high < level).float().mean()
        assert parts.item() == pytest.approx((whole < level).float().mean().item(), abs=1e-3)


def test_weights_of_slots() -> None:
    assert slot_weights(memory_joint(2, 3), 1.0).tolist() == pytest.approx([0.2] * 5)
    assert slot_weights(memory_joint(2, 3), 0.0).tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])
    assert slot_weights(memory_joint(2, 2), 0.5).tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3])
    assert slot_weights(with_given(memory_cached(1, 3), 1), 0.0).tolist() == pytest.approx([0, 0, 0.5, 0.5])


def test_bins() -> None:
    sums, counts = bin_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.05, 0.99, 1.0]), 10)
    assert sums.tolist() == [1, *[0] * 8, 6]
    assert counts.tolist() == [1, *[0] * 8, 2]


def test_weights_of_places() -> None:
    mask = torch.tensor([[[[1.0, 0.5, 0.0, 0.0]]], [[[1.0, 1.0, 1.0, 1.0]]]])
    weights = mask_weights(mask, 4.0)
    torch.testing.assert_close(weights.mean(dim=(1, 2, 3)), torch.ones(2))
    torch.testing.assert_close(weights[0] / weights[0, 0, 0, 3], torch.tensor([[[4.0, 2.5, 1.0, 1.0]]]))
    assert torch.equal(mask_weights(mask, 1.0), torch.ones_like(mask))


def batch(memory_frames: int) -> MemoryBatch:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 16, memory_frames + 3, 4, 6, generator=generator)
    memory = x0[:, :, :memory_frames] if memory_frames else None
    return MemoryBatch(
        x0=x0,
        noise=noise,
        u=torch.tensor([0.2, 0.7]),
        condition=condition_channels(memory, torch.zeros(2, 16, 3, 4, 6), 0),
        mask=(torch.arange(6) < 2).float().expand(2, 3, 4, 6),
        text=torch.randn(2, 16, 16, generator=generator),
        memory_frames=memory_frames,
        ids=("a", "b"),
    )


def test_the_network_sees_what_generation_shows_it() -> None:
    network, of = Recorder(), batch(2)
    objective = MemoryObjective(settings=MemoryObjectiveSettings(shift=4.0), boundary=0.9, rope_stride=5)
    losses = objective(network, "high_noise", of)
    x, timestep, text, layout = network.seen
    s = noise_level(of.u, expert="high_noise", boundary=0.9, shift=4.0)
    assert layout == memory_joint(2, 3, 5)
    assert torch.equal(timestep, s * 1000)
    assert torch.equal(x[:, 16:], of.condition)
    # Memory slots are noise as well.
    torch.testing.assert_close(x[0, :16], (1 - s[0]) * of.x0[0] + s[0] * of.noise[0])
    assert torch.equal(text, of.text)
    expected = (of.noise - of.x0).square().mean()
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("memory_frames", [0, 2])
def test_what_is_logged_adds_up(memory_frames: int) -> None:
    network, of = Recorder(), batch(memory_frames)
    objective = MemoryObjective(
        settings=MemoryObjectiveSettings(memory_weight=0.5, bins=4), boundary=0.9, rope_stride=5
    )
    losses = objective(network, "low_noise", of)
    means = {name: (total / count).item() for name, (total, count) in losses.sums.items() if total.ndim == 0}
    assert means["loss"] == means["loss_low_noise"] == pytest.approx(losses.total.item())
    assert means["memory_frames"] == memory_frames
    if memory_frames:
        expected = (3 * means["loss_video"] + 2 * 0.5 * means["loss_memory"]) / 4
        assert means["loss"] == pytest.approx(expected, rel=1e-5)
    by_level, counts = losses.sums["loss_by_level"]
    assert counts.sum() == 2
    assert by_level.sum().item() == pytest.approx(losses.sums["loss"][0].item())


@pytest.mark.parametrize("memory_frames", [0, 2])
def test_the_subject_has_more_weight_and_a_loss_of_its_own(memory_frames: int) -> None:
    network, of = Recorder(), batch(memory_frames)
    settings = MemoryObjectiveSettings(memory_weight=0.5, mask_weight=3.0)
    losses = MemoryObjective(settings=settings, boundary=0.9, rope_stride=5)(network, "low_noise", of)
    errors = (of.noise - of.x0).square().mean(dim=1)
    memory, video = errors[:, :memory_frames], errors[:, memory_frames:]
    weighted = (3 * video[..., :2].sum() + video[..., 2:].sum()) / (3 * 2 + 4) * 6 / 24
    expected = (weighted + 0.5 * memory.mean(dim=(2, 3)).sum()) / 2 / (3 + 0.5 * memory_frames)
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-5)
    means = {name: (total / count).item() for name, (total, count) in losses.sums.items() if total.ndim == 0}
    assert means["loss_subject"] == pytest.approx(video[..., :2].mean().item(), rel=1e-5)
    assert means["loss_video"] == pytest.approx(video.mean().item(), rel=1e-5)


def test_samples_without_a_mask_count_as_before() -> None:
    network, of = Recorder(), replace(batch(2), mask=torch.zeros(2, 3, 4, 6))
    plain, weighted = (
        MemoryObjective(settings=MemoryObjectiveSettings(mask_weight=w), boundary=0.9, rope_stride=5)(
            network, "low_noise", of
        )
        for w in (1.0, 3.0)
    )
    assert weighted.total.item() == pytest.approx(plain.total.item(), rel=1e-6)
    assert weighted.sums["loss_subject"][1] == 0


def test_memory_changes_what_is_predicted() -> None:
    network, of = expert(), batch(2)
    objective = MemoryObjective(settings=MemoryObjectiveSettings(), boundary=0.9, rope_stride=5)
    near = MemoryObjective(settings=MemoryObjectiveSettings(), boundary=0.9, rope_stride=1)
    with torch.no_grad():
        first, again, elsewhere = (fn(network, "high_noise", of).total.item() for fn in (objective, objective, near))
    assert first == again
    assert first != elsewhere
