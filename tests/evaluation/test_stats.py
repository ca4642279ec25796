import itertools
import math

import numpy as np
import pytest

from luffy.evaluation.stats import Interval, bootstrap, paired_bootstrap, pass_at_k


def test_pass_at_k_by_hand_and_by_enumeration():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(4, 4, 1) == 1.0 and pass_at_k(4, 0, 4) == 0.0
    for n, right in [(6, 2), (7, 3)]:
        for k in range(1, n + 1):
            draws = list(itertools.combinations(range(n), k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(min(draw) < right for draw in draws) / len(draws))
    for bad in [(4, 5, 1), (4, 1, 0), (4, 1, 5)]:
        with pytest.raises(ValueError):
            pass_at_k(*bad)


@pytest.mark.parametrize("p", [0.1, 0.37, 0.8])
def test_pass_at_k_is_unbiased(p):
    """The mean over all outcomes of n independent samples is the closed form 1 - (1 - p)^k."""
    n = 9
    for k in range(1, n + 1):
        chances = (math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert sum(chances) == pytest.approx(1 - (1 - p) ** k)


def test_bootstrap_of_a_share_has_the_binomial_width():
    """Resampling n zeros and ones is a binomial draw: its standard deviation is sqrt(p (1 - p) / n)."""
    n, p = 400, 0.3
    interval = bootstrap([[1.0] * int(n * p) + [0.0] * int(n * (1 - p))], draws=20_000)
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    assert interval.value == pytest.approx(0.3)
    assert interval.low == pytest.approx(p - half, abs=0.05 * half + 0.5 / n)
    assert interval.high == pytest.approx(p + half, abs=0.05 * half + 0.5 / n)


def test_bootstrap_weighs_benchmarks_equally_and_resamples_each():
    small, large = [1.0, 0.0], [0.0] * 1000
    interval = bootstrap([small, large], draws=4000)
    assert interval.value == 0.25  # not 1/1002
    # the mean of two draws from {0, 1} is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4; halved by the second benchmark
    assert (interval.low, interval.high) == (0.0, 0.5)


def test_bootstrap_repeats():
    scores = [np.random.default_rng(0).random(50).tolist(), [0.5]]
    first = bootstrap(scores, draws=101)
    assert first == bootstrap(scores, draws=101) != bootstrap(scores, draws=101, seed=1)
    assert bootstrap([[0.5]]) == Interval(0.5, 0.5, 0.5)


def test_pairing_uses_that_problems_are_the_same():
    """The second model is right wherever the first is, and on 30 of 200 problems more."""
    first, second = [1.0] * 80 + [0.0] * 120, [1.0] * 110 + [0.0] * 90
    gap = paired_bootstrap([second], [first], draws=10_000)
    half = 1.96 * math.sqrt(0.15 * 0.85 / 200)  # of the differences, of which 30 are 1 and the others 0
    assert gap.value == pytest.approx(0.15)
    assert gap.low == pytest.approx(0.15 - half, abs=0.01) and gap.high == pytest.approx(0.15 + half, abs=0.01)
    assert gap.p == pytest.approx(2 / 10_001)  # no resample can turn it round, and p is never 0
    a, b = bootstrap([second]), bootstrap([first])
    assert gap.high - gap.low < 0.8 * math.hypot(a.high - a.low, b.high - b.low)  # what pairing is for


def test_no_difference_is_not_significant():
    scores = [np.random.default_rng(3).integers(2, size=100).tolist()]
    assert paired_bootstrap(scores, scores).p == 1.0
    other = [np.random.default_rng(4).integers(2, size=100).tolist()]
    gap = paired_bootstrap(scores, other)
    assert gap.low < 0 < gap.high and gap.p > 0.05


@pytest.mark.parametrize("scores", [[], [[]], [[1.0], []]])
def test_nothing_to_resample(scores):
    with pytest.raises(ValueError, match="at least one"):
        bootstrap(scores)


def test_pairs_must_match():
    with pytest.raises(ValueError, match="the same problems"):
        paired_bootstrap([[1.0, 0.0]], [[1.0]])
