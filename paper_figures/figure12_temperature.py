"""Figure 12: pass@8 over the sampling temperature."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from luffy.methods import METHODS
from luffy.study import style
from luffy.study.results import BASE

from .files import missing
from .runs import BASE_MODEL, NoDataError, Runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("on_policy", "sft", "luffy")
CAPTION = (
    "Figure 12. pass@8 of the final models over the sampling temperature, in distribution; mean over seeds and "
    "their range. The paper measures it on AIME 24 and AMC."
)


def data(runs: Runs) -> pd.DataFrame:
    """Columns method, temperature, mean, low, high (percent), seeds."""
    columns = ["method", "temperature", "mean", "low", "high", "seeds"]
    try:
        table = runs.extra("temperatures")
    except NoDataError:
        return pd.DataFrame(columns=columns)
    groups = table[table["method"].isin([*SHOWN, BASE_MODEL])].groupby(["method", "temperature"])["pass@8"]
    return groups.agg(mean="mean", low="min", high="max", seeds="size").reset_index()[columns]


def draw(table: pd.DataFrame) -> Figure:
    figure, (axes,) = style.panels(1, width=3.6)
    axes.set(title="pass@8 (%)", xlabel="temperature", ylim=(0, 100))
    if table.empty:
        missing(axes, "no evaluations: python -m paper_figures.make_runs")
        return figure
    for method in [m for m in (BASE_MODEL, *SHOWN) if m in set(table["method"])]:
        rows = table[table["method"] == method]
        look = style.BASE if method == BASE_MODEL else style.LOOKS[method]
        label = BASE if method == BASE_MODEL else METHODS[method].label
        axes.plot(rows["temperature"], rows["mean"], marker="o", markersize=3, label=label, **look)
        axes.fill_between(rows["temperature"], rows["low"], rows["high"], color=look["color"], alpha=0.15, linewidth=0)
    style.legend_below(figure, [axes])
    return figure
