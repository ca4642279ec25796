"""Figure 4: training reward on easy and on hard problems, on-policy and with off-policy guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from luffy.study import style

from . import curves
from .files import missing
from .runs import BASE_MODEL, NoDataError, Runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETS = {"easy": "easy problems", "hard": "hard problems"}
METHODS = ("on_policy", "luffy")
CAPTION = (
    "Figure 4. Reward of rollouts during training on easy problems and on hard ones (presets easy and hard: two and "
    "three operations, five and six); mean over seeds and their range. The line is the base before training."
)


def data(runs: Runs) -> pd.DataFrame:
    """Columns set, method, step, mean, low, high, seeds."""
    frames = []
    for name in SETS:
        try:
            chosen = runs.of(name)
        except NoDataError:
            continue
        chosen = chosen[chosen["method"].isin(METHODS)]
        difficulties = [int(text) for text in str(chosen["difficulties"].iloc[0]).split()]
        base = curves.of_base(runs, ["reward/on"], difficulties).drop(columns="metric")
        frames += [table.assign(set=name) for table in (style.averaged(runs.curves_of(chosen), "reward/on"), base)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["set", "method", "step", "mean"])


def draw(table: pd.DataFrame) -> Figure:
    figure, axes = style.panels(2)
    for axis, (name, title) in zip(axes, SETS.items(), strict=True):
        rows = table[table["set"] == name]
        axis.set(title=title, xlabel="step", ylabel="reward of rollouts")
        if rows.empty:
            missing(axis, f"no runs: papermill notebooks/ablation.ipynb out.ipynb -p preset {name}")
            continue
        style.draw_curves(axis, rows[rows["method"] != BASE_MODEL])
        axis.set_ylim(-0.02, 1.0)
        curves.draw_base(axis, rows)
    style.legend_below(figure, axes)
    return figure
