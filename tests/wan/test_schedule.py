"""The published sampler's timesteps and sigmas, beside the original's and beside diffusers'."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from safetensors import safe_open

import storymem
from storymem.wan.schedule import WanUniPCScheduler, published_sigmas, wan_scheduler
from tests.references import folders_with, label

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(
    "folder", [f for f in folders_with("case.json") if "rope_stride" in (f / "case.json").read_text()], ids=label
)
def test_timesteps_are_those_of_the_reference(folder: Path) -> None:
    case = json.loads((folder / "case.json").read_text())
    with safe_open(folder / "tensors.safetensors", "pt") as file:
        expected = file.get_tensor("timesteps")
    scheduler = wan_scheduler(case["shift"])
    scheduler.set_timesteps(case["steps"])
    assert scheduler.timesteps.tolist() == expected.tolist()


@pytest.mark.parametrize(("steps", "shift"), [(40, 4.0), (40, 12.0), (8, 4.0), (1, 5.0)])
def test_sigmas_follow_the_formula(steps: int, shift: float) -> None:
    scheduler = wan_scheduler(shift)
    scheduler.set_timesteps(steps)
    s = np.linspace(0.999, 0, steps + 1)[:-1]
    expected = shift * s / (1 + (shift - 1) * s)
    np.testing.assert_allclose(scheduler.sigmas[:-1].numpy(), expected, rtol=1e-6)
    assert scheduler.sigmas[-1] == 0
    assert scheduler.timesteps.tolist() == (expected * 1000).astype(int).tolist()


def test_it_steps_as_diffusers_on_the_same_sigmas() -> None:
    ours, theirs = wan_scheduler(4.0), UniPCMultistepScheduler(**FLOW, flow_shift=4.0)
    ours.set_timesteps(6)
    theirs.set_timesteps(sigmas=published_sigmas(6))
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    generator = torch.Generator().manual_seed(0)
    x = y = torch.randn(1, 16, 2, 2, 2, generator=generator)
    for timestep in ours.timesteps:
        flow = torch.randn(x.shape, generator=generator)
        x = ours.step(flow, timestep, x, return_dict=False)[0]
        y = theirs.step(flow, timestep, y, return_dict=False)[0]
        assert torch.equal(x, y)


def test_a_straight_flow_is_followed_exactly() -> None:
    """x_s = (1 - s) x0 + s e has the velocity e - x0 everywhere, so any number of steps must end at x0."""
    clean, noise = torch.randn(2, 1, 16, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler = wan_scheduler(4.0)
    scheduler.set_timesteps(5)
    start = scheduler.sigmas[0]
    x = (1 - start) * clean + start * noise
    for timestep in scheduler.timesteps:
        x = scheduler.step(noise - clean, timestep, x, return_dict=False)[0]
    torch.testing.assert_close(x, clean, rtol=1e-4, atol=1e-4)


def test_sigmas_may_be_given() -> None:
    scheduler = wan_scheduler(1.0)
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.25])
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [0.9, 0.5, 0.25, 0], rtol=1e-6)


def test_it_is_saved_and_loaded_with_its_shift(tmp_path: Path) -> None:
    scheduler = wan_scheduler(12.0)
    scheduler.save_pretrained(tmp_path)
    for again in (WanUniPCScheduler.from_pretrained(tmp_path), WanUniPCScheduler.from_config(scheduler.config)):
        scheduler.set_timesteps(10)
        again.set_timesteps(10)
        assert type(again) is WanUniPCScheduler
        assert torch.equal(again.sigmas, scheduler.sigmas)
    assert storymem.WanUniPCScheduler is WanUniPCScheduler


def test_a_stock_schedulers_config_keeps_its_shift() -> None:
    stock = UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
    ours, expected = WanUniPCScheduler.from_config(stock.config), wan_scheduler(3.0)
    ours.set_timesteps(4)
    expected.set_timesteps(4)
    assert torch.equal(ours.sigmas, expected.sigmas)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be 1 or more, not 0"):
        wan_scheduler().set_timesteps(0)
    for shift in (0.0, -4.0):
        with pytest.raises(ValueError, match=f"shift must be positive, not {shift}"):
            wan_scheduler(shift)


# Euler, for step-distilled adapters


def test_four_euler_steps_are_those_of_the_published_adapters() -> None:
    euler = wan_scheduler(5.0, "euler")
    euler.set_timesteps(4)
    # Given by the authors of Wan2.2-Lightning as the timesteps of their training.
    np.testing.assert_allclose(euler.timesteps.numpy(), [1000.0, 937.5001, 833.3333, 625.0], atol=1e-3)
    assert euler.sigmas[-1] == 0


def test_an_euler_step_goes_straight_to_the_next_level() -> None:
    euler, x, v = wan_scheduler(5.0, "euler"), torch.randn(2, 3), torch.randn(2, 3)
    euler.set_timesteps(4)
    stepped = euler.step(v, euler.timesteps[0], x, return_dict=False)[0]
    torch.testing.assert_close(stepped, x + (0.9375 - 1.0) * v)


def test_the_euler_scheduler_is_saved_and_loaded(tmp_path: Path) -> None:
    wan_scheduler(5.0, "euler").save_pretrained(tmp_path)
    again = storymem.WanEulerScheduler.from_pretrained(tmp_path)
    again.set_timesteps(2)
    np.testing.assert_allclose(again.timesteps.numpy(), [1000.0, 2500 / 3], rtol=1e-6)
    with pytest.raises(ValueError, match=r"shift must be positive, not -1\.0"):
        wan_scheduler(-1.0, "euler")
