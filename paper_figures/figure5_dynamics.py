"""Figure 5: reward, length and entropy of rollouts in training, LUFFY and on-policy RL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from . import curves
from .runs import Runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("on_policy", "luffy")
TITLES = {"reward/on": "reward of rollouts", "length/on": "length (tokens)", "entropy/on": "entropy (nats)"}
TRACES = "length/off"
CAPTION = (
    "Figure 5. Training dynamics of on-policy RL and LUFFY: reward, length and entropy of rollouts, mean over seeds "
    "and their range. Dotted: mean length of the demonstrations. Dash-dotted: the base before training."
)


def data(runs: Runs) -> pd.DataFrame:
    """Columns metric, method, step, mean, low, high, seeds; length/off is that of the demonstrations."""
    table = curves.data(runs, [*TITLES, TRACES], METHODS)
    return table[(table["metric"] != TRACES) | (table["method"] == "luffy")].reset_index(drop=True)


def draw(table: pd.DataFrame) -> Figure:
    figure = curves.draw(table, TITLES)
    traces = table[table["metric"] == TRACES]
    if not traces.empty:
        curves.draw_demonstrations(figure.axes[1], traces["mean"].mean())
    return figure
