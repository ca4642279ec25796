"""Pictures of runs: one look per method everywhere, live curves in a notebook, and the ablation's plots."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from ..methods import METHODS
from ..shaping import Shaping
from . import results, style
from .experiments import Job, Status

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TITLES = {
    "reward/on": "reward of rollouts",
    "entropy/on": "entropy of rollouts (nats)",
    "length/on": "length of rollouts (tokens)",
    "eval/id": "validation accuracy, in distribution",
    "eval/ood": "validation accuracy, out of distribution",
    "off_policy_prob": "probability of trace tokens",
    "pg_clipfrac": "share of clipped tokens",
    "sft_loss": "negative log-likelihood of traces",
}
SPARSE = ("eval/",)  # measured every now and then: points joined, not smoothed


def plot_curves(data: pd.DataFrame, metrics: Sequence[str], smooth: int = 9) -> Figure:
    """One panel per metric over steps, one line per method: the mean over seeds and the range they span.

    data: from results.curves. Dense metrics are smoothed by a centred rolling mean over `smooth` steps. Steps
    without rollouts (supervised stages) leave gaps in metrics of rollouts.
    """
    figure, axes = style.grid(len(metrics))
    for axis, metric in zip(axes, metrics, strict=True):
        axis.set(title=TITLES.get(metric, metric), xlabel="step")
        if metric not in data:
            continue
        shown = data
        if metric.startswith("off_"):
            shown = data[data[metric] > 0]  # 0 says that no demonstration took part in the policy loss
        style.draw_curves(axis, style.averaged(shown, metric, 1 if metric.startswith(SPARSE) else smooth))
        if metric.startswith(("reward", "eval")):
            axis.set_ylim(bottom=0)
    style.legend_below(figure, axes)
    return figure


def plot_accuracies(jobs: Sequence[Job]) -> Figure:
    """Final accuracy of every method in and out of distribution; a dot per seed, a bar at their mean."""
    table = results.per_run(jobs)
    columns = [column for column in ("id", "ood") if column in table]
    methods = [m for m in METHODS if m in set(table["method"])]
    figure, axes = style.grid(max(1, len(columns)), columns=2, height=0.8 + 0.33 * max(1, len(methods)))
    for axis, column in zip(axes, columns, strict=False):
        for place, method in enumerate(reversed(methods)):
            values = 100 * table[table["method"] == method][column]
            axis.barh(place, values.mean(), color=style.look(method)["color"], alpha=0.55)
            axis.plot(values, np.full(len(values), place), "o", color="black", markersize=3)
        axis.set_yticks(range(len(methods)), [METHODS[m].label for m in reversed(methods)])
        where = "in distribution" if column == "id" else "out of distribution"
        axis.set(title=f"accuracy {where} (%)", xlim=(0, 100))
        axis.grid(axis="y", visible=False)
    return figure


def plot_pass_curves(data: pd.DataFrame) -> Figure:
    """pass@k over k with its interval, one panel per benchmark with several samples, one line per model.

    data: from tables.pass_curves.
    """
    several = data.groupby("benchmark", sort=False)["k"].transform("max") > 1
    benchmarks, models = list(dict.fromkeys(data[several]["benchmark"])), list(dict.fromkeys(data["model"]))
    figure, axes = style.grid(len(benchmarks) or 1, columns=4, height=2.6)
    colors = plt.get_cmap("tab10" if len(models) <= 10 else "tab20")
    for axis, benchmark in zip(axes, benchmarks, strict=False):
        for place, model in enumerate(models):
            rows = data[(data["benchmark"] == benchmark) & (data["model"] == model)]
            axis.plot(rows["k"], rows["value"], "o-", markersize=3, color=colors(place), label=model)
            axis.fill_between(rows["k"], rows["low"], rows["high"], color=colors(place), alpha=0.15, linewidth=0)
        ticks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= data["k"].max()]
        axis.set(title=benchmark, xlabel="k", ylabel="pass@k (%)", ylim=(0, 100), xscale="log")
        axis.set_xticks(ticks, list(map(str, ticks)), minor=False)
        axis.minorticks_off()
    if benchmarks:
        lines = axes[0].get_lines()
        figure.legend(handles=lines, loc="outside lower center", ncols=min(5, len(lines)), frameon=False)
    return figure


def plot_counts(counts: Mapping[str, int]) -> Figure:
    """Named counts as bars, the first at the top."""
    figure, (axes,) = style.panels(1, width=8.0, height=0.26 * len(counts) + 0.5)
    bars = axes.barh(list(counts), list(counts.values()), color=style.BASE["color"])
    axes.bar_label(bars, [f" {count:,}" for count in counts.values()], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_lengths(lengths: Sequence[int]) -> Figure:
    """How often each length of a trace in tokens occurs."""
    figure, (axes,) = style.panels(1, width=5.0, height=2.5)
    axes.hist(lengths, bins=30, color=style.BASE["color"])
    title = f"{len(lengths):,} traces, mean {sum(lengths) / len(lengths):,.0f}"
    axes.set(xlabel="trace length (tokens)", ylabel="traces", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_shapings(shapings: dict[str, Shaping]) -> Figure:
    """Loss and gradient weight of each shaping over the probability of the token (Fig. 2, middle and right)."""
    import torch

    probability = torch.linspace(1e-3, 1, 500, dtype=torch.float64)
    figure, (loss, gradient) = style.grid(2, columns=2)
    for label, shape in shapings.items():
        loss.plot(probability, shape(probability), label=label)
        gradient.plot(probability, shape.gradient_weight(probability) * (1 - probability), label=label)
    loss.set(title="loss weight f(π)", xlabel="probability of the token π")
    gradient.set(title="gradient weight f'(π) π (1 − π)", xlabel="probability of the token π")
    style.legend_below(figure, [gradient])
    return figure


def progress_line(statuses: Sequence[Status]) -> str:
    """One line on how far a set of runs is, with a bar."""
    states = Counter(status.state for status in statuses)
    done = sum(status.step for status in statuses)
    total = sum(status.job.total_steps for status in statuses)
    bar = "█" * (30 * done // total) + "░" * (30 - 30 * done // total)
    counts = ", ".join(
        f"{states[state]} {state}" for state in ("complete", "running", "waiting", "failed") if states[state]
    )
    return f"{bar} {done:,} of {total:,} steps · runs: {counts}"


def follow(
    updates: Iterable[list[Status]],
    metrics: Sequence[str] = ("reward/on", "entropy/on", "length/on"),
    every_s: float = 10,
) -> list[Status]:
    """Shows runs while they go on: a line and live curves in a notebook, a line now and then elsewhere.

    updates: from experiments.run. Returns the last status. Interrupting it does not stop what is running.
    """
    from IPython import get_ipython
    from IPython.display import display

    notebook = get_ipython() is not None
    line = display({"text/plain": ""}, raw=True, display_id=True) if notebook else None
    picture = display({"text/plain": ""}, raw=True, display_id=True) if notebook else None
    drawn, started, statuses = 0.0, time.monotonic(), []
    for statuses in updates:
        finished = all(status.state in ("complete", "failed") for status in statuses)
        if not finished and drawn and time.monotonic() - drawn < every_s:
            continue
        drawn = time.monotonic()
        text = f"{progress_line(statuses)} · {drawn - started:.0f} s"
        if line is None or picture is None:
            print(text, flush=True)
            continue
        line.update({"text/plain": text}, raw=True)
        data = results.curves([status.job for status in statuses])
        if len(data):
            picture.update(plot_curves(data, metrics))
    return statuses
