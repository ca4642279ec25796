"""How figures are saved: vector and bitmap, with where they came from, and what a panel without data says."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from luffy import __version__
from luffy.study.style import RC

from .runs import Runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def missing(axes: Axes, message: str) -> None:
    """Says in a panel which command makes the data that it lacks."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.text(0.5, 0.5, textwrap.fill(message, 34), ha="center", va="center", transform=axes.transAxes, fontsize=7.5)


def save(figure: Figure, name: str, caption: str, runs: Runs, out: Path) -> list[Path]:
    """Writes NAME.png, .svg and .pdf, which carry where they came from, and NAME.md with the caption."""
    out.mkdir(parents=True, exist_ok=True)
    versions = sorted({facts["luffy"] for facts in runs.manifest.values()})
    source = f"luffy {__version__}; {len(runs.runs)} runs from {runs.source}; code of the runs: {', '.join(versions)}"
    title = {"Title": name}
    metadata = {
        "png": {**title, "Description": source, "Software": None},
        "svg": {**title, "Description": source, "Date": None},
        "pdf": {**title, "Subject": source, "CreationDate": None},
    }
    paths = []
    with plt.rc_context(RC):
        for suffix, facts in metadata.items():
            paths.append(out / f"{name}.{suffix}")
            figure.savefig(paths[-1], metadata=facts)
    paths.append(out / f"{name}.md")
    listed = "".join(f"- {facts['run']}, luffy {facts['luffy']}\n" for facts in runs.manifest.values())
    paths[-1].write_text(f"{caption}\n\nMade from: {source}.\n\n{listed}", encoding="utf-8")
    return paths
