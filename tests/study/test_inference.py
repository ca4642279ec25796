"""Differences over seeds, by hand where that is possible, and verdicts."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from luffy.study import inference
from luffy.study.inference import (
    Effect,
    cell_means,
    components,
    holm,
    outliers,
    seeds_needed,
    verdict,
    welch,
)


def test_welch_by_hand():
    """1, 2, 3 against 0, 4: means 2 and 2; variances 1 and 8; errors 1/3 + 8/2; Satterthwaite's degrees of freedom."""
    effect = welch([1, 2, 3], [0, 4])
    assert effect.value == 0 and effect.se == pytest.approx(math.sqrt(1 / 3 + 4)) and effect.seeds == 2
    assert effect.df == pytest.approx((1 / 3 + 4) ** 2 / ((1 / 3) ** 2 / 2 + 4**2 / 1))
    again = stats.ttest_ind([1, 2, 3, 9], [0, 4, 1], equal_var=False)
    ours = welch([1, 2, 3, 9], [0, 4, 1, math.nan])
    bounds = again.confidence_interval()
    assert (ours.p, ours.low, ours.high) == pytest.approx((again.pvalue, bounds.low, bounds.high))


def test_one_seed_says_nothing():
    effect = welch([1.0], [0.0, 2.0])
    assert effect.value == 0 and math.isnan(effect.p) and math.isnan(effect.half)
    assert verdict(effect, math.nan, 2) == "undecided" and math.isnan(seeds_needed(effect, 2))
    assert welch([], [1.0]).seeds == 0 and inference.mean([math.nan]).seeds == 0


def test_equal_runs_are_equal():
    effect = welch([1.0, 1.0], [1.0, 1.0])
    assert effect.p == 1 and verdict(effect, effect.p, 2) == "no effect"


def test_holm_by_hand():
    """.01, .04, .03 of three: .03, then max(.03, 2 x .03) = .06, then max(.06, .04); NaN does not count."""
    assert holm([0.01, 0.04, 0.03, math.nan])[:3] == pytest.approx([0.03, 0.06, 0.06])
    assert math.isnan(holm([0.01, math.nan])[1]) and all(map(math.isnan, holm([math.nan]))) and holm([]) == []
    many = np.random.default_rng(0).uniform(size=40) ** 3
    assert holm(many) == pytest.approx(multipletests(many, method="holm")[1].tolist()) and max(holm(many)) == 1


def test_verdicts():
    """Four standard errors from 0 with 8 degrees of freedom: p = .004. Within 2 of 0 by four of them, too."""
    assert verdict(Effect(4.0, 1.0, 8, 5), 0.004, 2) == "reproduced"
    assert verdict(Effect(-4.0, 1.0, 8, 5), 0.004, 2) == "contradicted"
    assert verdict(Effect(4.0, 1.0, 8, 5), 0.06, 2) == "undecided"
    assert verdict(Effect(0.1, 0.5, 8, 5), 0.8, 2) == "no effect"
    assert verdict(Effect(0.1, 2.0, 8, 5), 0.9, 2) == "undecided"
    assert verdict(Effect(0.5, 0.1, 8, 5), 0.001, 2) == "no effect"  # not 0, and less than what counts
    # one-sided: 2 - 0.1 is 3.8 standard errors, 2.1 is 4.2; the nearer bound decides
    assert Effect(0.1, 0.5, 8, 5).within(2) == pytest.approx(float(stats.t.sf(3.8, 8)))


def test_seeds_needed():
    """A difference of one deviation in two samples: 17 each for power .8, as tables of the t test say; more where it is
    one of ten tests (p < .005). No difference, and a bound of one deviation: 18, as tables of TOST say."""
    samples = 10
    effect = Effect(1.0, math.sqrt(2 / samples), 2 * samples - 2, samples)
    assert seeds_needed(effect, 0.01) == pytest.approx(17, abs=1)
    assert seeds_needed(effect, 0.01, level=0.005) == pytest.approx(29, abs=2)
    none = Effect(0.0, math.sqrt(2 / samples), 2 * samples - 2, samples)
    assert seeds_needed(none, 1.0) == pytest.approx(18, abs=1)
    assert math.isinf(seeds_needed(Effect(1e-3, 1.0, 18, 10), 1e-3))


