"""Figure 3: averages over benchmarks on several backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from luffy.evaluation.paper_numbers import read_published
from luffy.methods import METHODS
from luffy.study import style

from .runs import Runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("on_policy", "sft", "luffy")
REFERENCE = {"Qwen2.5-7B-Instruct": "Base"}  # what the paper's figure starts from; else Instruct
CAPTION = (
    "Figure 3. Average accuracy in distribution. Hatched: the paper's six benchmarks (Table 3). Plain: measured on "
    "the embedded world, mean over seeds, a dot per seed; each base model is another pre-training seed."
)


def data(runs: Runs) -> pd.DataFrame:
    """Columns origin ("published", "measured"), backbone, model, seed, accuracy (percent)."""
    table = read_published("table3")
    averages = table[table["benchmark"] == "id"]
    rows = []
    for group, part in averages.groupby("group", sort=False):
        values = dict(zip(part["model"], part["accuracy"], strict=True))
        for name in (REFERENCE.get(str(group), "Instruct"), "SFT", "On-Policy RL", "LUFFY"):
            rows.append({"origin": "published", "backbone": group, "model": name, "seed": 0, "accuracy": values[name]})
    measured = runs.runs[runs.runs["set"].isin(["full", "base1"]) & runs.runs["method"].isin(SHOWN)].dropna(
        subset=["id"]
    )
    for run in measured.sort_values(["set", "method", "seed"], ascending=[False, True, True]).to_dict("records"):
        label = METHODS[run["method"]].label
        row = {"origin": "measured", "backbone": f"{run['model']} (ours)", "model": label, "seed": run["seed"]}
        rows.append(row | {"accuracy": 100 * run["id"]})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    backbones = list(dict.fromkeys(table["backbone"]))
    figure, axes = style.panels(len(backbones), width=1.75, height=2.7)
    colors = {METHODS[m].label: style.LOOKS[m]["color"] for m in SHOWN}
    for axis, backbone in zip(axes, backbones, strict=True):
        rows = table[table["backbone"] == backbone]
        order = [m for m in ("Base", "Instruct", "SFT", "On-Policy RL", "LUFFY") if m in set(rows["model"])]
        hatch = "///" if (rows["origin"] == "published").all() else ""
        for place, model in enumerate(order):
            values = rows[rows["model"] == model]["accuracy"]
            color = colors.get(model, "#BBBBBB")
            axis.bar(place, values.mean(), color=color, alpha=0.6, hatch=hatch, edgecolor="#444444", linewidth=0.5)
            if len(values) > 1:
                axis.plot(np.full(len(values), place), values, "o", color="black", markersize=2.5)
            axis.text(place, values.max() + 1, f"{values.mean():.1f}", ha="center", va="bottom", fontsize=7)
        axis.set_xticks(range(len(order)), order, rotation=40, ha="right", fontsize=7)
        axis.set(title=backbone.removeprefix("Qwen2.5-"), ylim=(0, 100 if not hatch else 50))
        axis.title.set_fontsize(8)
        axis.grid(axis="x", visible=False)
    axes[0].set_ylabel("average accuracy (%)")
    return figure
