"""Evaluations as tables: accuracy with intervals beside published numbers, pass@k, paired differences, disagreements.

Every function takes the evaluations of some models on the same benchmarks, {label: Evaluation}. Accuracies are
in percent; intervals are 95% bootstrap intervals over problems (stats.py).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.benchmarks import BENCHMARKS, Benchmark, LoadedBenchmark
from . import stats
from .stats import mean, pass_at_k

if TYPE_CHECKING:
    import pandas as pd

    from .evaluate import Evaluation

AVERAGES = {"id": "Avg", "ood": "Avg OOD"}  # of the benchmarks in and out of distribution, weighed equally
Evaluations = Mapping[str, "Evaluation"]


def summary(evaluations: Evaluations, loaded: Sequence[LoadedBenchmark]) -> pd.DataFrame:
    """One row per model and benchmark, and per average: accuracy (avg@k) with its interval; problems, samples; the
    second grader's accuracy (strict); mean length in tokens; shares of completions that hit the window (truncated),
    closed a think block (think), boxed an answer (boxed); how many the first grader did not get through (unchecked),
    which count as wrong."""
    import pandas as pd

    rows = []
    for label, evaluation in evaluations.items():
        results, strict = evaluation.results(), evaluation.results("strict")
        unchecked = Counter(row["benchmark"] for row in evaluation.rows() if row["unchecked"])
        for benchmark in (entry.benchmark for entry in loaded):
            result = results[benchmark.name]
            rows.append(
                {
                    "model": label,
                    "benchmark": benchmark.name,
                    "label": benchmark.label,
                    "metric": f"avg@{result.samples}",
                    **_percent(stats.bootstrap([result.scores])),
                    "strict": 100 * strict[benchmark.name].accuracy,
                    "problems": len(result.right),
                    "samples": result.samples,
                    "length": result.mean_length,
                    "truncated": result.truncated,
                    "think": result.think,
                    "boxed": result.boxed,
                    "unchecked": unchecked[benchmark.name],
                }
            )
        for name, members in _groups(loaded).items():
            row: dict[str, Any] = {"model": label, "benchmark": name, "label": AVERAGES[name], "metric": "mean"}
            row |= _percent(stats.bootstrap([results[member].scores for member in members]))
            strict_mean = mean([strict[member].accuracy for member in members])
            rows.append(row | {"strict": 100 * strict_mean})
    return pd.DataFrame(rows)


def main_table(
    measured: pd.DataFrame, loaded: Sequence[LoadedBenchmark], published: pd.DataFrame | None = None
) -> pd.DataFrame:
    """The paper's Table 1 as text: a row per model, a column per benchmark; "value [low, high]" where it was measured.

    measured: from `summary`; published: from paper_figures.read_published. Its models are added, marked as such, if it
    has any of the benchmarks; its averages only if they are over the same benchmarks as ours.
    """
    import pandas as pd

    groups = _groups(loaded)
    columns: dict[str, str] = {}
    for name in AVERAGES:
        part = [entry.benchmark for entry in loaded if entry.benchmark.ood == (name == "ood")]
        columns |= {benchmark.name: _heading(benchmark, measured) for benchmark in part}
        columns |= {name: AVERAGES[name]} if name in groups else {}
    cells: dict[str, dict[str, str]] = {}
    for row in measured.to_dict("records"):
        text = f"{row['accuracy']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"
        cells.setdefault(row["model"], {})[row["benchmark"]] = text
    if published is not None:
        known = set(published["benchmark"]) & BENCHMARKS.keys()
        theirs = {name: {b for b in known if BENCHMARKS[b].ood == (name == "ood")} for name in groups}
        shown = {name for name in columns if name not in AVERAGES or theirs[name] == set(groups[name])}
        several = published["group"].nunique() > 1
        for row in published.to_dict("records"):
            if row["benchmark"] in shown:
                label = f"{row['group']}, {row['model']}" if several else row["model"]
                cells.setdefault(f"{label} (published)", {})[row["benchmark"]] = f"{row['accuracy']:.1f}"
    frame = pd.DataFrame.from_dict(cells, orient="index", columns=list(columns)).fillna("–")
    frame.index.name = "model"
    return frame.rename(columns=columns)


def _heading(benchmark: Benchmark, measured: pd.DataFrame) -> str:
    """The benchmark's label and, where ours is less than the paper's, of how much."""
    rows = measured[measured["benchmark"] == benchmark.name]
    notes = []
    if benchmark.size and rows["problems"].max() < benchmark.size:
        notes.append(f"{rows['problems'].max():.0f} of {benchmark.size}")
    if benchmark.size and rows["samples"].max() < BENCHMARKS[benchmark.name].samples:
        notes.append(f"avg@{rows['samples'].max():.0f}")
    return benchmark.label + (f" ({', '.join(notes)})" if notes else "")


def pass_curves(evaluations: Evaluations, loaded: Sequence[LoadedBenchmark]) -> pd.DataFrame:
    """Unbiased pass@k for every k up to the number of samples: model, benchmark, k, value, low, high (percent)."""
    import pandas as pd

    rows = []
    for label, evaluation in evaluations.items():
        results = evaluation.results()
        for entry in loaded:
            result = results[entry.name]
            for k in range(1, result.samples + 1):
                chances = [pass_at_k(result.samples, right, k) for right in result.right]
                row = {"model": label, "benchmark": entry.name, "k": k}
                rows.append(row | _percent(stats.bootstrap([chances]), name="value"))
    return pd.DataFrame(rows)


def differences(evaluations: Evaluations, loaded: Sequence[LoadedBenchmark], against: str) -> pd.DataFrame:
    """How much better each model is than the model `against`, in points, by a paired bootstrap: model, benchmark,
    difference, low, high, p. A problem left out for one of the models is left out for both.

    Raises ValueError if there is no such model.
    """
    import pandas as pd

    if against not in evaluations:
        raise ValueError(f"no model {against!r} was evaluated: there are {', '.join(evaluations)}")
    scores = {label: _scores_by_problem(evaluation) for label, evaluation in evaluations.items()}
    rows = []
    for label in [label for label in evaluations if label != against]:
        pairs: dict[str, tuple[list[float], list[float]]] = {}
        for entry in loaded:
            first, second = (scores[model][entry.name] for model in (label, against))
            shared = sorted(first.keys() & second.keys())
            if shared:
                pairs[entry.name] = [first[i] for i in shared], [second[i] for i in shared]
        members = {name: [name] for name in pairs} | {
            name: [member for member in group if member in pairs] for name, group in _groups(loaded).items()
        }
        for name, group in members.items():
            if group:
                gap = stats.paired_bootstrap([pairs[m][0] for m in group], [pairs[m][1] for m in group])
                row: dict[str, Any] = {"model": label, "against": against, "benchmark": name}
                rows.append(row | _percent(gap, name="difference") | {"p": gap.p})
    return pd.DataFrame(rows, columns=["model", "against", "benchmark", "difference", "low", "high", "p"])


def disagreements(evaluations: Evaluations, ending: int = 120) -> pd.DataFrame:
    """Every completion on which the two graders disagree: what was asked for, what the strict rule read, both
    verdicts, and the last characters of the completion."""
    import pandas as pd

    columns = ["model", "benchmark", "problem", "sample", "answer", "given", "right", "strict", "ending"]
    rows = []
    for label, evaluation in evaluations.items():
        differing = [row for row in evaluation.rows() if row["right"] != row["strict"]]
        completions = evaluation.completions() if differing else {}
        for row in differing:
            text = completions[row["benchmark"], row["problem"], row["key"]][row["sample"]].text
            rows.append({"model": label, **row, "ending": text[-ending:]})
    return pd.DataFrame(rows, columns=columns)


def report(
    evaluations: Evaluations, loaded: Sequence[LoadedBenchmark], published: pd.DataFrame, against: str = ""
) -> dict[str, pd.DataFrame]:
    """All tables by name. against: the model that the others are compared with, the first unless said otherwise."""
    measured = summary(evaluations, loaded)
    return {
        "table": main_table(measured, loaded, published),
        "summary": measured,
        "differences": differences(evaluations, loaded, against or next(iter(evaluations))),
        "pass": pass_curves(evaluations, loaded),
        "disagreements": disagreements(evaluations),
    }


def write(frames: Mapping[str, pd.DataFrame], folder: str | Path) -> list[Path]:
    """Writes each table as NAME.md, NAME.tex (booktabs) and NAME.csv; an index without a name is left out."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, frame in frames.items():
        rounded = (frame.reset_index() if frame.index.name is not None else frame).round(3)
        # Answers are untrusted text: a line of it must stay in its cell.
        lines = rounded.map(lambda cell: " ".join(cell.split()) if isinstance(cell, str) else cell)
        piped = lines.map(lambda cell: cell.replace("|", "\\|") if isinstance(cell, str) else cell)
        for suffix, text in {
            "md": piped.astype(object).where(piped.notna(), "").to_markdown(index=False, disable_numparse=True) + "\n",
            "tex": lines.to_latex(index=False, escape=True, na_rep="--"),
            "csv": rounded.to_csv(index=False),
        }.items():
            path = folder / f"{name}.{suffix}"
            path.write_text(text, encoding="utf-8")
            paths.append(path)
    return paths


def _percent(interval: stats.Interval, name: str = "accuracy") -> dict[str, float]:
    return {name: 100 * interval.value, "low": 100 * interval.low, "high": 100 * interval.high}


def _groups(loaded: Sequence[LoadedBenchmark]) -> dict[str, list[str]]:
    """The benchmarks that each average is over; an average of one is none."""
    groups = {name: [entry.name for entry in loaded if entry.benchmark.ood == (name == "ood")] for name in AVERAGES}
    return {name: members for name, members in groups.items() if len(members) > 1}


def _scores_by_problem(evaluation: Evaluation) -> dict[str, dict[int, float]]:
    """Per benchmark, each problem's share of right samples."""
    scores: defaultdict[str, defaultdict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in evaluation.rows():
        scores[row["benchmark"]][row["problem"]].append(row["right"])
    return {name: {i: mean(right) for i, right in problems.items()} for name, problems in scores.items()}
