"""Table 3: other backbones, published; other base models of the embedded world, measured."""

from __future__ import annotations

import pandas as pd

from luffy.evaluation.paper_numbers import read_published

from . import tables
from .runs import Runs

SHOWN = ("sft", "on_policy", "luffy")
NOTE = (
    "Table 3. The paper (v5) on three backbones; the LLaMA models are trained on its easy set of 7.3k problems. "
    "Below, measured: the base models of the embedded world, by the share of answers in which they work step by step "
    "before training; accuracy in distribution (Avg) and out of it (Avg OOD)."
)


def data(runs: Runs) -> pd.DataFrame:
    """Columns origin, group, model, benchmark, accuracy (percent), half (of the 95% interval), seeds."""
    frame = read_published("table3").assign(origin="published", half=float("nan"), seeds=0).drop(columns="source")
    rows = []
    for model, chosen in runs.on_bases().items():
        wide = tables.wide_of(chosen, SHOWN)
        for name in [name for name in ("id", "ood") if name in wide]:
            for label, values in wide.iterrows():
                row = {"origin": "measured", "group": model, "model": label, "benchmark": name}
                rows.append(row | {"accuracy": values[name], "half": values[f"{name} +-"], "seeds": values["seeds"]})
    return pd.concat([frame, pd.DataFrame(rows)], ignore_index=True) if rows else frame


def table(runs: Runs) -> pd.DataFrame:
    frame = data(runs)
    parts = []
    for group, rows in frame.groupby("group", sort=False):
        wide = rows.pivot(index="model", columns="benchmark", values="accuracy")
        wide = wide.loc[list(dict.fromkeys(rows["model"]))]
        half = rows.pivot(index="model", columns="benchmark", values="half").loc[wide.index]
        measured = (rows["origin"] == "measured").any()
        columns = {}
        for name in [n for n in tables.BENCHMARK_LABELS if n in wide]:
            texts = {
                str(m): f"{v:.1f}" + (f" ± {half.loc[m, name]:.1f}" if half.loc[m, name] == half.loc[m, name] else "")
                for m, v in wide[name].items()
            }
            columns[tables.BENCHMARK_LABELS[name]] = tables.marked(wide[name], texts)
        part = pd.DataFrame(columns)
        part.insert(0, "backbone", f"{group} (measured)" if measured else str(group))
        parts.append(part.rename_axis("model").reset_index())
    order = ["backbone", "model", *tables.BENCHMARK_LABELS.values()]
    merged = pd.concat(parts, ignore_index=True)
    return merged[[name for name in order if name in merged]].fillna("–").set_index("backbone")