def test_variances_by_hand():
    """Cells 1, 3 and 10, 14, 12 and 5: squares 2 and 8 around their means, 6 values less 3 means. All together have a
    variance of 10 / 3, the second cell alone 4, which is larger; the third has none of its own."""
    rows = [("a", 1.0), ("a", 3.0), ("b", 10.0), ("b", 14.0), ("b", 12.0), ("c", 5.0)]
    means = cell_means(pd.DataFrame(rows, columns=["method", "value"]), "value")
    assert means.values.tolist() == pytest.approx([2, 12, 5]) and means.sizes == [2, 3, 1]
    assert means.own.tolist() == [False, True, False] and means.df.tolist() == pytest.approx([3, 2, 3])
    assert means.errors.tolist() == pytest.approx([math.sqrt(10 / 3 / 2), math.sqrt(4 / 3), math.sqrt(10 / 3)])
    quantiles = [stats.t.ppf(0.975, df) for df in (3, 2, 3)]
    assert means.halves.tolist() == pytest.approx((means.errors * quantiles).tolist())
    alike, unlike = means.difference("c", "a"), means.difference("b", "a")
    assert (alike.value, alike.se, alike.df) == pytest.approx((3, math.sqrt(5), 3))
    parts = 4 / 3, 10 / 3 / 2
    assert (unlike.value, unlike.se) == pytest.approx((10, math.sqrt(sum(parts))))
    assert unlike.df == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 3))


def test_components_are_found():
    """Bases that differ by 5, seeds by 1."""
    rng = np.random.default_rng(0)
    bases = {f"base{i}": 5 * rng.standard_normal() for i in range(30)}
    rows = [
        {"method": method, "base": base, "id": level + rng.standard_normal() + 10 * (method == "b")}
        for base, level in bases.items() for method in "ab" for _ in range(3)
    ]  # fmt: skip
    found = components(pd.DataFrame(rows), "id")
    assert found["seed"] == pytest.approx(1, rel=0.15) and found["base"] == pytest.approx(5, rel=0.35)
    alone = components(pd.DataFrame(rows[:6]), "id")
    assert math.isnan(alone["base"]) and alone["seed"] > 0


def test_bases_in_unequal_numbers_move_no_mean():
    """Two methods five points apart on three bases that differ by 20: one with each base once, the other with the best
    one three times. The plain means would be 1.7 points apart the other way."""
    at = {"a": 0.0, "b": 10.0, "c": 20.0}
    rows = [("first", base, 50 + at[base]) for base in "abc"] + [("second", base, 45 + at[base]) for base in "abccc"]
    table = pd.DataFrame(rows, columns=["method", "model", "id"])
    plain = table.groupby("method")["id"].mean()
    assert plain["second"] - plain["first"] == pytest.approx(-1)
    means = cell_means(table, "id", block="model")
    assert dict(zip(means.names, means.values, strict=True)) == pytest.approx({"first": 60, "second": 55})
    assert means.sizes == [3, 5] and means.errors == pytest.approx([0, 0], abs=1e-6)


