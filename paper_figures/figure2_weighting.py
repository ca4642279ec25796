"""Figure 2: entropy in training; the off-policy loss f(pi) and its gradient's weight, without and with shaping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from luffy import shaping
from luffy.study import style

from .files import missing
from .runs import NoDataError, Runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("on_policy", "mixed", "mixed_shaping")
GAMMAS = (0.1,)
CAPTION = (
    "Figure 2. Left: entropy of rollouts during training, mean over seeds and their range (measured). Middle: what "
    "a demonstration's token of probability pi counts in the loss, pi itself or pi / (pi + gamma). Right: bound of "
    "the gradient with respect to the token's logit, f'(pi) pi (1 - pi) (Eq. 8). Middle and right are exact."
)


def data(runs: Runs, gammas: Sequence[float] = GAMMAS) -> pd.DataFrame:
    """Columns panel ("entropy", "loss", "gradient"), curve, x, y; entropy also low, high, seeds."""
    pi = torch.linspace(0, 1, 201, dtype=torch.float64)[1:]
    curves = {"pi": shaping.get("none")} | {f"gamma={g:g}": shaping.get("regularized", gamma=g) for g in gammas}
    rows = []
    for name, function in curves.items():
        # gradient_weight is that of log pi; the softmax adds 1 - pi on the way to the logit
        values = {"loss": function(pi), "gradient": function.gradient_weight(pi) * (1 - pi)}
        rows += [
            pd.DataFrame({"panel": panel, "curve": name, "x": pi.numpy(), "y": np.asarray(value)})
            for panel, value in values.items()
        ]
    try:
        chosen = runs.of()
        entropy = style.averaged(runs.curves_of(chosen[chosen["method"].isin(METHODS)]), "entropy/on")
        rows.append(entropy.rename(columns={"method": "curve", "step": "x", "mean": "y"}).assign(panel="entropy"))
    except NoDataError:
        pass
    return pd.concat(rows, ignore_index=True)


def draw(table: pd.DataFrame) -> Figure:
    figure, (left, middle, right) = style.panels(3)
    entropy = table[table["panel"] == "entropy"].rename(columns={"curve": "method", "x": "step", "y": "mean"})
    if entropy.empty:
        missing(left, "no runs: papermill notebooks/ablation.ipynb out.ipynb -p preset full")
    else:
        style.draw_curves(left, entropy)
        top = 1.35 * left.get_ylim()[1]  # room for the legend
        left.set(title="entropy of rollouts (nats)", xlabel="step", ylim=(0, top))
        left.legend(fontsize=7)
    for axis, panel, title in ((middle, "loss", "loss weighting"), (right, "gradient", "gradient weighting")):
        rows = table[table["panel"] == panel]
        for place, (name, curve) in enumerate(rows.groupby("curve", sort=False)):
            plain = name == "pi"
            look: dict[str, Any]
            label = "no shaping: π" if plain else f"π / (π + {str(name).split('=')[1]})"
            look = (
                dict(color="#0072B2", linestyle="--") if plain else dict(color=f"C{place}" if place > 1 else "#D55E00")
            )
            axis.plot(curve["x"], curve["y"], label=label, **look)
        top = 1.05 if panel == "loss" else 0.33  # room for the legend
        axis.set(title=title, xlabel="probability π of the token", xlim=(0, 1), ylim=(0, top))
        axis.legend(fontsize=7, loc="lower right" if panel == "loss" else "upper right")
    return figure
