"""Bootstrap intervals and paired tests over stories, by SciPy. All random draws have a fixed seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic.dataclasses import dataclass as settings_class

from storymem.config import STRICT, check_bounds


@settings_class(frozen=True, kw_only=True, config=STRICT)
class StatisticsSettings:
    """Intervals and tests over stories.

    Args:
        resamples: of the stories, for intervals; and sign flips, for the permutation test.
        level: of confidence of the intervals.
        seed: of all random draws.
    """

    resamples: int = 10_000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(self, resamples=(100, 1e7), level=(0.5, 0.9999), seed=(0, 2**63))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two systems on the stories for which both have a value. The p-values are not corrected for multiple tests.

    Args:
        stories: how many these are.
        difference: mean of second - first.
        interval: bootstrap interval of ``difference``; None for fewer than two stories.
        relative: ``difference`` divided by the mean of the first; None if that is not positive.
        wins: stories on which the second is higher.
        losses: stories on which it is lower.
        sign_p: two-sided sign test, without ties.
        permutation_p: two-sided paired permutation test of the mean difference; exact for up to 13 stories with 10,000
            resamples.
    """

    stories: int
    difference: float
    interval: tuple[float, float] | None
    relative: float | None
    wins: int
    losses: int
    sign_p: float
    permutation_p: float


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Spearman's rank correlation of two columns over films.

    Args:
        films: how many.
        rho: -1 to 1.
        interval: percentile bootstrap interval over stories, each with all its films; None for fewer than two.
    """

    films: int
    rho: float
    interval: tuple[float, float] | None


def rank_correlation(
    stories: Sequence[Sequence[tuple[float, float]]], settings: StatisticsSettings
) -> Correlation | None:
    """The rank correlation of pairs of values, of all films of all ``stories`` together.

    None for fewer than three films, or if one of the columns has a single value.
    """
    from scipy import stats

    def rho(chosen: Sequence[int]) -> float:
        values = np.array([pair for story in chosen for pair in stories[story]]).reshape(-1, 2)
        if len(values) < 3 or min(len(set(column)) for column in values.T) < 2:
            return np.nan
        ranks = stats.rankdata(values, axis=0)
        return float(np.corrcoef(ranks.T)[0, 1])

    found = rho(range(len(stories)))
    if np.isnan(found):
        return None
    draw = np.random.default_rng(settings.seed)
    drawn = [rho(draw.integers(len(stories), size=len(stories)).tolist()) for _ in range(min(settings.resamples, 1000))]
    tail = 100 * (1 - settings.level) / 2
    low, high = np.nanpercentile(drawn, [tail, 100 - tail])
    interval = (float(low), float(high)) if len(stories) > 1 else None
    return Correlation(films=sum(map(len, stories)), rho=found, interval=interval)


def bootstrap_interval(values: Sequence[float], settings: StatisticsSettings) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean of ``values`` over stories; None for fewer than two."""
    from scipy import stats  # here, because the settings above are part of every start

    if len(values) < 2:
        return None
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=settings.resamples,
        confidence_level=settings.level,
        method="percentile",
        rng=np.random.default_rng(settings.seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def compare(first: Sequence[float], second: Sequence[float], settings: StatisticsSettings) -> Comparison | None:
    """Compare paired values, one pair for each story; None without any."""
    from scipy import stats

    if not first:
        return None
    # Differences that are due to rounding are ties.
    differences = np.round(np.subtract(second, first), 9)
    mean, base = float(differences.mean()), float(np.mean(first))
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    permuted = 1.0
    if len(differences) > 1:
        permuted = stats.permutation_test(
            (differences,),
            np.mean,
            permutation_type="samples",
            n_resamples=settings.resamples,
            rng=np.random.default_rng(settings.seed),
        ).pvalue
    return Comparison(
        stories=len(differences),
        difference=mean,
        interval=bootstrap_interval(differences.tolist(), settings),
        relative=mean / base if base > 0 else None,
        wins=wins,
        losses=losses,
        sign_p=float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
        permutation_p=float(permuted),
    )
