"""How every picture looks, here and in paper_figures: one look per method, panels, curves with the range of seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pandas as pd

from ..methods import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, safe for the colour-blind; variants of a method share its colour and differ in the line.
LOOKS: dict[str, dict[str, Any]] = {
    "on_policy": dict(color="#0072B2", linestyle="-"),
    "on_policy_shaping": dict(color="#56B4E9", linestyle="--"),
    "on_policy_no_clip": dict(color="#56B4E9", linestyle=":"),
    "mixed": dict(color="#E69F00", linestyle="-"),
    "mixed_shaping": dict(color="#E69F00", linestyle="--"),
    "luffy": dict(color="#D55E00", linestyle="-", linewidth=2.5),
    "sft": dict(color="#009E73", linestyle="-"),
    "rl_sft_loss": dict(color="#CC79A7", linestyle="-"),
    "sft_rl": dict(color="#000000", linestyle="-"),
    # methods after the paper: a colour for each family, the line tells its members apart
    "hpt": dict(color="#882255", linestyle="-"),
    "superrl": dict(color="#882255", linestyle="--"),
    "ampo": dict(color="#882255", linestyle=":"),
    "relift": dict(color="#882255", linestyle="-."),
    "chord_mu": dict(color="#44AA99", linestyle="-"),
    "chord_phi": dict(color="#44AA99", linestyle="--"),
    "prefix_rft": dict(color="#999933", linestyle="-"),
    "uft": dict(color="#999933", linestyle="--"),
    "trapo": dict(color="#999933", linestyle="-."),
    "bread": dict(color="#DDCC77", linestyle="-"),
    "pope": dict(color="#DDCC77", linestyle="--"),
    "questa": dict(color="#DDCC77", linestyle=":"),
    "exgrpo": dict(color="#AA4499", linestyle="-"),
    "srft": dict(color="#117733", linestyle="-"),
    "rl_plus": dict(color="#117733", linestyle="--"),
    "dft": dict(color="#88CCEE", linestyle="--"),
    "psft": dict(color="#88CCEE", linestyle="-."),
    "dapo": dict(color="#332288", linestyle="-"),
    "gspo": dict(color="#332288", linestyle="--"),
    "cispo": dict(color="#332288", linestyle=":"),
    "maxrl": dict(color="#332288", linestyle="-."),
    "opd": dict(color="#661100", linestyle="-"),
}
BASE: dict[str, Any] = dict(color="#888888", linestyle="--")  # the model before training
# For methods that have no look of their own.
OTHERS = ("#CC6677", "#6699CC", "#AA7744", "#777777")


def look(method: str) -> dict[str, Any]:
    """How the lines of a method are drawn."""
    if method in LOOKS:
        return LOOKS[method]
    others = [name for name in METHODS if name not in LOOKS]
    return dict(color=OTHERS[others.index(method) % len(OTHERS)], linestyle="-.")


DPI = 160
RC: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": DPI,
    "svg.hashsalt": "luffy",
    "pdf.fonttype": 42,
}
PUBLISHED = dict(color="#BBBBBB", edgecolor="#666666", hatch="///", linewidth=0.5)  # bars of the paper's own numbers
PANEL = (3.1, 2.4)  # inches
LINE, LETTER = 0.6, 0.075  # inches that an entry of a legend takes for its line, and for a letter
SMOOTH = 9  # steps of the centred rolling mean of curves


def panels(columns: int, rows: int = 1, width: float = PANEL[0], height: float = PANEL[1]) -> tuple[Figure, list[Axes]]:
    """A figure with panels in a row, or in rows, each of PANEL size unless said otherwise."""
    with plt.ioff():  # else a notebook keeps it to draw at the end of the cell, though it is closed
        figure, grid = plt.subplots(
            rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained", dpi=DPI
        )
    plt.close(figure)  # whoever gets the figure shows it
    return figure, list(grid.flat)


def grid(count: int, columns: int = 3, width: float = 4.2, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels in rows of `columns`, with light lines behind them."""
    columns = min(columns, count)
    figure, axes = panels(columns, -(-count // columns), width, height)
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes[:count]


def averaged(curves: pd.DataFrame, metric: str, smooth: int = SMOOTH) -> pd.DataFrame:
    """Per method and step the mean over seeds of a metric and the range they span.

    Columns method, step, mean, low, high, seeds. curves: from Runs.curves_of. Smoothed per run by a centred rolling
    mean; steps without the metric are left out.
    """
    frames = []
    shown = curves.dropna(subset=[metric])
    if metric.endswith("/on"):
        shown = shown[shown["groups/off_policy_share"].fillna(0) < 1]  # supervised stages have no rollouts
    for method in [m for m in METHODS if m in set(shown["method"])]:
        rows = shown[shown["method"] == method]
        table = rows.pivot_table(index="step", columns="seed", values=metric)
        if smooth > 1:
            table = table.rolling(smooth, min_periods=1, center=True).mean()
        frame = pd.DataFrame({"mean": table.mean(axis=1), "low": table.min(axis=1), "high": table.max(axis=1)})
        frames.append(frame.reset_index().assign(method=method, seeds=table.shape[1]))
    columns = ["method", "step", "mean", "low", "high", "seeds"]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def draw_curves(axes: Axes, data: pd.DataFrame, **more: Any) -> None:
    """A line per method of `averaged` data, with the range over seeds around it."""
    for method, rows in data.groupby("method", sort=False):
        style = {**look(str(method)), **more}
        axes.plot(rows["step"], rows["mean"], label=METHODS[str(method)].label, **style)
        if (rows["seeds"] > 1).any():
            axes.fill_between(rows["step"], rows["low"], rows["high"], color=style["color"], alpha=0.15, linewidth=0)


def legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend under the figure for all that its panels show, in as many columns as there is room for."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        entry = LINE + LETTER * max(map(len, handles))
        columns = max(1, int(figure.get_figwidth() / entry))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
