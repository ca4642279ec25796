"""The paper's tables and figures, from its published numbers and from the metrics of our runs; the map and the arena.

A module per table or figure: `data(runs)` is what it shows, as a data frame, and `draw(data)` or `table(runs)` what it
looks like. Runs are the committed ones (paper_figures/runs) or anyone's own (runs.load).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from .runs import Runs

TABLES = ("table1_main", "table2_resources", "table3_backbones", "table4_ablation")
FIGURES = (
    "figure1_overview", "figure2_weighting", "figure3_backbones", "figure4_hard", "figure5_dynamics", "figure6_shaping",
    "figure7_case", "figure8_clip", "figure9_gamma", "figure10_lengths", "figure11_sft_length", "figure12_temperature",
    "map", "arena",
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


def caption(name: str, verdicts: pd.DataFrame) -> str:
    """The caption of a figure, or a table's note, and in which of its claims our runs contradict the paper.

    verdicts: from claims.table.
    """
    maker = module(name)
    text = maker.NOTE if name in TABLES else maker.CAPTION
    found = re.match(r"(table|figure)(\d+)", name)
    if not found:
        return text
    place = f"{found[1].capitalize()} {found[2]}"
    where = verdicts["where"].str.replace("Figures", "Figure").str.replace(r" and (\d)", r", Figure \1", regex=True)
    mine = verdicts[[place in re.split(r", ", text) for text in where]]
    against = mine[mine["verdict"].isin(["contradicted", "no effect"])]
    if against.empty:
        return text
    said = [
        f"{row['claim']} ({row['verdict']}: {row['ours']:+.2f} {row['unit']})" for row in against.to_dict("records")
    ]
    return f"{text} In our runs, unlike in the paper, this does not hold: {'; '.join(said)}."


def draw_all(runs: Runs, out: Path, names: Sequence[str] = ()) -> Iterator[Path]:
    """Writes every table and figure, or those whose names begin so ("figure2" is figure 2), and yields the files.

    Raises ValueError for a name that none begins with.
    """
    from . import claims, files, tables

    chosen = [name for name in (*TABLES, *FIGURES) if not names or name in names or name.split("_")[0] in names]
    unknown = [name for name in names if not any(name in (known, known.split("_")[0]) for known in chosen)]
    if unknown:
        raise ValueError(f"no table or figure {', '.join(unknown)}: there are {', '.join((*TABLES, *FIGURES))}")
    verdicts = claims.table(runs)
    for name in chosen:
        said = caption(name, verdicts)
        if name in TABLES:
            yield from tables.write(module(name).table(runs), name, said, runs, out)
        else:
            yield from files.save(draw(name, runs), name, said, runs, out)
