"""What the figures of training curves share: some metrics of some methods of the main runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from luffy.study import style

from .files import missing
from .runs import NoDataError, Runs

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
    return pd.concat(frames, ignore_index=True)


def draw(table: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """One panel per metric, titled as said."""
    figure, axes = style.panels(len(titles))
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        rows = table[table["metric"] == metric]
        axis.set(title=title, xlabel="step")
        if rows.empty:
            missing(axis, f"no runs: {COMMAND}")
            continue
        style.draw_curves(axis, rows)
        axis.set_ylim(bottom=0)
    style.legend_below(figure, axes)
    return figure


def draw_demonstrations(axis: Axes, length: float) -> None:
    """Their mean length, in a panel of lengths that has room for it."""
    axis.axhline(length, color="black", linestyle=":", linewidth=1)
    axis.text(0, length * 1.02, "demonstrations", fontsize=7, va="bottom")
    axis.set_ylim(top=max(axis.get_ylim()[1], 1.25 * length))
