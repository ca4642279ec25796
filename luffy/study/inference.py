"""What runs over seeds say: differences with their intervals, verdicts on claims, and what was too small to be seen.

A difference between two methods is Welch's: seeds are not paired (the scores of two methods with one seed are
uncorrelated). Runs of both methods share their base models, in equal numbers or nearly so, so a base that is better for
both only widens the interval; `components` shows how much, and `blocked_means` takes unequal numbers into account. A
verdict is one of

    no effect     it is within +-bound of 0: two one-sided tests, p < 0.05. Less than what counts, even if it is not 0
    reproduced    the difference has the claimed sign, and is not 0: p < 0.05 after Holm's correction in its family
    contradicted  it has the other sign, likewise
    undecided     none of these; `seeds_needed` says how many seeds a method would take

Pure functions; the tests are scipy's and statsmodels'.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.05
VERDICTS = ("reproduced", "contradicted", "no effect", "undecided")


@dataclass(frozen=True)
class Effect:
    """An estimate with its standard error and degrees of freedom. seeds: of the smaller sample; of one, se is NaN."""

    value: float
    se: float
    df: float
    seeds: int

    @property
    def half(self) -> float:
        """Half-width of the 95% interval by Student's t."""
        return self.quantile(1 - LEVEL / 2) * self.se

    @property
    def low(self) -> float:
        return self.value - self.half

    @property
    def high(self) -> float:
        return self.value + self.half

    @property
    def p(self) -> float:
        """Two-sided, of the hypothesis that it is 0."""
        return 2 * self._beyond(abs(self.value))

    def quantile(self, share: float) -> float:
        from scipy import stats

        return float(stats.t.ppf(share, self.df)) if self.df > 0 else math.nan

    def _beyond(self, distance: float) -> float:
        """Chance that an estimate lies by more than that above the truth."""
        from scipy import stats

        if not self.df > 0:
            return math.nan
        if self.se == 0:
            return 0.5 if distance == 0 else float(distance < 0)
        return float(stats.t.sf(distance / self.se, self.df))

    def within(self, bound: float) -> float:
        """p of the two one-sided tests (TOST) of the hypothesis that it is not within +-bound."""
        return max(self._beyond(bound - self.value), self._beyond(bound + self.value))


def welch(first: Sequence[float], second: Sequence[float]) -> Effect:
    """How much the mean of the first is above that of the second, with unequal variances (Welch). NaN are left out."""
    a, b = _numbers(first), _numbers(second)
    if not len(a) or not len(b):
        return Effect(math.nan, math.nan, 0, 0)
    value, seeds = float(a.mean() - b.mean()), min(len(a), len(b))
    if seeds < 2:
        return Effect(value, math.nan, 0, seeds)
    parts = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    total = sum(parts)
    below = parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1)
    df = float(total**2 / below) if below else float(len(a) + len(b) - 2)
    return Effect(value, math.sqrt(total), df, seeds)


def mean(values: Sequence[float]) -> Effect:
    """The mean of one sample against 0. NaN are left out."""
    data = _numbers(values)
    if len(data) < 2:
        return Effect(float(data.mean()) if len(data) else math.nan, math.nan, 0, len(data))
    return Effect(float(data.mean()), float(data.std(ddof=1) / math.sqrt(len(data))), len(data) - 1, len(data))


