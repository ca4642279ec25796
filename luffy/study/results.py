"""What came out of many runs, as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..evaluation.stats import interval
from ..methods import METHODS
from .experiments import Job
from .inference import welch

if TYPE_CHECKING:
    import pandas as pd


def curves(jobs: Sequence[Job]) -> pd.DataFrame:
    """The metrics of all runs, one row per run and step, with columns method, variant, seed, stage, step and the
    metrics."""
    import pandas as pd

    rows = [
        {"method": job.config.method.name, "variant": job.variant, "seed": job.config.seed, **row}
        for job in jobs
        for row in job.rows()
    ]
    return pd.DataFrame(rows)


SCORED = 4  # validations at the end of a run whose mean is its score


def per_run(jobs: Sequence[Job]) -> pd.DataFrame:
    """One row per complete run: its score in and out of distribution and by family, its base model's, pass@k,
    behaviour and cost.

    The score (`id`, `ood`, a column per family) is the mean accuracy of the last SCORED validations: one checkpoint
    alone is too noisy. Where a run has none, it is that of the final evaluation. From the latter come always pass@k
    (in distribution), accuracies at further temperatures ("id T=0.1"), and the error that is due to the choice of
    problems ("id problems"). "base id", "base ood" and "base FAMILY" are from
    the validation before the first step. entropy, entropy_answer, length and boxed are means over the last fifth of
    the last stage's steps; tokens, seconds and demonstrations (rows that are a trace or begin in one) are sums over all
    stages, seconds of training steps, without evaluation and start.
    """
    import pandas as pd

    rows = []
    for job in jobs:
        if not job.run.is_complete:
            continue
        evaluation = job.run.evaluation()
        metrics = job.rows()
        steps = [row for row in metrics if "time/step" in row]
        tail = [row for row in steps if row["stage"] == steps[-1]["stage"]]
        tail = tail[-max(1, len(tail) // 5) :]
        # totals count within a stage: the last row of each stage holds that stage's sum
        ends = [
            row
            for row, after in zip(steps, [*steps[1:], {"stage": None}], strict=True)
            if row["stage"] != after["stage"]
        ]
        row: dict[str, Any] = {"method": job.config.method.name, "variant": job.variant, "seed": job.config.seed}
        row["model"] = job.config.model
        row |= _score(metrics, evaluation) | _final(job, evaluation)
        row |= {f"base {name}": value for name, value in _validated(metrics[0]).items() if metrics[0]["step"] == 0}
        for name, key in BEHAVIOUR.items():
            sampled = [r[key] for r in tail if key in r and r["groups/off_policy_share"] < 1]
            row[name] = sum(sampled) / len(sampled) if sampled else float("nan")
        row |= {
            "prompts": sum(end["total/prompts"] for end in ends),
            "generated_tokens": sum(end["total/generated_tokens"] for end in ends),
            "trained_tokens": sum(end["total/trained_tokens"] for end in ends),
            "demonstrations": sum(end.get("total/demonstrations", math.nan) for end in ends),
            "seconds": sum(r["time/step"] for r in steps),
        }
        rows.append(row)
    return pd.DataFrame(rows)


BEHAVIOUR = {
    "entropy": "entropy/on",
    "entropy_answer": "entropy/answer",
    "length": "length/on",
    "boxed": "boxed/on",
}


def _validated(row: dict[str, Any]) -> dict[str, float]:
    """The accuracies of a row's validation: id, ood, and by family."""
    found = {name: row[f"eval/{name}"] for name in ("id", "ood") if f"eval/{name}" in row}
    families = [name.split("/")[1] for name in row if name.startswith("eval/") and name.endswith("/accuracy")]
    return found | {family: row[f"eval/{family}/accuracy"] for family in families}


def _score(metrics: list[dict[str, Any]], evaluation: dict[str, Any]) -> dict[str, float]:
    last = metrics[-1]["stage"] if metrics else 0
    # not the row before the first step
    trained = [row for row in metrics if row["stage"] == last and "time/step" in row]
    scored = [found for row in trained if (found := _validated(row))][-SCORED:]
    if scored:
        return {name: sum(found[name] for found in scored) / len(scored) for name in scored[-1]}
    return evaluation["averages"] | {name: result["accuracy"] for name, result in evaluation["families"].items()}


