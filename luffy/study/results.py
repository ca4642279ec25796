"""What came out of many runs, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import stats
from ..methods import METHODS
from ..stats import interval
from .experiments import Job

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


def per_run(jobs: Sequence[Job]) -> pd.DataFrame:
    """One row per complete run: accuracy in and out of distribution and by family, pass@k, behaviour and cost.

    entropy and length are means over the last fifth of the last stage's steps; tokens and seconds are sums over all
    stages. seconds is time in training steps, without evaluation and start.
    """
    import pandas as pd

    rows = []
    for job in jobs:
        if not job.run.is_complete:
            continue
        evaluation = job.run.evaluation()
        steps = [row for row in job.rows() if "time/step" in row]
        tail = [row for row in steps if row["stage"] == steps[-1]["stage"]]
        tail = tail[-max(1, len(tail) // 5) :]
        # totals count within a stage: the last row of each stage holds that stage's sum
        ends = [
            row
            for row, after in zip(steps, [*steps[1:], {"stage": None}], strict=True)
            if row["stage"] != after["stage"]
        ]
        in_distribution = [f for f in evaluation["families"] if f not in job.config.evaluation.ood_sources]
        samples = job.config.evaluation.final_eval_samples
        row: dict[str, Any] = {"method": job.config.method.name, "variant": job.variant, "seed": job.config.seed}
        row |= evaluation["averages"]
        if in_distribution:
            passes = [evaluation["families"][family]["pass_at"][str(samples)] for family in in_distribution]
            row[f"pass@{samples}"] = sum(passes) / len(passes)
        row |= {family: result["accuracy"] for family, result in evaluation["families"].items()}
        for name, key in {"entropy": "entropy/on", "length": "length/on"}.items():
            sampled = [r[key] for r in tail if r["groups/off_policy_share"] < 1]
            row[name] = sum(sampled) / len(sampled) if sampled else float("nan")
        row |= {
            "prompts": sum(end["total/prompts"] for end in ends),
            "generated_tokens": sum(end["total/generated_tokens"] for end in ends),
            "trained_tokens": sum(end["total/trained_tokens"] for end in ends),
            "seconds": sum(r["time/step"] for r in steps),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def problem_interval(job: Job, families: Sequence[str]) -> stats.Interval:
    """Bootstrap interval, over evaluation problems, of the mean accuracy over families of one run's final evaluation.

    It says how far the evaluation of this one model can be trusted, not how another seed would turn out.
    """
    results = [job.run.evaluation()["families"][family] for family in families]
    return stats.bootstrap([[right / result["samples"] for right in result["right"]] for result in results])


PERCENT = ("id", "ood")
WHOLE = ("length", "prompts", "generated_tokens", "trained_tokens", "seconds")


def summary(jobs: Sequence[Job]) -> pd.DataFrame:
    """The ablation table: a row per method, mean +- half-width of the 95% interval over seeds, as text.

    Accuracies and pass@k are in percent. With a single seed there is no interval over seeds; `id` and `ood` then show
    the bootstrap interval over evaluation problems in brackets, which is a statement about one model only.
    """
    import pandas as pd

    runs = per_run(jobs)
    if runs.empty:
        return runs
    shown = [c for c in ("id", "ood", *(c for c in runs if c.startswith("pass@")), "entropy", *WHOLE) if c in runs]
    by_key = {(job.config.method.name, job.config.seed): job for job in jobs}
    rows = []
    for method in [m for m in METHODS if m in set(runs["method"])]:
        part = runs[runs["method"] == method]
        row: dict[str, Any] = {"method": METHODS[method].label, "seeds": len(part)}
        for column in shown:
            scale = 100 if column in PERCENT or column.startswith("pass@") else 1
            mean, half = (value * scale for value in interval(part[column].tolist()))
            digits = 0 if column in WHOLE else 1 if scale == 100 else 3
            if mean != mean:
                text = "–"
            elif half == half:
                text = f"{mean:,.{digits}f} ± {half:,.{digits}f}"
            else:
                text = f"{mean:,.{digits}f}"
                if column in PERCENT:
                    job = by_key[method, int(part["seed"].iloc[0])]
                    ood = set(job.config.evaluation.ood_sources)
                    families = [f for f in job.run.evaluation()["families"] if (f in ood) == (column == "ood")]
                    bounds = problem_interval(job, families)
                    text += f" [{100 * bounds.low:.1f}, {100 * bounds.high:.1f}]"
            row[column] = text
        rows.append(row)
    return pd.DataFrame(rows).set_index("method")


def differences(jobs: Sequence[Job], method: str = "luffy", columns: Sequence[str] = PERCENT) -> pd.DataFrame:
    """How much better `method` is than each other method, in points of accuracy, seeds paired.

    Columns per measure: the mean difference, and low and high ends of its 95% interval over seeds (NaN with one seed).
    """
    import pandas as pd

    runs = per_run(jobs)
    rows = []
    for other in [m for m in METHODS if m != method and m in set(runs.get("method", ()))]:
        pair = [runs[runs["method"] == m].set_index("seed") for m in (method, other)]
        row: dict[str, Any] = {"against": METHODS[other].label}
        for column in [c for c in columns if c in runs]:
            difference = (pair[0][column] - pair[1][column]).dropna() * 100
            mean, half = interval(difference.tolist())
            row |= {column: mean, f"{column} low": mean - half, f"{column} high": mean + half}
        rows.append(row)
    return pd.DataFrame(rows).set_index("against") if rows else pd.DataFrame()
