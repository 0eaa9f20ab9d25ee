"""Intervals and tests, against SciPy and against what must be so."""

from __future__ import annotations

import numpy as np
import pytest

from storymem.evaluation.statistics import (
    StatisticsSettings,
    bootstrap_interval,
    compare,
    permutation_test,
    sign_test,
)

SETTINGS = StatisticsSettings()


def values(count: int, *, shift: float = 0.0, seed: int = 0) -> list[float]:
    return (np.random.default_rng(seed).normal(size=count) + shift).tolist()


def test_the_interval_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    data = values(30, shift=2)
    theirs = stats.bootstrap((data,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert bootstrap_interval(data, SETTINGS) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    settings = StatisticsSettings(resamples=400)
    intervals = [bootstrap_interval(values(30, seed=seed), settings) for seed in range(300)]
    covered = np.mean([low <= 0 <= high for low, high in filter(None, intervals)])
    assert 0.90 <= covered <= 0.98


def test_the_same_values_give_the_same_interval() -> None:
    assert bootstrap_interval(values(10), SETTINGS) == bootstrap_interval(values(10), SETTINGS)
    assert bootstrap_interval(values(10), SETTINGS) != bootstrap_interval(values(10), StatisticsSettings(seed=1))
    assert bootstrap_interval([0.5], SETTINGS) is None
    assert bootstrap_interval([0.5, 0.5, 0.5], SETTINGS) == (0.5, 0.5)


@pytest.mark.parametrize("signs", ["+++++", "++++-", "+-", "++++++++++++++++++++++++-----", "-", "000", "++0-0"])
def test_the_sign_test_is_scipys_binomial_test(signs: str) -> None:
    stats = pytest.importorskip("scipy.stats")
    differences = [{"+": 0.3, "-": -0.2, "0": 0.0}[sign] for sign in signs]
    n = len(signs.replace("0", ""))
    theirs = stats.binomtest(signs.count("+"), n).pvalue if n else 1.0
    assert sign_test(differences) == pytest.approx(theirs)


@pytest.mark.parametrize("count", [2, 7, 12])
def test_few_stories_are_permuted_exactly(count: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    differences = values(count, shift=0.5, seed=count)
    theirs = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert permutation_test(differences, SETTINGS) == pytest.approx(theirs)


def test_many_stories_are_permuted_at_random() -> None:
    stats = pytest.importorskip("scipy.stats")
    differences = values(30, shift=0.4)
    theirs = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=1
    ).pvalue
    assert permutation_test(differences, SETTINGS) == pytest.approx(theirs, abs=0.01)
    assert permutation_test([1.0] * 30, SETTINGS) == pytest.approx(1 / 10_001)


def test_a_comparison_is_paired() -> None:
    base = values(12)
    found = compare(base, [value + 0.01 for value in base], SETTINGS)
    assert found is not None
    assert (found.stories, found.wins, found.losses) == (12, 12, 0)
    assert found.difference == pytest.approx(0.01)
    assert found.interval == pytest.approx((0.01, 0.01))
    assert found.sign_p == found.permutation_p == pytest.approx(2 / 2**12)


def test_equal_systems_do_not_differ() -> None:
    found = compare(values(9), values(9), SETTINGS)
    assert found is not None
    assert (found.wins, found.losses, found.sign_p, found.permutation_p) == (0, 0, 1.0, 1.0)


def test_the_papers_relative_gain() -> None:
    found = compare([0.3934] * 3, [0.5065] * 3, SETTINGS)
    assert found is not None
    assert found.relative == pytest.approx(0.287, abs=5e-4)
    none = compare([-0.1], [0.1], SETTINGS)
    assert none is not None
    assert none.relative is None
    assert compare([], [], SETTINGS) is None


def test_settings_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer than 100"):
        StatisticsSettings(resamples=10)
    with pytest.raises(ValueError, match="write a share"):
        StatisticsSettings(level=95)
    with pytest.raises(ValueError, match="paired"):
        compare([1.0], [1.0, 2.0], SETTINGS)
