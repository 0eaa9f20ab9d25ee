"""Intervals and paired tests: known values, and what must hold."""

from __future__ import annotations

import numpy as np
import pytest

from storymem.evaluation.statistics import StatisticsSettings, bootstrap_interval, compare

SETTINGS = StatisticsSettings()


def values(count: int, *, shift: float = 0.0, seed: int = 0) -> list[float]:
    return (np.random.default_rng(seed).normal(size=count) + shift).tolist()


def test_the_interval_covers_the_true_mean_about_as_often_as_its_level() -> None:
    settings = StatisticsSettings(resamples=400)
    intervals = [bootstrap_interval(values(30, seed=seed), settings) for seed in range(300)]
    covered = np.mean([low <= 0 <= high for low, high in filter(None, intervals)])
    assert 0.90 <= covered <= 0.98


def test_the_same_values_give_the_same_interval() -> None:
    assert bootstrap_interval(values(10), SETTINGS) == bootstrap_interval(values(10), SETTINGS)
    assert bootstrap_interval(values(10), SETTINGS) != bootstrap_interval(values(10), StatisticsSettings(seed=1))
    assert bootstrap_interval([0.5], SETTINGS) is None
    assert bootstrap_interval([0.5, 0.5, 0.5], SETTINGS) == (0.5, 0.5)


def test_a_comparison_is_paired() -> None:
    base = values(12)
    found = compare(base, [value + 0.01 for value in base], SETTINGS)
    assert found is not None
    assert (found.stories, found.wins, found.losses) == (12, 12, 0)
    assert found.difference == pytest.approx(0.01)
    assert found.interval == pytest.approx((0.01, 0.01))
    assert found.sign_p == found.permutation_p == pytest.approx(2 / 2**12), "exact for few stories"
    many = compare([0.0] * 30, [1.0] * 30, SETTINGS)
    assert many is not None
    assert many.permutation_p == pytest.approx(2 / 10_001), "both tails, and at least the one observed"


@pytest.mark.parametrize(
    ("differences", "sign_p", "permutation_p"),
    [
        ([0.3] * 5 + [-0.2], 2 * 7 / 64, 2 * 2 / 64),
        ([0.0, 0.0, 0.0], 1.0, 1.0),
        ([0.3, -0.2, 0.0], 1.0, 1.0),
        ([0.1], 1.0, 1.0),
    ],
)
def test_known_p_values(differences: list[float], sign_p: float, permutation_p: float) -> None:
    found = compare([0.0] * len(differences), differences, SETTINGS)
    assert found is not None
    assert found.sign_p == pytest.approx(sign_p)
    assert found.permutation_p == pytest.approx(permutation_p)


def test_the_papers_relative_gain() -> None:
    found, negative = compare([0.3934] * 3, [0.5065] * 3, SETTINGS), compare([-0.1], [0.1], SETTINGS)
    assert found is not None
    assert found.relative == pytest.approx(0.287, abs=5e-4)
    assert negative is not None
    assert negative.relative is None
    assert compare([], [], SETTINGS) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"resamples": 10}, "100 or more"), ({"level": 95}, "0.9999 or less"), ({"seed": -1}, "0 or more")],
)
def test_faulty_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StatisticsSettings(**settings)
