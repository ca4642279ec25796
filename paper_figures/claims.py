"""The paper's claims as data: the statement, where it stands, the statistic that tests it, and a computed verdict.

Every statistic gives one number per seed, positive where the run agrees with the paper; methods are paired by seed. The
verdict compares the 95% Student interval over seeds with the claim's threshold: `reproduced` if it lies above,
`not reproduced` if below, else `undecided`. The bootstrap interval over seeds stands beside it but does not decide: of
three seeds it covers the truth only about three times in four.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from luffy import stats
from luffy.evaluation.paper_numbers import PUBLISHED, read_published
from luffy.methods import METHODS
from luffy.stats import interval

from .runs import MAIN_SET, NoDataError, Runs

Statistic = Callable[[Runs], "pd.Series[float]"]  # seed -> value; raises NoDataError where the runs do not exist
LAST = 0.2  # share of the steps, at the end, that stands for "after training"
SENSITIVE = ("on_policy", "sft", "rl_sft_loss", "sft_rl")


@dataclass(frozen=True)
class Claim:
    """statement, as the paper means it; where it is made; statistic and its unit; paper: the paper's value of it, if it
    gives one; threshold: above it the claim holds; reruns: the pair of models whose difference others measured."""

    name: str
    statement: str
    where: str
    statistic: Statistic
    unit: str = "points"
    paper: float | None = None
    threshold: float = 0.0
    reruns: tuple[str, str, str] | None = None  # model, other model, "id" or "ood"


# --- statistics ------------------------------------------------------------------------------------------------------


def values(runs: Runs, method: str, column: str, run_set: str = MAIN_SET, **settings: float) -> pd.Series[float]:
    """A column of the runs of a method, by seed. Raises NoDataError if there are none."""
    chosen = runs.of(run_set, method=method, **settings).set_index("seed")
    if column not in chosen:
        raise NoDataError(f"the runs of {method} have no {column}")
    return chosen[column].dropna()


def gap(first: str, second: str, column: str, scale: float = 100) -> Statistic:
    """How much the first method is above the second."""
    return lambda runs: scale * (values(runs, first, column) - values(runs, second, column)).dropna()


def after(runs: Runs, method: str, metric: str, run_set: str = MAIN_SET) -> pd.Series[float]:
    """Mean of a training metric over the last steps, by seed."""
    return _mean_of_steps(runs, method, metric, run_set, lambda steps: steps > (1 - LAST) * steps.max())


def before(runs: Runs, method: str, metric: str, run_set: str = MAIN_SET) -> pd.Series[float]:
    """Mean of a training metric over the first ten steps, by seed."""
    return _mean_of_steps(runs, method, metric, run_set, lambda steps: steps <= 10)


def _mean_of_steps(
    runs: Runs, method: str, metric: str, run_set: str, chosen: Callable[[pd.Series], pd.Series]
) -> pd.Series[float]:
    curves = runs.curves_of(runs.of(run_set, method=method)).dropna(subset=[metric])
    curves = curves[curves["step"] > 0]
    return curves[chosen(curves["step"])].groupby("seed")[metric].mean()


def _gain(runs: Runs, method: str, run_set: str) -> pd.Series[float]:
    """What the reward of rollouts gained in training, in points."""
    return 100 * (after(runs, method, "reward/on", run_set) - before(runs, method, "reward/on", run_set))


def _towards_traces(runs: Runs) -> pd.Series[float]:
    traces = after(runs, "luffy", "length/off")
    return (traces - before(runs, "luffy", "length/on")).abs() - (traces - after(runs, "luffy", "length/on")).abs()


def _steps_to_half(runs: Runs, method: str) -> pd.Series[float]:
    """First step at which rollouts are half as long as demonstrations, by seed; if never, one after the last."""
    curves = runs.curves_of(runs.of(method=method)).dropna(subset=["length/on", "length/off"])
    reached = curves[(curves["step"] > 0) & (curves["length/on"] >= curves["length/off"] / 2)]
    never = curves.groupby("seed")["step"].max() + 1
    return reached.groupby("seed")["step"].min().reindex(never.index).fillna(never)


def _over_gamma(gamma: float) -> Statistic:
    return lambda runs: 100 * (values(runs, "luffy", "id") - values(runs, "luffy", "id", "gamma", gamma=gamma)).dropna()


def _temperature(runs: Runs, method: str, end: float, start: float) -> pd.Series[float]:
    table = runs.extra("temperatures")
    table = table[table["method"] == method].pivot(index="seed", columns="temperature", values="pass@8")
    return (table[end] - table[start]).dropna()


def _answer_length(runs: Runs) -> pd.Series[float]:
    table = runs.extra("answers")
    table = table.assign(total=table["tokens"] * table["count"])
    sums = table.groupby(["method", "seed"])[["total", "count"]].sum()
    means = (sums["total"] / sums["count"]).unstack("method")
    return (means["sft"] - means["luffy"]).dropna()


def _saved(runs: Runs, other: str) -> pd.Series[float]:
    """Share of the other method's operations that LUFFY does without, in percent: per parameter 2 for a generated token
    and 6 for one that is trained on. Seconds would depend on what else the machine was doing."""

    def operations(method: str) -> pd.Series[float]:
        return 2 * values(runs, method, "generated_tokens") + 6 * values(runs, method, "trained_tokens")

    return 100 * (1 - operations("luffy") / operations(other)).dropna()


# --- the claims ------------------------------------------------------------------------------------------------------


def _above(other: str, column: str) -> Claim:
    place = "in" if column == "id" else "out of"
    paper = read_published("table1").pivot(index="model", columns="benchmark", values="accuracy")[column]
    label = METHODS[other].label
    return Claim(
        f"luffy over {other}, {column}",
        f"LUFFY is above {label} {place} distribution",
        "Table 1",
        gap("luffy", other, column),
        paper=float(paper["LUFFY"] - paper[label]),
        reruns=("LUFFY", label, column),
    )


CLAIMS: tuple[Claim, ...] = (
    *(_above(other, column) for column in ("id", "ood") for other in SENSITIVE),
    Claim("shaping", "Shaping improves mixed-policy RL", "Table 4", gap("mixed_shaping", "mixed", "id"), paper=3.4),
    Claim(
        "no clip", "Removing the clip improves shaped mixed-policy RL", "Table 4",
        gap("luffy", "mixed_shaping", "id"), paper=2.3,
    ),
    Claim(
        "on-policy shaping", "Shaping does not help on-policy RL (by more than a point)", "Table 4, Sec. 5.4",
        gap("on_policy", "on_policy_shaping", "id"), paper=3.5, threshold=-1,
    ),
    Claim(
        "on-policy no clip", "Removing the clip does not help on-policy RL (by more than a point)", "Table 4",
        gap("on_policy", "on_policy_no_clip", "id"), paper=0.6, threshold=-1,
    ),
    Claim(
        "entropy", "Shaping keeps the entropy that plain mixing loses", "Figures 2 and 6",
        lambda runs: after(runs, "mixed_shaping", "entropy/on") - after(runs, "mixed", "entropy/on"), "nats",
    ),
    Claim(
        "entropy against on-policy", "LUFFY keeps more entropy than on-policy RL", "Figure 5",
        lambda runs: after(runs, "luffy", "entropy/on") - after(runs, "on_policy", "entropy/on"), "nats",
    ),
    Claim(
        "hard, on-policy", "On hard problems the reward of on-policy RL collapses", "Figure 4",
        lambda runs: -_gain(runs, "on_policy", "hard"),
    ),
    Claim(
        "hard, luffy", "On hard problems LUFFY learns where on-policy RL does not", "Figure 4",
        lambda runs: _gain(runs, "luffy", "hard") - _gain(runs, "on_policy", "hard"),
    ),
    Claim("length", "Answers grow towards the length of the demonstrations", "Figure 5", _towards_traces, "tokens"),
    Claim(
        "length, faster", "Answers grow faster with an SFT loss", "Figure 11",
        lambda runs: (_steps_to_half(runs, "luffy") - _steps_to_half(runs, "rl_sft_loss")).dropna(), "steps",
    ),
    Claim(
        "length, overshoot", "With an SFT loss answers grow beyond the demonstrations", "Figure 11",
        lambda runs: after(runs, "rl_sft_loss", "length/on") - after(runs, "rl_sft_loss", "length/off"), "tokens",
    ),
    Claim("answer length", "LUFFY's answers are shorter than SFT's", "Figure 10", _answer_length, "tokens", paper=1814),
    Claim(
        "clip", "Mixed-policy RL with shaping is clipped more often than on-policy RL", "Figure 8",
        lambda runs: 100 * (
            after(runs, "mixed_shaping", "pg_clipfrac") - after(runs, "on_policy", "pg_clipfrac")
        ), "% of tokens",
    ),
    Claim("pass@8", "LUFFY's pass@8 is above on-policy RL's", "Figure 12", gap("luffy", "on_policy", "pass@8")),
    Claim(
        "temperature, luffy", "LUFFY's pass@8 rises with the temperature", "Figure 12",
        lambda runs: _temperature(runs, "luffy", 1.0, 0.1),
    ),
    Claim(
        "temperature, sft", "SFT's pass@8 falls with the temperature", "Figure 12",
        lambda runs: -_temperature(runs, "sft", 1.0, 0.1),
    ),
    *(
        Claim(f"gamma {gamma}", f"gamma = 0.1 is better than {gamma}", "Figure 9", _over_gamma(gamma))
        for gamma in (0.05, 0.2, 0.3, 0.5)
    ),
    Claim(
        "cost, sft_rl", "LUFFY needs less than SFT+RL (ours: operations; the paper: GPU hours)", "Table 2",
        lambda runs: _saved(runs, "sft_rl"), "%", paper=40.8,
    ),
    Claim(
        "cost, rl_sft_loss",
        "LUFFY needs less than RL with SFT loss (ours: operations; the paper: GPU hours)", "Table 2",
        lambda runs: _saved(runs, "rl_sft_loss"), "%", paper=42.1,
    ),
)  # fmt: skip


def verdict(seeds: list[float], threshold: float) -> str:
    """What the values over seeds say of a claim that holds above the threshold."""
    mean, half = interval(seeds)
    if half != half:  # of one seed
        return "undecided"
    return "reproduced" if mean - half > threshold else "not reproduced" if mean + half < threshold else "undecided"


def table(runs: Runs) -> pd.DataFrame:
    """One row per claim: our value with its t interval and bootstrap interval over seeds, the paper's, that of the
    independent re-runs, and the verdict; "no data" where the runs do not exist."""
    reruns = pd.read_csv(PUBLISHED / "reruns.csv")
    rows = []
    for claim in CLAIMS:
        row: dict[str, object] = {"claim": claim.statement, "where": claim.where, "unit": claim.unit}
        try:
            seeds = claim.statistic(runs).dropna().tolist()
        except NoDataError:
            seeds = []
        if seeds:
            mean, half = interval(seeds)
            spread = stats.bootstrap([seeds])
            row |= {"ours": mean, "low": mean - half, "high": mean + half}
            row |= {"bootstrap low": spread.low, "bootstrap high": spread.high}
        row |= {"seeds": len(seeds), "threshold": claim.threshold, "paper": claim.paper}
        row["re-runs"] = _rerun_values(reruns, claim)
        row["verdict"] = verdict(seeds, claim.threshold) if seeds else "no data"
        rows.append(row)
    columns = ["claim", "where", "ours", "low", "high", "bootstrap low", "bootstrap high", "unit", "seeds"]
    return pd.DataFrame(rows).reindex(columns=[*columns, "threshold", "paper", "re-runs", "verdict"])


def _rerun_values(reruns: pd.DataFrame, claim: Claim) -> str:
    """The claim's difference in each independent re-run that measured both sides."""
    if claim.reruns is None:
        return ""
    first, second, benchmark = claim.reruns
    found = []
    for who, rows in reruns[reruns["benchmark"] == benchmark].groupby("who", sort=False):
        accuracy = rows.set_index("model")["accuracy"]
        if first in accuracy and second in accuracy:
            found.append(f"{accuracy[first] - accuracy[second]:+.1f} ({who})")
    return ", ".join(found)