def _final(job: Job, evaluation: dict[str, Any]) -> dict[str, float]:
    """pass@k in distribution, and the averages at further temperatures."""
    options = job.config.evaluation
    known = [family for family in evaluation["families"] if family not in options.ood_sources]
    found = {}
    if known:
        passes = [evaluation["families"][name]["pass_at"][str(options.final_eval_samples)] for name in known]
        found[f"pass@{options.final_eval_samples}"] = sum(passes) / len(passes)
    for temperature, other in evaluation.get("temperatures", {}).items():
        found |= {f"{name} T={temperature}": value for name, value in other["averages"].items()}
    asked = options.eval_problems if options.eval_steps else 0
    for column, members in {"id": known, "ood": [f for f in evaluation["families"] if f not in known]}.items():
        if members:
            found[f"{column} problems"] = _problem_error([evaluation["families"][name] for name in members], asked)
    return found


def _problem_error(families: Sequence[dict[str, Any]], asked: int) -> float:
    """Standard error of a score, a mean over families, that comes from which problems they have. asked: problems of a
    family in the validations that the score is of; 0: it is of the final evaluation, whose problems show how much
    problems differ."""
    variances = []
    for family in families:
        scores = [right / family["samples"] for right in family["right"]]
        variances.append(statistics.variance(scores) / (asked or len(scores)) if len(scores) > 1 else 0.0)
    return math.sqrt(sum(variances)) / len(families)


PERCENT = ("id", "ood")
WHOLE = ("length", "prompts", "generated_tokens", "trained_tokens", "seconds")
BASE = "Base"


def is_percent(column: str) -> bool:
    return column in PERCENT or column.startswith(("pass@", "id T=", "ood T="))


def summary(jobs: Sequence[Job]) -> pd.DataFrame:
    """The ablation table: a row for the base model and one per method, mean +- half-width of the 95% interval over
    seeds, as text.

    Accuracies and pass@k are in percent. With a single seed there is no interval over seeds; `id` and `ood` then have
    in brackets what the choice of evaluation problems leaves open, which is a statement about one model only.
    """
    import pandas as pd

    runs = per_run(jobs)
    if runs.empty:
        return runs
    percents = [column for column in runs if is_percent(column)]
    shown = [*percents, *(column for column in ("entropy", "entropy_answer", *WHOLE) if column in runs)]
    rows = []
    if any(column.startswith("base ") for column in runs):
        models = base_scores(runs)
        known = {column: models[f"base {column}"] for column in PERCENT if f"base {column}" in models}
        cells = {column: _cell(column, known[column].tolist()) if column in known else "–" for column in shown}
        rows.append({"method": BASE, "seeds": len(models), **cells})
    for method in [m for m in METHODS if m in set(runs["method"])]:
        part = runs[runs["method"] == method]
        cells = {column: _cell(column, part[column].tolist()) for column in shown}
        for column in PERCENT if len(part) == 1 else ():
            if f"{column} problems" in part:
                half = 100 * 1.96 * float(part[f"{column} problems"].iloc[0])
                mean = 100 * float(part[column].iloc[0])
                cells[column] += f" [{mean - half:.1f}, {mean + half:.1f}]"
        rows.append({"method": METHODS[method].label, "seeds": len(part), **cells})
    return pd.DataFrame(rows).set_index("method")


def base_scores(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per base model ("model"): the means over its runs of what the validations before the first step found
    ("base id", ...). Each run samples other answers of the same model."""
    return runs.groupby("model", sort=False)[[column for column in runs if column.startswith("base ")]].mean()


def _cell(column: str, values: Sequence[float]) -> str:
    scale = 100 if is_percent(column) else 1
    mean, half = (scale * value for value in interval(values))
    digits = 0 if column in WHOLE else 1 if scale == 100 else 3
    if mean != mean:
        return "–"
    return f"{mean:,.{digits}f} ± {half:,.{digits}f}" if half == half else f"{mean:,.{digits}f}"


def differences(jobs: Sequence[Job], method: str = "luffy", columns: Sequence[str] = PERCENT) -> pd.DataFrame:
    """How much better `method` is than each other method, in points of accuracy.

    Columns per measure: the difference of the means, and low and high ends of its 95% interval over seeds (Welch; NaN
    with one seed).
    """
    import pandas as pd

    runs = per_run(jobs)
    rows = []
    for other in [m for m in METHODS if m != method and m in set(runs.get("method", ()))]:
        pair = [runs[runs["method"] == m] for m in (method, other)]
        row: dict[str, Any] = {"against": METHODS[other].label}
        for column in [c for c in columns if c in runs]:
            effect = welch(100 * pair[0][column], 100 * pair[1][column])
            row |= {column: effect.value, f"{column} low": effect.low, f"{column} high": effect.high}
        rows.append(row)
    return pd.DataFrame(rows).set_index("against") if rows else pd.DataFrame()
