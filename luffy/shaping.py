"""Policy shaping: what an off-policy token counts for, as a function of how likely the policy finds it.

The importance ratio is x = pi_theta / pi_phi; the paper sets pi_phi = 1, so that x is the token's probability.
The mixed-policy objective weighs a token by f(x) instead of x (Eq. 6). The gradient then carries f'(x) * x on
grad log pi (Eq. 7); f(x) = x / (x + gamma) moves that weight towards unlikely tokens.

Each shaping is a small frozen object that is called on a tensor of ratios, so that notebooks and figures plot
exactly what the loss uses. Your own is any callable; with a `gradient_weight` method it can be plotted as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Shaping(Protocol):
    """f(x) on a tensor of ratios (any shape, float), elementwise."""

    def __call__(self, ratio: Tensor) -> Tensor: ...

    def gradient_weight(self, ratio: Tensor) -> Tensor:
        """f'(x) * x: the weight of grad log pi in the gradient of f (Eq. 7)."""
        ...


@dataclass(frozen=True)
class Identity:
    """f(x) = x: plain importance sampling (Eq. 5)."""

    def __call__(self, ratio: Tensor) -> Tensor:
        return ratio

    def gradient_weight(self, ratio: Tensor) -> Tensor:
        return ratio


@dataclass(frozen=True)
class Regularized:
    """f(x) = x / (x + gamma): the paper's shaping (Eq. 6), whose weight gamma x / (x + gamma)^2 peaks at x = gamma."""

    gamma: float = 0.1

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive, not {self.gamma}")

    def __call__(self, ratio: Tensor) -> Tensor:
        return ratio / (ratio + self.gamma)

    def gradient_weight(self, ratio: Tensor) -> Tensor:
        return self.gamma * ratio / (ratio + self.gamma) ** 2


@dataclass(frozen=True)
class Log:
    """f(x) = weight * log x: every token pulls equally, as in supervised fine-tuning."""

    weight: float = 0.1

    def __call__(self, ratio: Tensor) -> Tensor:
        return self.weight * ratio.log()

    def gradient_weight(self, ratio: Tensor) -> Tensor:
        return torch.full_like(ratio, self.weight)


@dataclass(frozen=True)
class ProbPlusLog:
    """f(x) = x + weight * log x."""

    weight: float = 0.1

    def __call__(self, ratio: Tensor) -> Tensor:
        return ratio + self.weight * ratio.log()

    def gradient_weight(self, ratio: Tensor) -> Tensor:
        return ratio + self.weight


@dataclass(frozen=True)
class Power:
    """f(x) = x ** exponent; "sqrt" is exponent 1/2."""

    exponent: float = 0.5

    def __post_init__(self) -> None:
        if not self.exponent > 0:
            raise ValueError(f"exponent must be positive, not {self.exponent}")

    def __call__(self, ratio: Tensor) -> Tensor:
        return ratio**self.exponent

    def gradient_weight(self, ratio: Tensor) -> Tensor:
        return self.exponent * ratio**self.exponent


@dataclass(frozen=True)
class Parabola:
    """f(x) = x - x^2 / 2, whose weight x (1 - x) leaves out what is sure and what is hopeless (CHORD's phi, Zhang et
    al. 2025, arXiv 2508.11408)."""

    def __call__(self, ratio: Tensor) -> Tensor:
        return ratio - ratio.square() / 2

    def gradient_weight(self, ratio: Tensor) -> Tensor:
        return ratio * (1 - ratio)


@dataclass(frozen=True)
class TrustRegion:
    """f(x) = x / alpha below alpha, 1 + log(x / alpha) above: the weight min(1, x / alpha) imitates all but what the
    policy finds unlikely (TRAPO's TrSFT, arXiv 2512.17636)."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, not {self.alpha}")

    def __call__(self, ratio: Tensor) -> Tensor:
        scaled = ratio / self.alpha
        return torch.where(scaled < 1, scaled, 1 + scaled.clamp(min=1).log())

    def gradient_weight(self, ratio: Tensor) -> Tensor:
        return (ratio / self.alpha).clamp(max=1)


def _sqrt() -> Power:
    return Power(0.5)


SHAPINGS: dict[str, Callable[..., Shaping]] = {
    "none": Identity,
    "regularized": Regularized,
    "log": Log,
    "prob_plus_log": ProbPlusLog,
    "sqrt": _sqrt,
    "power": Power,
    "parabola": Parabola,
    "trust_region": TrustRegion,
}


def get(name: str, **params: float) -> Shaping:
    """The shaping of that name: "none", "regularized" (gamma=0.1), "log" (weight=0.1), "prob_plus_log" (weight=0.1),
    "sqrt" or "power" (exponent=0.5), "parabola", "trust_region" (alpha=0.1). Raises ValueError for an unknown name or a
    parameter that it does not take.
    """
    if name not in SHAPINGS:
        raise ValueError(f"no shaping {name!r}: there are {', '.join(SHAPINGS)}")
    try:
        return SHAPINGS[name](**params)
    except TypeError as error:
        raise ValueError(f"shaping {name!r} does not take {params}") from error
