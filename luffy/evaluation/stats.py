"""Statistics of evaluations: avg@k, unbiased pass@k, and bootstrap intervals over problems. Pure functions.

The unit that is resampled is always the problem: samples of one problem are not independent of each other. A mean over
benchmarks resamples each benchmark's problems separately and weighs the benchmarks equally, as the paper's averages
do (Table 1). What an interval says is how well these models were measured on problems like these; it says nothing
about how the same method would come out with another training seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
_AT_ONCE = 2_000_000  # resampled values in memory at a time


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from `right` of `samples` (Chen et al. 2021).

    Raises ValueError unless 0 <= right <= samples and 1 <= k <= samples.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {right} right in {samples} samples is not defined")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """How much the first is above the second. p: two-sided, the share of resamples on the far side of 0, doubled."""

    p: float


def bootstrap(scores: Sequence[Sequence[float]], *, level: float = 0.95, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Percentile interval of the mean over benchmarks of their mean score (scipy.stats.bootstrap).

    scores: per benchmark, one score per problem (for avg@k the mean over its samples). Raises ValueError if there is
    no benchmark, or one without a problem.
    """
    columns = _checked(scores)
    interval, _ = _resampled(columns, level, draws, seed)
    return Interval(_mean(columns), *interval)


def paired_bootstrap(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    *,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """The difference of two models on the same problems: both are resampled with the same problems (Sec. 5.1).

    first, second: as in `bootstrap`, problems in the same order. Raises ValueError if they do not match.
    """
    a, b = _checked(first), _checked(second)
    if [len(column) for column in a] != [len(column) for column in b]:
        raise ValueError("a paired comparison needs the same problems on both sides")
    # Resampling is linear: the difference of the resampled means is the resampled mean of the differences.
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    interval, means = _resampled(gaps, level, draws, seed)
    # Never exactly 0: that many draws cannot show it.
    below, above = (np.sum(means <= 0) + 1) / (draws + 1), (np.sum(means >= 0) + 1) / (draws + 1)
    return Difference(_mean(gaps), *interval, p=float(min(1.0, 2 * min(below, above))))


def _checked(scores: Sequence[Sequence[float]]) -> list[np.ndarray]:
    columns = [np.asarray(column, dtype=float) for column in scores]
    if not columns or any(column.ndim != 1 or not len(column) for column in columns):
        raise ValueError("an interval needs at least one benchmark, and each of them at least one problem")
    return columns


def _resampled(
    columns: Sequence[np.ndarray], level: float, draws: int, seed: int
) -> tuple[tuple[float, float], np.ndarray]:
    """The percentile interval and the resampled means, (draws,), of the mean over the columns of their means."""
    from scipy import stats

    samples = [column if len(column) > 1 else np.repeat(column, 2) for column in columns]  # scipy wants two at least

    def mean_of_means(*parts: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean([part.mean(axis) for part in parts], axis=0)

    found = stats.bootstrap(
        samples,
        mean_of_means,
        n_resamples=draws,
        batch=max(1, _AT_ONCE // sum(map(len, samples))),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = found.confidence_interval
    return (float(interval.low), float(interval.high)), found.bootstrap_distribution


def _mean(columns: Sequence[np.ndarray]) -> float:
    return float(np.mean([column.mean() for column in columns]))


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of its confidence interval by Student's t; the half-width of one value is NaN."""
    from scipy import stats

    data = np.asarray([value for value in values if not np.isnan(value)], dtype=float)
    if len(data) < 2:
        return float(data.mean()) if len(data) else float("nan"), float("nan")
    return float(data.mean()), float(stats.t.ppf((1 + level) / 2, len(data) - 1) * stats.sem(data))


def mean(values: Sequence[float]) -> float:
    """The mean as a float, 0 of nothing."""
    return float(sum(values) / len(values)) if values else 0.0
