"""The paper's tables and figures, from its published numbers and from the metrics of our runs.

A module per table or figure: `data(runs)` is what it shows, as a data frame, and `draw(data)` or `table(runs)` what it
looks like. Runs are the committed ones (paper_figures/runs) or anyone's own (runs.load).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .runs import Runs

TABLES = ("table1_main", "table2_resources", "table3_backbones", "table4_ablation")
FIGURES = (
    "figure1_overview", "figure2_weighting", "figure3_backbones", "figure4_hard", "figure5_dynamics", "figure6_shaping",
    "figure7_case", "figure8_clip", "figure9_gamma", "figure10_lengths", "figure11_sft_length", "figure12_temperature",
)  # fmt: skip


def module(name: str) -> Any:
    """The module of a table or figure. Raises ValueError if there is none."""
    if name not in (*TABLES, *FIGURES):
        raise ValueError(f"no table or figure {name!r}: there are {', '.join((*TABLES, *FIGURES))}")
    return importlib.import_module(f".{name}", __name__)


def draw(name: str, runs: Runs) -> Figure:
    """The figure of that name. Raises ValueError if there is none."""
    import matplotlib.pyplot as plt

    from luffy.study import style

    maker = module(name)
    with plt.rc_context(style.RC):
        return maker.draw(maker.data(runs))


def draw_all(runs: Runs, out: Path, names: Sequence[str] = ()) -> Iterator[Path]:
    """Writes every table and figure, or those whose names begin so ("figure2" is figure 2), and yields the files.

    Raises ValueError for a name that none begins with.
    """
    from . import files, tables

    chosen = [name for name in (*TABLES, *FIGURES) if not names or name in names or name.split("_")[0] in names]
    unknown = [name for name in names if not any(name in (known, known.split("_")[0]) for known in chosen)]
    if unknown:
        raise ValueError(f"no table or figure {', '.join(unknown)}: there are {', '.join((*TABLES, *FIGURES))}")
    for name in chosen:
        maker = module(name)
        if name in TABLES:
            yield from tables.write(maker.table(runs), name, maker.NOTE, runs, out)
        else:
            yield from files.save(draw(name, runs), name, maker.CAPTION, runs, out)
