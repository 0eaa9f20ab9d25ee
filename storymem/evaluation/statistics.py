"""Means over stories, how sure they are, and whether two systems differ. Everything random has a fixed seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from pydantic.dataclasses import dataclass as settings_class

from storymem.config import STRICT

_EXACT_FLIPS = 14  # up to so many stories all 2^n sign flips are tried


@settings_class(frozen=True, kw_only=True, config=STRICT)
class StatisticsSettings:
    """Resampling: how often, at which level, from which seed."""

    resamples: int = 10_000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise ValueError(f"resamples={self.resamples}: fewer than 100 say nothing")
        if not 0.5 <= self.level < 1:
            raise ValueError(f"level={self.level}: write a share such as 0.95")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two systems on the stories that both have a value for.

    Args:
        stories: how many these are.
        difference: mean of second - first.
        interval: bootstrap interval of ``difference``; None for fewer than two stories.
        relative: ``difference`` as a share of the first's mean; None if that is 0 or less.
        wins: stories on which the second is higher.
        losses: stories on which it is lower.
        sign_p: two-sided sign test, ties left out.
        permutation_p: two-sided paired permutation test of the mean difference.
    """

    stories: int
    difference: float
    interval: tuple[float, float] | None
    relative: float | None
    wins: int
    losses: int
    sign_p: float
    permutation_p: float


def bootstrap_interval(values: Sequence[float], settings: StatisticsSettings) -> tuple[float, float] | None:
    """Percentile interval of the mean of ``values`` over resampled stories; None for fewer than two."""
    if len(values) < 2:
        return None
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(settings.seed).integers(len(data), size=(settings.resamples, len(data)))
    tail = (1 - settings.level) / 2
    low, high = np.quantile(data[picks].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def compare(first: Sequence[float], second: Sequence[float], settings: StatisticsSettings) -> Comparison | None:
    """Compare paired values, one pair for each story; None if there are none.

    The p-values are of one comparison; nothing corrects them for the number of columns and pairs looked at.
    """
    if len(first) != len(second):
        raise ValueError(f"values must be paired: {len(first)} and {len(second)}")
    if not first:
        return None
    # What is equal but for rounding is a tie.
    differences = np.round(np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64), 9)
    base = float(np.mean(first))
    mean = float(differences.mean())
    return Comparison(
        stories=len(differences),
        difference=mean,
        interval=bootstrap_interval(differences.tolist(), settings),
        relative=mean / base if base > 0 else None,
        wins=int((differences > 0).sum()),
        losses=int((differences < 0).sum()),
        sign_p=sign_test(differences.tolist()),
        permutation_p=permutation_test(differences.tolist(), settings),
    )


def sign_test(differences: Sequence[float]) -> float:
    """Two-sided p of as many positive differences, if each sign were a fair coin's; zeros are left out."""
    positive = sum(value > 0 for value in differences)
    n = positive + sum(value < 0 for value in differences)
    tail = sum(comb(n, k) for k in range(min(positive, n - positive) + 1))
    return min(1.0, 2 * tail / 2**n)


def permutation_test(differences: Sequence[float], settings: StatisticsSettings) -> float:
    """Two-sided p of so large a mean, if each difference could as well have had the other sign.

    Exact for few stories, else by random flips, of which the one observed counts as one.
    """
    data = np.asarray(differences, dtype=np.float64)
    exact = len(data) <= _EXACT_FLIPS
    if exact:
        codes = np.arange(2 ** len(data))[:, None]
        flips = (codes >> np.arange(len(data))) & 1
    else:
        flips = np.random.default_rng(settings.seed).integers(2, size=(settings.resamples, len(data)))
    sums = np.abs((1 - 2 * flips) @ data)
    extreme = int((sums >= np.abs(data.sum()) * (1 - 1e-9)).sum())
    return extreme / len(sums) if exact else (extreme + 1) / (len(sums) + 1)
