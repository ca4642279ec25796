"""What the tables share: published numbers beside measured ones, best and second best marked, three formats."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from luffy import tables as luffy_tables
from luffy.evaluation.paper_numbers import read_published
from luffy.evaluation.stats import interval
from luffy.methods import METHODS
from luffy.study.results import BASE, base_scores

from .runs import MAIN_SET, RESULTS, SETTINGS, Runs, recipe

BENCHMARK_LABELS = {
    "aime24": "AIME 24", "aime25": "AIME 25", "amc": "AMC", "math500": "MATH-500", "minerva": "Minerva",
    "olympiad": "Olympiad", "id": "Avg", "arc_c": "ARC-c", "gpqa": "GPQA", "mmlu_pro": "MMLU-Pro", "ood": "Avg OOD",
}  # fmt: skip
# Columns of runs.csv that are not the accuracy on one benchmark.
NOT_BENCHMARKS = {"run", "set", "method", "seed", *SETTINGS, *RESULTS}
BASE_NAMES = {"Qwen2.5-Math-7B": BASE}  # what Table 1 calls it


def published_wide(table: str, group: str | None = None) -> pd.DataFrame:
    """A published table as the paper prints it: a row per model, a column per benchmark, percent."""
    frame = read_published(table)
    if group is not None:
        frame = frame[frame["group"] == group]
    order = [name for name in BENCHMARK_LABELS if name in set(frame["benchmark"])]
    models = list(dict.fromkeys(frame["model"]))
    wide = frame.pivot(index="model", columns="benchmark", values="accuracy").loc[models, order]
    return wide.rename(index=BASE_NAMES)


def measured_wide(runs: Runs, methods: Sequence[str], run_set: str = MAIN_SET) -> pd.DataFrame:
    """Per method mean and half-width of the 95% interval over seeds, percent: columns NAME, NAME +-, seeds. NAME is
    id, the benchmarks of the runs, ood; what they did not measure is left out. The first row is the base model."""
    return wide_of(runs.runs[runs.runs["set"] == run_set], methods)


def wide_of(chosen: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """As measured_wide, of some rows of runs.csv."""
    skipped = ("pass@", "base ", "id ", "ood ")
    benchmarks = [name for name in chosen if name not in NOT_BENCHMARKS and not name.startswith(skipped)]
    # of one benchmark in distribution the average is it
    benchmarks = [name for name in benchmarks if not chosen[name].equals(chosen["id"])]
    names = [name for name in ("id", *benchmarks, "ood") if chosen[name].notna().any()]
    rows: dict[str, dict[str, float]] = {}
    first = base_scores(chosen)
    if len(first) and first["base id"].notna().any():
        base: dict[str, float] = {"seeds": len(first)}
        for name in names:
            base[name], base[f"{name} +-"] = (100 * value for value in interval(first[f"base {name}"].tolist()))
        rows[BASE] = base
    for method in [m for m in methods if m in set(chosen["method"])]:
        part = chosen[chosen["method"] == method]
        row: dict[str, float] = {"seeds": len(part)}
        for name in names:
            row[name], row[f"{name} +-"] = (100 * value for value in interval(part[name].tolist()))
        rows[METHODS[method].label] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def tier(runs: Runs, run_set: str = MAIN_SET) -> str:
    """What measured columns are marked with: the base models of the runs, without their seeds."""
    models = runs.runs[runs.runs["set"] == run_set]["model"].map(recipe)
    return ", ".join(sorted(set(models)))


def side_by_side(paper: pd.DataFrame, ours: pd.DataFrame, mark: str) -> pd.DataFrame:
    """Text: the paper's columns, then ours, marked, with intervals and the number of seeds; best and second best."""
    columns: dict[str, dict[str, str]] = {}
    for name in paper:
        columns[BENCHMARK_LABELS[name]] = marked(paper[name], {m: f"{v:.1f}" for m, v in paper[name].items()})
    for name in [name for name in ours if f"{name} +-" in ours]:
        texts = {model: with_interval(row[name], row[f"{name} +-"]) for model, row in ours.iterrows()}
        columns[f"{BENCHMARK_LABELS.get(name, name)} ({mark})"] = marked(ours[name], texts)
    if len(ours):
        columns["seeds"] = {model: f"{row['seeds']:.0f}" for model, row in ours.iterrows()}
    order = list(dict.fromkeys([*paper.index, *ours.index]))
    frame = pd.DataFrame(columns, index=order).fillna("–")
    frame.index.name = "model"
    return frame


def with_interval(value: float, half: float) -> str:
    """`52.3 ± 1.2`, without the half-width where it is NaN."""
    return f"{value:.1f}" + (f" ± {half:.1f}" if half == half else "")


def marked(values: pd.Series, texts: dict[str, str]) -> dict[str, str]:
    """The texts with the largest value in ** and the second largest in *, ties alike."""
    ranks = values.dropna().rank(ascending=False, method="min")
    second = ranks[ranks > 1].min()
    marks = {model: "**" if rank == 1 else "*" if rank == second else "" for model, rank in ranks.items()}
    return {str(model): f"{mark}{texts[str(model)]}{mark}" for model, mark in marks.items()}


def write(frame: pd.DataFrame, name: str, note: str, runs: Runs, out: Path) -> list[Path]:
    """Writes NAME.md with the note and where the numbers come from, NAME.tex (booktabs) and NAME.csv (no marks)."""
    paths = luffy_tables.write({name: frame}, out)
    versions = sorted({facts["luffy"] for facts in runs.manifest.values()})
    source = f"Measured: {len(runs.runs)} runs from {runs.source}; code of the runs: {', '.join(versions)}."
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".tex":
            text = re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text)
            text = re.sub(r"\*(.+?)\*", r"\\underline{\1}", text)
            text = f"% {source}\n{text}"
        elif path.suffix == ".csv":
            text = text.replace("*", "")
        else:
            marks = "**Best**, *second best*; ± half-width of the 95% interval over seeds (of Base: over base models)."
            text = f"{text}\n{note}\n\n{marks}\n\n{source}\n"
        path.write_text(text, encoding="utf-8")
    return paths
