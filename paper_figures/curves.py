"""What the figures of training curves share: some metrics of some methods of the main runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from luffy.config import DEFAULT_MODEL
from luffy.study import style

from .files import missing
from .runs import BASE_MODEL, NoDataError, Runs, recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMMAND = "papermill notebooks/ablation.ipynb out.ipynb -p preset full"


def data(runs: Runs, metrics: Sequence[str], methods: Sequence[str]) -> pd.DataFrame:
    """Columns metric, method, step, mean, low, high, seeds; empty where the runs do not exist."""
    try:
        chosen = runs.of()
    except NoDataError:
        return pd.DataFrame(columns=["metric", "method", "step", "mean", "low", "high", "seeds"])
    curves = runs.curves_of(chosen[chosen["method"].isin(methods)])
    frames = []
    for metric in metrics:
        sparse = metric.startswith("eval/")
        frames.append(style.averaged(curves, metric, 1 if sparse else style.SMOOTH).assign(metric=metric))
    return pd.concat([*frames, of_base(runs, metrics)], ignore_index=True)


BASES = {"reward/on": "pass@1", "length/on": "length"}  # of metrics of rollouts, the columns of bases.csv


def of_base(runs: Runs, metrics: Sequence[str], difficulties: Sequence[int] = (3, 4, 5, 6, 7)) -> pd.DataFrame:
    """Rows as of a method BASE_MODEL, at step 0: what the default base does at these difficulties before training, at
    the temperature of training. Without what was not measured."""
    table = runs.bases_in_training()
    chosen = table[table["recipe"] == recipe(DEFAULT_MODEL)]
    if len(chosen):
        chosen = chosen[chosen["difficulty"].astype(str).isin(map(str, difficulties))]
    rows = [
        {"metric": metric, "method": BASE_MODEL, "step": 0, "mean": chosen[BASES[metric]].mean()}
        for metric in metrics
        if metric in BASES and len(chosen)
    ]
    return pd.DataFrame(rows, columns=["metric", "method", "step", "mean"]).astype({"step": int, "mean": float})


def draw_base(axis: Axes, rows: pd.DataFrame) -> None:
    """A line at what the base does, if that is among the rows."""
    for value in rows[rows["method"] == BASE_MODEL]["mean"]:
        axis.axhline(value, color="#888888", linestyle="-.", linewidth=1)
        axis.text(1, value, "base", transform=axis.get_yaxis_transform(), fontsize=7, ha="right", va="bottom")


def draw(table: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """One panel per metric, titled as said."""
    figure, axes = style.panels(len(titles))
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        rows = table[table["metric"] == metric]
        axis.set(title=title, xlabel="step")
        if rows.empty:
            missing(axis, f"no runs: {COMMAND}")
            continue
        style.draw_curves(axis, rows[rows["method"] != BASE_MODEL])
        axis.set_ylim(bottom=0)
        draw_base(axis, rows)
    style.legend_below(figure, axes)
    return figure


def draw_demonstrations(axis: Axes, length: float) -> None:
    """Their mean length, in a panel of lengths that has room for it."""
    axis.axhline(length, color="black", linestyle=":", linewidth=1)
    axis.text(0, length * 1.02, "demonstrations", fontsize=7, va="bottom")
    axis.set_ylim(top=max(axis.get_ylim()[1], 1.25 * length))