def _numbers(values: Sequence[float]) -> np.ndarray:
    data = np.asarray(list(values), dtype=float)
    return data[~np.isnan(data)]


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values of a family of tests; NaN stay, and count for nothing."""
    from statsmodels.stats.multitest import multipletests

    data = np.asarray(ps, dtype=float)
    known = ~np.isnan(data)
    if known.any():
        data[known] = multipletests(data[known], method="holm")[1]
    return [float(p) for p in data]


def verdict(effect: Effect, p: float, bound: float) -> str:
    """The verdict on a claim that the effect is above 0. p: adjusted; bound: of "no effect"."""
    if effect.within(bound) < LEVEL:
        return "no effect"
    if p < LEVEL:
        return "reproduced" if effect.value > 0 else "contradicted"
    return "undecided"


def lead(effect: Effect, p: float, bound: float) -> str:
    """The verdict on who is ahead, where nothing is claimed: "ahead", "behind", "no effect" or "undecided"."""
    found = verdict(effect, p, bound)
    return {"reproduced": "ahead", "contradicted": "behind"}.get(found, found)


def seeds_needed(effect: Effect, bound: float, level: float = LEVEL, power: float = 0.8, most: int = 1000) -> float:
    """Seeds at which an effect of this size and spread would be told from 0, or put within +-bound of it, whichever
    takes fewer, with that power.

    The seeds are those of the smaller sample; the larger grows with it. level: of the first test, less than LEVEL
    where it is one of several. inf if it takes more than `most`; NaN if the spread is not known.
    """
    from scipy import stats

    if not effect.df > 0 or not effect.se > 0:
        return math.nan
    for seeds in range(2, most + 1):
        df = max(1.0, effect.df * seeds / effect.seeds)  # degrees of freedom grow with the seeds
        se = effect.se * math.sqrt(effect.seeds / seeds)
        told = float(stats.nct.sf(stats.t.ppf(1 - level / 2, df), df, abs(effect.value) / se))
        limit = float(stats.t.ppf(1 - LEVEL, df))
        # the chance that both one-sided tests reject, as if the spread were known
        sides = [float(stats.norm.cdf((bound + sign * effect.value) / se - limit)) for sign in (1, -1)]
        if max(told, sum(sides) - 1) >= power:
            return seeds
    return math.inf


def pooled(table: pd.DataFrame, column: str, cells: Sequence[str]) -> tuple[pd.DataFrame, float, int]:
    """Mean and count of a column in every cell, and one standard deviation within cells with its degrees of freedom.

    Few seeds a cell say little of their own spread; the cells of a map together say more (analysis of variance).
    """
    groups = table.dropna(subset=[column]).groupby(list(cells))[column]
    means = groups.agg(["mean", "size"]).reset_index()
    residuals = (table[column] - groups.transform("mean")).dropna()
    df = len(residuals) - len(means)
    return means, math.sqrt(float((residuals**2).sum()) / df) if df > 0 else math.nan, df


def pooled_difference(first: Sequence[float], second: Sequence[float], deviation: float, df: int) -> Effect:
    """The difference of two cells whose standard deviation is pooled; a cell that varies more keeps its own."""
    cells = [_numbers(first), _numbers(second)]
    error = math.hypot(*(_error(cell, deviation) for cell in cells))
    return Effect(float(cells[0].mean() - cells[1].mean()), error, df, min(map(len, cells)))


def pooled_half(cell: Sequence[float], deviation: float, df: int) -> float:
    """Half-width of the 95% interval of a cell's mean, with the deviation of `pooled_difference`; NaN if empty."""
    data = _numbers(cell)
    return Effect(0.0, _error(data, deviation), df, len(data)).half if len(data) else math.nan


def _error(cell: np.ndarray, deviation: float) -> float:
    """Standard error of a cell's mean, with a pooled deviation or its own, if that is larger."""
    own = float(cell.std(ddof=1)) if len(cell) > 1 else 0.0
    return max(deviation, own) / math.sqrt(len(cell))


@dataclass(frozen=True)
class Means:
    """Means of several cells with the covariance of their errors, (cells, cells), the degrees of freedom of each error,
    (cells,), which of them have one standard deviation together, and the number of seeds of each."""

    names: list[str]
    values: np.ndarray
    covariance: np.ndarray
    df: np.ndarray
    together: np.ndarray
    sizes: list[int]

    @property
    def errors(self) -> np.ndarray:
        """The standard error of each, NaN where nothing is known of the spread."""
        return np.sqrt(np.diag(self.covariance))

    @property
    def known(self) -> bool:
        """Whether anything is known of the errors."""
        return not bool(np.isnan(self.errors).all())

    @property
    def halves(self) -> np.ndarray:
        """Half-widths of the 95% intervals."""
        each = zip(self.errors, self.df, strict=True)
        return np.array([Effect(0.0, float(error), float(df), 2).half for error, df in each])

    def difference(self, first: str, second: str) -> Effect:
        """With Welch's degrees of freedom, but between two that have one standard deviation."""
        i, j = self.names.index(first), self.names.index(second)
        parts = self.covariance[i, i], self.covariance[j, j]
        variance = sum(parts) - 2 * self.covariance[i, j]
        df = float(self.df[i])
        if not (self.together[i] and self.together[j]):
            df = sum(parts) ** 2 / (parts[0] ** 2 / self.df[i] + parts[1] ** 2 / self.df[j])
        value = float(self.values[i] - self.values[j])
        return Effect(value, math.sqrt(variance), df, min(self.sizes[i], self.sizes[j]))

    def draws(self, count: int, seed: int = 0) -> np.ndarray:
        """The means drawn from their errors by Student's t, (count, cells); NaN where these are not known."""
        if not self.known:
            return np.full((count, len(self.names)), np.nan)
        rng = np.random.default_rng(seed)
        normal = rng.multivariate_normal(np.zeros(len(self.names)), self.covariance, count)
        scales = np.empty_like(normal)
        each = np.eye(len(self.names), dtype=bool)[~self.together]
        for members in (self.together, *each):
            if members.any():
                df = self.df[members][0]
                scales[:, members] = np.sqrt(df / rng.chisquare(df, count))[:, None]
        return self.values + normal * scales


