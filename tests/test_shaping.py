import math

import pytest
import torch

from luffy import shaping

ALL = [
    shaping.get("none"),
    shaping.get("regularized"),
    shaping.get("regularized", gamma=0.5),
    shaping.get("log"),
    shaping.get("prob_plus_log", weight=0.3),
    shaping.get("sqrt"),
    shaping.get("power", exponent=0.25),
]


@pytest.mark.parametrize(
    ("probability", "value", "weight"),
    [
        (0.001, 0.00990099, 0.00980296),
        (0.05, 1 / 3, 2 / 9),
        (0.1, 0.5, 0.25),
        (0.5, 5 / 6, 0.05 / 0.36),
        (1, 1 / 1.1, 0.1 / 1.21),
    ],
)
def test_regularized_by_hand(probability, value, weight):
    shape, x = shaping.get("regularized", gamma=0.1), torch.tensor(probability, dtype=torch.float64)
    assert shape(x).item() == pytest.approx(value, rel=1e-6)
    assert shape.gradient_weight(x).item() == pytest.approx(weight, rel=1e-5)


def test_others_by_hand():
    x = torch.tensor(0.25, dtype=torch.float64)
    assert shaping.get("none")(x).item() == 0.25
    assert shaping.get("sqrt")(x).item() == 0.5
    assert shaping.get("power", exponent=1.5)(x).item() == 0.125
    assert shaping.get("log", weight=0.2)(x).item() == pytest.approx(0.2 * math.log(0.25))
    assert shaping.get("prob_plus_log", weight=0.2)(x).item() == pytest.approx(0.25 + 0.2 * math.log(0.25))


@pytest.mark.parametrize("shape", ALL, ids=repr)
def test_gradient_weight_is_derivative_times_ratio(shape):
    ratio = torch.linspace(0.01, 1, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(shape(ratio).sum(), ratio)
    torch.testing.assert_close(shape.gradient_weight(ratio.detach()), (slope * ratio).detach())


def test_weight_peaks_at_gamma_and_logit_bound_at_its_closed_form():
    """Eq. 7 and 8: the weight peaks at pi = gamma, its product with 1 - pi at gamma / (1 + 2 gamma)."""
    pi = torch.linspace(1e-4, 1, 100_001, dtype=torch.float64)
    weight = shaping.get("regularized", gamma=0.1).gradient_weight(pi)
    assert pi[weight.argmax()].item() == pytest.approx(0.1, abs=1e-4)
    assert weight.max().item() == pytest.approx(0.25)
    bound = weight * (1 - pi)
    assert pi[bound.argmax()].item() == pytest.approx(0.1 / 1.2, abs=1e-4)
    assert bound.max().item() == pytest.approx(0.2273, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "params"),
    [("regularised", {}), ("regularized", {"weight": 1}), ("regularized", {"gamma": 0}), ("power", {"exponent": -1})],
)
def test_bad_shapings_are_refused(name, params):
    with pytest.raises(ValueError):
        shaping.get(name, **params)
