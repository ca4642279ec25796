"""What runs over seeds say: differences with their intervals, verdicts on claims, and what was too small to be seen.

A difference between two methods is Welch's: seeds are not paired (the scores of two methods with one seed are
uncorrelated). Runs of both methods share their base models, in equal numbers or nearly so, so a base that is better for
both only widens the interval; `components` shows how much, and `cell_means` takes unequal numbers into account. A
verdict is one of

    no effect     it is within +-bound of 0: two one-sided tests, p < 0.05. Less than what counts, even if it is not 0
    reproduced    the difference has the claimed sign, and is not 0: p < 0.05 after Holm's correction in its family
    contradicted  it has the other sign, likewise
    undecided     none of these; `seeds_needed` says how many seeds a method would take

Where there are many cells of few runs (the map, the arena), an interval takes the spread of all of them into account:
`cell_means`.

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
LEADS = ("ahead", "behind", "no effect", "undecided")  # the same, where nothing is claimed


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
    """Holm's adjusted p-values of a family of tests; NaN stay, and count for nothing: the least of m is multiplied by
    m, the next by m - 1, and so on, none becomes less than one before it, and none more than 1.

    (statsmodels' function for this collects all garbage of the process at every call, a sixth of a second.)
    """
    data = np.array(ps, dtype=float)
    order = np.argsort(data)[: int((~np.isnan(data)).sum())]  # NaN come last
    data[order] = np.minimum(1.0, np.maximum.accumulate(data[order] * np.arange(len(order), 0, -1)))
    return [float(p) for p in data]


def verdict(effect: Effect, p: float, bound: float) -> str:
    """The verdict on a claim that the effect is above 0. p: adjusted; bound: of "no effect"."""
    if effect.within(bound) < LEVEL:
        return "no effect"
    if p < LEVEL:
        return "reproduced" if effect.value > 0 else "contradicted"
    return "undecided"


def lead(effect: Effect, p: float, bound: float) -> str:
    """The verdict on who is ahead, where nothing is claimed: one of LEADS."""
    return dict(zip(VERDICTS, LEADS, strict=True))[verdict(effect, p, bound)]


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


@dataclass(frozen=True)
class Means:
    """Means of several cells with the covariance of their errors, (cells, cells), the degrees of freedom of each error,
    (cells,), which of them have a standard deviation of their own, and the number of seeds of each.

    With blocks in unequal numbers and cells that vary unequally the covariance is approximate. That a pooled deviation
    shares data with a cell's own is left out of account.
    """

    names: list[str]
    values: np.ndarray
    covariance: np.ndarray
    df: np.ndarray
    own: np.ndarray
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
        """With Welch's degrees of freedom where one has a standard deviation of its own."""
        i, j = self.names.index(first), self.names.index(second)
        parts = self.covariance[i, i], self.covariance[j, j]
        variance = sum(parts) - 2 * self.covariance[i, j]
        df = float(self.df[i])
        if self.own[i] or self.own[j]:
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
        for members in (~self.own, *np.eye(len(self.names), dtype=bool)[self.own]):
            if members.any():
                df = self.df[members][0]
                scales[:, members] = np.sqrt(df / rng.chisquare(df, count))[:, None]
        return self.values + normal * scales


def cell_means(table: pd.DataFrame, column: str, cell: str = "method", block: str | None = None) -> Means:
    """The mean of a column in every cell, with the `variances` of all together. NaN are left out.

    block: a column, over whose values the means are in equal parts (least squares of cell and block, without their
    interaction): cells need not have the blocks in equal numbers, and what a base model adds to the runs of all methods
    moves no mean.
    """
    data = table.dropna(subset=[column])
    names = sorted(set(data[cell]))
    cells = (data[cell].to_numpy()[:, None] == np.array(names)).astype(float)
    design = cells
    if block:
        at = (data[block].to_numpy()[:, None] == np.array(sorted(set(data[block])))).astype(float)
        design = np.hstack([cells, at[:, 1:] - at[:, :1]])  # effects of blocks sum to 0
    inverse = np.linalg.pinv(design.T @ design)
    values = data[column].to_numpy(float)
    fitted = inverse @ design.T @ values
    left = 1 - ((design @ inverse) * design).sum(axis=1)  # of every value, what the fit leaves free
    variance, df, own = variances(cells.T @ (values - design @ fitted) ** 2, cells.T @ left)
    deviation = np.sqrt(variance)
    covariance = deviation[:, None] * inverse[: len(names), : len(names)] * deviation
    return Means(names, fitted[: len(names)], covariance, df, own, cells.sum(axis=0).astype(int).tolist())


def variances(squares: np.ndarray, df: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Variance of the runs of each cell, its degrees of freedom, and whether it is the cell's own: the variance of all
    cells together but the `outliers`, or the cell's own, with its own degrees of freedom, where that is larger.

    Few seeds a cell say little of its variance, all cells together say more, but a method may vary more than the
    others, and three seeds would not show it in a test. So doubt widens intervals: those of cells that are alike are
    too wide (of pairs of them without a difference 3% have p < 0.05, or fewer), those of one that varies more are as
    Welch's. paper_figures/pilots/PILOTS.md has the simulation.

    squares, df: (cells,), sums of squared residuals and their degrees of freedom. NaN where nothing is known.
    """
    df = np.where(df > 1e-9, df, 0.0)  # a cell of one run leaves nothing free, but for rounding
    inside = ~outliers(squares, df)
    total = df[inside].sum()
    pooled = squares[inside].sum() / total if total else math.nan
    alone = np.divide(squares, df, where=df > 0, out=np.zeros(len(df)))
    own = alone > pooled * (1 + 1e-9)  # (equal ones differ in their last bits)
    return np.where(own, alone, pooled), np.where(own, df, total), own


def outliers(squares: np.ndarray, df: np.ndarray) -> np.ndarray:
    """Which cells vary so much more than the others together that these would be judged by them, such as a method whose
    runs collapse: an F test each, p < 0.05 by Bonferroni, the clearest first. Arguments as of `variances`."""
    from scipy import stats

    apart = np.zeros(len(squares), bool)
    while True:
        inside = ~apart
        others, theirs = squares[inside].sum() - squares, df[inside].sum() - df
        tried = inside & (df > 0) & (theirs > 0) & (others > 1e-9 * squares)
        ratio = np.divide(squares * theirs, others * df, where=tried, out=np.zeros(len(squares)))
        ps = np.where(tried, stats.f.sf(ratio, np.maximum(df, 1e-9), np.maximum(theirs, 1e-9)), 1.0)
        if not len(ps) or ps.min() * len(ps) >= LEVEL:
            return apart
        apart[ps.argmin()] = True


def within(table: pd.DataFrame, column: str) -> float:
    """One standard deviation of a column within methods (column "method"); NaN where no method has two runs."""
    squares = (table[column] - table.groupby("method")[column].transform("mean")) ** 2
    left = len(table) - table["method"].nunique()
    return math.sqrt(float(squares.sum()) / left) if left else math.nan


def components(table: pd.DataFrame, column: str) -> dict[str, float]:
    """Standard deviations of a column of runs, told apart by a mixed model with the method as a fixed effect and the
    base model as a random one: "base", and "seed" (the rest). table: columns method, base and the column.

    "base" is NaN where there is one base model only.
    """
    import statsmodels.formula.api as formulas

    data = table[["method", "base", column]].dropna().rename(columns={column: "value"})
    if data["base"].nunique() < 2 or len(data) < data["method"].nunique() + 2:
        return {"base": math.nan, "seed": within(data, "value")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variance of 0, at the edge of what it can be, is an answer here
        fit = formulas.mixedlm("value ~ C(method)", data, groups=data["base"]).fit(reml=True)
    return {"base": math.sqrt(max(0.0, float(fit.cov_re.iloc[0, 0]))), "seed": math.sqrt(float(fit.scale))}