def blocked_means(table: pd.DataFrame, column: str, cell: str = "method", block: str = "model") -> Means:
    """The mean of a column in every cell, over blocks in equal parts (least squares of cell and block, without their
    interaction), with one standard deviation for all cells but those that vary more (`outliers`), which have their own.

    Cells need not have the blocks in equal numbers: what a base model adds to the runs of all methods moves no mean.
    """
    data = table.dropna(subset=[column])
    names, blocks = sorted(set(data[cell])), sorted(set(data[block]))
    cells = (data[cell].to_numpy()[:, None] == np.array(names)).astype(float)
    at = (data[block].to_numpy()[:, None] == np.array(blocks)).astype(float)
    design = np.hstack([cells, at[:, 1:] - at[:, :1]])  # effects of blocks sum to 0
    inverse = np.linalg.pinv(design.T @ design)
    values = data[column].to_numpy(float)
    fitted = inverse @ design.T @ values
    squares = cells.T @ (values - design @ fitted) ** 2
    sizes = cells.sum(axis=0).astype(int)
    left = len(data) - int(np.linalg.matrix_rank(design)) if len(data) else 0
    apart = outliers(squares, sizes - 1, left)
    left -= int((sizes - 1)[apart].sum())
    df = np.where(apart, sizes - 1.0, left)
    square = np.where(apart, squares, squares[~apart].sum())
    spread = np.sqrt(np.divide(square, df, where=df > 0, out=np.full(len(df), np.nan)))
    covariance = spread[:, None] * inverse[: len(names), : len(names)] * spread
    return Means(names, fitted[: len(names)], covariance, df, ~apart, sizes.tolist())


def outliers(squares: np.ndarray, df: np.ndarray, left: int) -> np.ndarray:
    """Which cells vary more than the others together: an F test each, p < 0.05 by Bonferroni, the clearest first.

    squares, df: sums of squared residuals of the cells and their degrees of freedom. left: those of all residuals."""
    from scipy import stats

    apart = np.zeros(len(squares), bool)
    while True:
        inside, rest = squares[~apart].sum(), left - df[apart].sum()
        others, theirs = inside - squares, rest - df
        tried = ~apart & (df > 0) & (theirs > 0) & (others > 1e-9 * inside)
        ratio = np.divide(squares * theirs, others * df, where=tried, out=np.zeros(len(squares)))
        ps = np.where(tried, stats.f.sf(ratio, np.maximum(df, 1), np.maximum(theirs, 1)), 1.0)
        if not len(ps) or ps.min() * len(ps) >= LEVEL:
            return apart
        apart[ps.argmin()] = True


def components(table: pd.DataFrame, column: str) -> dict[str, float]:
    """Standard deviations of a column of runs, told apart by a mixed model with the method as a fixed effect and the
    base model as a random one: "base", and "seed" (the rest). table: columns method, base and the column.

    "base" is NaN where there is one base model only.
    """
    import statsmodels.formula.api as formulas

    data = table[["method", "base", column]].dropna().rename(columns={column: "value"})
    if data["base"].nunique() < 2 or len(data) < data["method"].nunique() + 2:
        means = data.groupby("method")["value"].transform("mean")
        left = len(data) - data["method"].nunique()
        return {
            "base": math.nan,
            "seed": math.sqrt(float(((data["value"] - means) ** 2).sum()) / left) if left else math.nan,
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variance of 0, at the edge of what it can be, is an answer here
        fit = formulas.mixedlm("value ~ C(method)", data, groups=data["base"]).fit(reml=True)
    return {"base": math.sqrt(max(0.0, float(fit.cov_re.iloc[0, 0]))), "seed": math.sqrt(float(fit.scale))}