def sensitivity(runs: Runs) -> pd.DataFrame:
    """How LUFFY's lead, in points, moves with what we chose: a row per change, a column per other method in and out of
    distribution. Rows whose runs do not exist are left out."""
    usual = runs.runs[runs.runs["set"] == MAIN_SET]
    rows = [
        _leads(usual, "none (mean over seeds)"),
        _leads(runs.runs[runs.runs["set"] == "base1"], "another base model"),
    ]
    # gamma is LUFFY's alone: the others are those of the main runs
    others = usual[usual["method"].isin(SENSITIVE)]
    for gamma, part in runs.runs[runs.runs["set"] == "gamma"].groupby("gamma", sort=True):
        rows.append(_leads(pd.concat([part, others]), f"gamma {gamma:g} (mean over seeds)"))
    changed = runs.runs[runs.runs["set"] == "sensitivity"]
    names = {
        "steps": "steps", "trace_errors": "share of wrong traces", "difficulties": "difficulties",
        "learning_rate": "learning rate", "num_traces": "traces per problem and group",
    }  # fmt: skip
    plain = changed[_same(changed, usual, [name for name in names if name != "steps"])]
    for column, name in names.items():
        for value, part in changed.groupby(column, sort=True) if len(usual) else ():
            if value not in set(usual[column]):
                label = f"{name} {value}" if column == "steps" else f"{name} {value}, {part['steps'].max()} steps"
                rows.append(_leads(plain if column == "steps" else part, label))
    return pd.DataFrame([row for row in rows if len(row) > 1])


def _same(runs: pd.DataFrame, usual: pd.DataFrame, columns: list[str]) -> pd.Series[bool]:
    """Which runs have values in these columns that the main runs have too."""
    same = pd.Series(True, index=runs.index)
    for column in columns:
        same &= runs[column].isin(set(usual[column]))
    return same


def _leads(runs: pd.DataFrame, name: str) -> dict[str, object]:
    row: dict[str, object] = {"change": name}
    for column in [name for name in ("id", "ood") if name in runs]:
        for other in SENSITIVE:
            pair = [runs[runs["method"] == method].set_index("seed")[column] for method in ("luffy", other)]
            leads = (100 * (pair[0] - pair[1])).dropna()
            if len(leads):
                row[f"{METHODS[other].label}, {column}"] = float(np.mean(leads))
    return row