def test_means_over_blocks_are_those_of_a_regression():
    """Errors of the means and of their difference against statsmodels' least squares; one block: plain means."""
    import statsmodels.formula.api as formulas

    rng = np.random.default_rng(0)
    rows = [(method, base) for method in "xyz" for base in "aabbc"[: 3 + ord(method) - ord("x")]]
    table = pd.DataFrame(rows, columns=["method", "model"]).assign(id=rng.standard_normal(len(rows)))
    fit = formulas.ols("id ~ 0 + method + C(model, Sum)", table).fit()
    means = cell_means(table, "id", block="model")
    names = [f"method[{name}]" for name in means.names]
    assert means.values == pytest.approx(fit.params[names].to_numpy())
    usual, shared = fit.cov_params().loc[names, names].to_numpy(), ~means.own
    assert shared.sum() == 2 and means.df[shared] == pytest.approx(fit.df_resid)
    assert means.covariance[np.ix_(shared, shared)] == pytest.approx(usual[np.ix_(shared, shared)])
    assert means.halves[shared] == pytest.approx((fit.conf_int().loc[names].diff(axis=1)[1] / 2)[shared])
    assert (means.covariance > usual - 1e-12)[~shared][:, ~shared].all()
    assert all(means.difference(name, name).se == pytest.approx(0, abs=1e-9) for name in means.names)
    one = cell_means(table.assign(model="a"), "id", block="model")
    assert one.values == pytest.approx(table.groupby("method")["id"].mean().to_numpy())
    alone = cell_means(table.drop_duplicates("method"), "id", block="model")  # a run each
    assert np.isnan(alone.errors).all() and np.isnan(alone.draws(3)).all()


def test_a_cell_that_varies_more():
    """Four methods with runs -1, 0, 1 about their mean: squares 8 with 8 degrees of freedom. The fifth has -10, 0, 10:
    F = 100 with 2 and 8, p = (1 + 100 / 4)^-4. With 4 for 10 p is 0.0016, with 2 it is 0.06, which is not told apart
    among five cells: then the deviation of all is that of squares 16 with 10 degrees of freedom, and the fifth has its
    own all the same."""

    def made(spread):
        rows = [(method, delta * (spread if method == "e" else 1)) for method in "abcde" for delta in (-1, 0, 1)]
        return cell_means(pd.DataFrame(rows, columns=["method", "id"]), "id")

    means = made(10)
    assert means.own.tolist() == [False] * 4 + [True] and means.df.tolist() == pytest.approx([8] * 4 + [2])
    assert means.errors == pytest.approx([math.sqrt(1 / 3)] * 4 + [10 / math.sqrt(3)])
    assert means.halves[[0, 4]] == pytest.approx([2.306004 * math.sqrt(1 / 3), 4.302653 * 10 / math.sqrt(3)])
    alike, unlike = means.difference("a", "b"), means.difference("a", "e")
    assert (alike.se, alike.df) == pytest.approx((math.sqrt(2 / 3), 8))
    assert unlike.se == pytest.approx(math.sqrt(101 / 3)) and unlike.df == pytest.approx(101**2 / (1 / 8 + 100**2 / 2))
    drawn = means.draws(200_000)
    assert np.quantile(drawn[:, [0, 4]], 0.975, axis=0) == pytest.approx(means.halves[[0, 4]], rel=0.03)
    assert made(4).errors[:4] == pytest.approx(means.errors[:4])  # a method that collapses widens no other's interval
    near = made(2)
    assert near.own.tolist() == [False] * 4 + [True] and near.df.tolist() == pytest.approx([10] * 4 + [2])
    assert near.errors == pytest.approx([math.sqrt(1.6 / 3)] * 4 + [math.sqrt(4 / 3)])
    assert outliers(np.zeros(3), np.full(3, 2.0)).tolist() == [False] * 3
    assert outliers(np.array([5.0, 0, 0]), np.full(3, 2.0)).tolist() == [False] * 3  # others that do not vary at all


def test_draws_are_student_s():
    """Of a mean with 3 degrees of freedom, the 97.5% quantile is 3.18 errors away."""
    table = pd.DataFrame({"method": "x", "model": "m", "id": [1.0, 2.0, 3.0, 4.0]})
    means = cell_means(table, "id")
    drawn = means.draws(200_000)[:, 0]
    assert np.quantile(drawn, 0.975) == pytest.approx(2.5 + 3.182 * means.errors[0], rel=0.02)
