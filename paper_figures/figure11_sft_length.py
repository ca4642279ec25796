"""Figure 11: length of rollouts in training, with the SFT loss and with LUFFY's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from . import curves
from .runs import Runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("rl_sft_loss", "luffy")
TITLES = {"length/on": "length of rollouts (tokens)"}
TRACES = "length/off"
CAPTION = (
    "Figure 11. Length of rollouts during training with an SFT loss on the demonstrations and with LUFFY; mean over "
    "seeds and their range. Dotted: mean length of the demonstrations. Dash-dotted: the base before training."
)


def data(runs: Runs) -> pd.DataFrame:
    """Columns metric, method, step, mean, low, high, seeds; length/off is that of the demonstrations."""
    table = curves.data(runs, [*TITLES, TRACES], METHODS)
    return table[(table["metric"] != TRACES) | (table["method"] == "luffy")].reset_index(drop=True)


def draw(table: pd.DataFrame) -> Figure:
    figure = curves.draw(table, TITLES)
    traces = table[table["metric"] == TRACES]
    if not traces.empty:
        curves.draw_demonstrations(figure.axes[0], traces["mean"].mean())
    return figure
