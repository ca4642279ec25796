"""Figure 7: one problem answered by three models."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import pandas as pd

from luffy.methods import METHODS
from luffy.study import style

from .files import missing
from .runs import NoDataError, Runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("sft", "on_policy", "luffy")
CAPTION = (
    "Figure 7. One held-out problem and the first answer of three final models (seed 0, temperature 0.6). As in the "
    "paper the problem is one that LUFFY gets right and the other two get wrong: the first such of the longest "
    "problems; the panel counts those, and those at which LUFFY alone is wrong. An answer counts as right by what is "
    "in its box: its steps need not be. "
    "The paper's case is a 2006-gon: SFT over 8,129 tokens without end, on-policy "
    "RL 1,002 tokens and wrong, LUFFY 2,623 tokens and right."
)


def data(runs: Runs) -> pd.DataFrame:
    """Columns method, prompt, answer, text, tokens, right, chosen_of: counts of such problems."""
    try:
        return runs.extra("cases")
    except NoDataError:
        return pd.DataFrame(columns=["method", "prompt", "answer", "text", "tokens", "right", "chosen_of"])


def draw(table: pd.DataFrame) -> Figure:
    figure, (axes,) = style.panels(1, width=8.4, height=2.6)
    axes.axis("off")
    if table.empty:
        missing(axes, "no evaluations: python -m paper_figures.make_runs")
        return figure
    first = table.iloc[0]
    heading = f"problem  {first['prompt']}    answer  {first['answer']}"
    axes.text(0.0, 1.08, heading, transform=axes.transAxes, fontsize=9, va="top", family="monospace")
    axes.text(0.0, 0.97, f"{first['chosen_of']}.", transform=axes.transAxes, fontsize=8, va="top")
    for place, method in enumerate(m for m in SHOWN if m in set(table["method"])):
        row = table[table["method"] == method].iloc[0]
        verdict = "right" if row["right"] else "wrong"
        y = 0.8 - 0.28 * place
        label = f"{METHODS[method].label}: {row['tokens']} tokens, {verdict}"
        axes.text(0.0, y, label, transform=axes.transAxes, color=style.LOOKS[method]["color"], weight="bold", va="top")
        text = textwrap.fill(str(row["text"]), 110)
        axes.text(0.02, y - 0.09, text, transform=axes.transAxes, family="monospace", fontsize=7, va="top")
    return figure
