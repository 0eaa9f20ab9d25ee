"""The training loop: resuming is seamless, the average is what is kept; Muon orthogonalises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from toyworld.fitting import Ema, Run, Schedule, averaged, fit
from toyworld.muon import Muon, orthogonalise


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6))


def loss_of(model: nn.Module):
    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        return (model(x) - x.flip(-1)).square().mean(), {}

    return loss


def trained(folder: Path, *steps: int, **settings: float) -> nn.Module:
    """A model trained in one go, or stopped and resumed at each of several step counts."""
    for count in steps:
        model = network()
        fit(model, Run(folder), Schedule(steps=count, warmup=5, learning_rate=0.02, **settings), loss_of(model))
    return model


def test_training_learns(tmp_path: Path) -> None:
    before = loss_of(fresh := network())(10_000, 1.0)[0]
    after = loss_of(trained(tmp_path, 200))(10_000, 1.0)[0]
    assert fresh is not None
    assert after < 0.2 * before


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Schedule, "rate", lambda self, step, progress: 0.01)
    whole, halves = trained(tmp_path / "a", 12), trained(tmp_path / "b", 5, 12)
    for one, two in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_averaged_weights_are_those_the_training_left(tmp_path: Path) -> None:
    model = trained(tmp_path, 8)
    again = averaged(Run(tmp_path), network())
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_a_stage_that_was_not_trained_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has not been trained"):
        averaged(Run(tmp_path / "vae"), network())


def test_swapping_twice_changes_nothing() -> None:
    model = network()
    ema = Ema(model, 0.9)
    nn.init.ones_(model[0].weight)
    before = [p.clone() for p in model.parameters()]
    ema.swap(model)
    assert not torch.equal(model[0].weight, before[0])
    ema.swap(model)
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(old, new)


def test_a_schedule_warms_up_and_anneals() -> None:
    schedule = Schedule(steps=1000, learning_rate=1.0, warmup=10)
    assert schedule.rate(0, 0.0) == pytest.approx(0.1)
    assert schedule.rate(500, 0.5) == pytest.approx(0.5)
    assert schedule.rate(999, 1.0) == pytest.approx(0.01)


@pytest.mark.parametrize("given", [{}, {"minutes": 1.0, "steps": 10}])
def test_a_schedule_has_one_length(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="either minutes or steps"):
        Schedule(**given)


def test_a_batch_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    model = network()
    before = [p.clone() for p in model.parameters()]
    fit(
        model, Run(tmp_path), Schedule(steps=2), lambda step, progress: (model(torch.full((1, 6), torch.nan)).sum(), {})
    )
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(old, new)


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_orthogonalising_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    """Against the singular value decomposition: the same directions, all lengths near one."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ orthogonalise(matrix) @ v.T
    assert (core.diag() > 0.5).all()
    assert (core.diag() < 1.4).all()
    assert (core - torch.diag(core.diag())).abs().max() < 0.08


def test_muon_steps_kernels_by_muon_and_the_rest_by_adam() -> None:
    model = nn.Sequential(nn.Conv3d(8, 8, 3), nn.Embedding(10, 8), nn.LayerNorm(8))
    kinds = {group["muon"]: [tuple(p.shape) for p in group["params"]] for group in Muon(model).param_groups}
    assert kinds[True] == [(8, 8, 3, 3, 3)]
    assert kinds[False] == [(8,), (10, 8), (8,), (8,)]


def test_muon_steps_a_shared_parameter_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert sum(len(group["params"]) for group in Muon(model).param_groups) == 1
