"""Figure 10: how long right and wrong answers are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from luffy.methods import METHODS
from luffy.study import style

from .files import missing
from .runs import BASE_MODEL, NoDataError, Runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("sft", "luffy")
BASE = "#444444"  # colour of the base's outline
PAPER = {"sft": 4646, "luffy": 2832}  # mean tokens in the paper
CAPTION = (
    "Figure 10. Lengths of right and wrong answers of the final models in distribution, all seeds together, at "
    "temperature 0.6; outlined: the base before training. The paper's means: LUFFY 2,832 tokens, SFT 4,646."
)


def data(runs: Runs) -> pd.DataFrame:
    """Columns method, right, tokens, count: answers of that length, over all seeds."""
    try:
        table = runs.extra("answers")
    except NoDataError:
        return pd.DataFrame(columns=["method", "right", "tokens", "count"])
    table = table[table["method"].isin([*SHOWN, BASE_MODEL])]
    return table.groupby(["method", "right", "tokens"], as_index=False)["count"].sum()


def draw(table: pd.DataFrame) -> Figure:
    figure, axes = style.panels(2)
    for axis, (right, title) in zip(axes, {True: "right answers", False: "wrong answers"}.items(), strict=True):
        axis.set(title=title, xlabel="length (tokens)", ylabel="share of answers (%)")
        if table.empty:
            missing(axis, "no evaluations: python -m paper_figures.make_runs")
            continue
        for place, method in enumerate([*SHOWN, BASE_MODEL]):
            mine = table[table["method"] == method]
            rows = mine[mine["right"] == right]
            if rows.empty:
                continue
            mean = np.average(rows["tokens"], weights=rows["count"])
            color = BASE if method == BASE_MODEL else style.LOOKS[method]["color"]
            outlined: dict[str, Any] = dict(histtype="step", label="Base")
            filled: dict[str, Any] = dict(alpha=0.5, label=METHODS[method].label) if method in METHODS else outlined
            axis.hist(
                rows["tokens"], bins=np.arange(0, 132, 4).tolist(), weights=100 * rows["count"] / mine["count"].sum(),
                color=color, **filled,
            )  # fmt: skip
            axis.axvline(mean, color=color, linestyle="--", linewidth=1)
            label = f"mean {mean:.1f}"
            axis.text(0.97, 0.95 - 0.1 * place, label, transform=axis.transAxes, ha="right", va="top", color=color)
    style.legend_below(figure, axes)
    return figure
