"""Figure 3: averages over benchmarks on several backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from luffy.evaluation.paper_numbers import read_published
from luffy.methods import METHODS
from luffy.study import style
from luffy.study.results import BASE, base_scores

from .runs import Runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = ("on_policy", "sft", "luffy")
REFERENCE = {"Qwen2.5-7B-Instruct": "Base"}  # what the paper's figure starts from; else Instruct
CAPTION = (
    "Figure 3. Average accuracy in distribution. Above, hatched: the paper's six benchmarks (Table 3). Below: measured "
    "on the embedded world, mean over seeds, a dot per run; the base models differ in the share of answers in which "
    "they work step by step before training."
)
ORDER = ("Base", "Instruct", "SFT", "On-Policy RL", "LUFFY")


def data(runs: Runs) -> pd.DataFrame:
    """Columns origin ("published", "measured"), backbone, model, seed, accuracy (percent)."""
    table = read_published("table3")
    averages = table[table["benchmark"] == "id"]
    rows = []
    for group, part in averages.groupby("group", sort=False):
        values = dict(zip(part["model"], part["accuracy"], strict=True))
        for name in (REFERENCE.get(str(group), "Instruct"), "SFT", "On-Policy RL", "LUFFY"):
            rows.append({"origin": "published", "backbone": group, "model": name, "seed": 0, "accuracy": values[name]})
    for model, chosen in runs.on_bases().items():
        found = {BASE: (base_scores(chosen).assign(seed=0), "base id")}
        found |= {METHODS[method].label: (chosen[chosen["method"] == method], "id") for method in SHOWN}
        for label, (part, column) in found.items():
            for run in part.dropna(subset=[column]).sort_values("seed").to_dict("records"):
                row = {"origin": "measured", "backbone": model, "model": label, "seed": run["seed"]}
                rows.append(row | {"accuracy": 100 * run[column]})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    origins = [list(dict.fromkeys(table[table["origin"] == name]["backbone"])) for name in ("published", "measured")]
    columns = max(map(len, origins))
    figure, axes = style.panels(columns, 2, width=1.75, height=2.5)
    colors = {METHODS[m].label: style.LOOKS[m]["color"] for m in SHOWN}
    for place, axis in enumerate(axes):
        row, column = divmod(place, columns)
        if column >= len(origins[row]):
            axis.set_visible(False)
            continue
        backbone = origins[row][column]
        _bars(axis, table[table["backbone"] == backbone], colors, hatch="" if row else "///")
        axis.set(
            title=backbone.removeprefix("Qwen2.5-").replace("tiny:own_share=", "own share "),
            ylim=(0, 110 if row else 50),
        )
        axis.title.set_fontsize(8)
        if column == 0:
            axis.set_ylabel("average accuracy (%)")
    return figure


def _bars(axis: Axes, rows: pd.DataFrame, colors: dict[str, str], hatch: str) -> None:
    order = [model for model in ORDER if model in set(rows["model"])]
    for place, model in enumerate(order):
        values = rows[rows["model"] == model]["accuracy"]
        color = colors.get(model, "#BBBBBB")
        axis.bar(place, values.mean(), color=color, alpha=0.6, hatch=hatch, edgecolor="#444444", linewidth=0.5)
        if len(values) > 1:
            axis.plot(np.full(len(values), place), values, "o", color="black", markersize=2)
        axis.text(place, values.max() + 1, f"{values.mean():.1f}", ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(order)), order, rotation=40, ha="right", fontsize=7)
    axis.grid(axis="x", visible=False)
