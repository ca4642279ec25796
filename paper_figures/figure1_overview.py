"""Figure 1: how a group is made, graded and learned from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from luffy.study import style

from .runs import Runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = (
    "Figure 1. One group: the policy samples n - 1 rollouts of a question, a stronger model contributes a "
    "demonstration. All are verified, advantages are taken over the union, and the demonstration's token "
    "probabilities are shaped; ratios and advantages make the loss."
)

# name: (x, y, width, text, colour); drawn in a space of 12 x 4
BOXES = {
    "question": (0.1, 1.6, 1.1, "question\n$q$", "#EEEEEE"),
    "policy": (1.9, 2.5, 1.5, "policy\n$\\pi_\\theta$", "#CFE3F1"),
    "teacher": (1.9, 0.7, 1.5, "off-policy\nmodel $\\pi_\\phi$", "#F6D9C6"),
    "rollouts": (4.1, 2.5, 1.6, "rollouts\n$\\tau_1 \\ldots \\tau_{n-1}$", "#CFE3F1"),
    "trace": (4.1, 0.7, 1.6, "demonstration\n$\\tau_n$", "#F6D9C6"),
    "verifier": (6.3, 1.6, 1.5, "verifier,\nunion of\nthe group", "#D5EBDD"),
    "advantages": (8.3, 2.5, 1.6, "advantages\n$\\hat A_1 \\ldots \\hat A_n$", "#D5EBDD"),
    "loss": (10.7, 1.6, 1.1, "loss\n(Eq. 6)", "#EEEEEE"),
    "weights": (8.3, 0.7, 1.6, "$r_1 \\ldots r_{n-1}$\nshaped $f(\\pi_n)$", "#F3E3A8"),
}
ARROWS = (
    ("question", "policy"), ("question", "teacher"), ("policy", "rollouts"), ("teacher", "trace"),
    ("rollouts", "verifier"), ("trace", "verifier"), ("verifier", "advantages"), ("trace", "weights"),
)  # fmt: skip
HEIGHT = 0.9


def data(runs: Runs) -> pd.DataFrame:
    """The boxes: name, x, y, text. Nothing in it is measured."""
    return pd.DataFrame([{"box": name, "x": box[0], "y": box[1], "text": box[3]} for name, box in BOXES.items()])


def draw(table: pd.DataFrame) -> Figure:
    figure, (axes,) = style.panels(1, width=9.6, height=3.5)
    axes.set(xlim=(0, 12), ylim=(0.4, 4.7))
    axes.axis("off")
    for x, y, width, text, color in BOXES.values():
        box = FancyBboxPatch(
            (x, y), width, HEIGHT, boxstyle="round,pad=0.04", facecolor=color, edgecolor="#555555", zorder=2
        )
        axes.add_patch(box)
        axes.text(x + width / 2, y + HEIGHT / 2, text, ha="center", va="center", fontsize=8.5, zorder=3)
    for start, end in ARROWS:
        (x0, y0, width, *_), (x1, y1, *_) = BOXES[start], BOXES[end]
        points = (x0 + width + 0.06, y0 + HEIGHT / 2), (x1 - 0.06, y1 + HEIGHT / 2)
        axes.add_patch(FancyArrowPatch(*points, arrowstyle="-|>", mutation_scale=10, color="#555555"))
    # rollouts have ratios too; ratios and advantages make the loss, whose gradient updates the policy
    bends = {
        ((9.95, 2.95), (10.64, 2.25)): "arc3,rad=-0.2",
        ((9.95, 1.15), (10.64, 1.85)): "arc3,rad=0.2",
        ((11.2, 2.58), (2.65, 3.48)): "arc3,rad=0.28",
    }
    around = [(5.76, 2.65), (6.0, 2.65), (6.0, 1.38), (8.24, 1.38)]  # the verifier, which has no part in ratios
    axes.add_patch(FancyArrowPatch(path=Path(around), arrowstyle="-|>", mutation_scale=10, color="#555555"))
    for points, bend in bends.items():
        arrow: dict[str, Any] = dict(
            arrowstyle="-|>", mutation_scale=10, color="#555555", connectionstyle=bend, zorder=1
        )
        axes.add_patch(FancyArrowPatch(*points, **arrow))
    axes.text(6.9, 4.42, "update of the policy", ha="center", va="center", fontsize=8.5)
    return figure
