"""The paper's claims as data: the statement, where it stands, the statistic that tests it, and a computed verdict.

Every statistic is an effect (luffy/study/inference.py), positive where the runs agree with the paper: a difference of
two methods over seeds, or the mean of a change within runs. The verdicts are explained there. Holm's correction is
within a family of claims; `BOUNDS` says what counts as no effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from luffy.evaluation.paper_numbers import PUBLISHED, read_published
from luffy.methods import METHODS
from luffy.study import cost, inference
from luffy.study.inference import Effect, welch

from .points import RIVALS, leads, points
from .runs import MAIN_SET, NoDataError, Runs

Statistic = Callable[[Runs], Effect]  # raises NoDataError where the runs do not exist
LAST = 0.2  # share of the steps, at the end, that stands for "after training"
# An effect within +- this counts as none: two points of accuracy, and what is as little in other units.
BOUNDS = {
    "points": 2.0,
    "nats": 0.05,
    "nats an answer": 0.5,
    "tokens": 2.0,
    "steps": 5.0,
    "% of tokens": 0.05,
    "log points": 5.0,
}


@dataclass(frozen=True)
class Claim:
    """statement, as the paper means it; where it is made; family: whose tests are corrected together; statistic and its
    unit; paper: the paper's value of it, if it gives one; reruns: the pair of models whose difference others
    measured."""

    statement: str
    where: str
    family: str
    statistic: Statistic
    unit: str = "points"
    paper: float | None = None
    reruns: tuple[str, str, str] | None = None  # model, other model, "id" or "ood"


# --- statistics ------------------------------------------------------------------------------------------------------


def values(runs: Runs, method: str, column: str, run_set: str = MAIN_SET, **settings: float) -> pd.Series[float]:
    """A column of the runs of a method, by seed. Raises NoDataError if there are none."""
    chosen = runs.of(run_set, method=method, **settings).set_index("seed")
    if column not in chosen:
        raise NoDataError(f"the runs of {method} have no {column}")
    return chosen[column].dropna()


def gap(first: str, second: str, column: str, run_set: str = MAIN_SET) -> Statistic:
    """How many points the first method is above the second."""
    return lambda runs: welch(100 * values(runs, first, column, run_set), 100 * values(runs, second, column, run_set))


def steps_of(
    runs: Runs, method: str, metric: str, first: float, last: float, run_set: str = MAIN_SET
) -> pd.Series[float]:
    """Mean of a training metric over a range of steps, as shares of all of them, by run."""
    curves = runs.curves_of(runs.of(run_set, method=method)).dropna(subset=[metric])
    curves = curves[curves["step"] > 0]
    place = curves["step"] / curves.groupby("run")["step"].transform("max")
    return curves[(place > first) & (place <= last)].groupby("run")[metric].mean()


def after(runs: Runs, method: str, metric: str, run_set: str = MAIN_SET) -> pd.Series[float]:
    return steps_of(runs, method, metric, 1 - LAST, 1.0, run_set)


def before(runs: Runs, method: str, metric: str, run_set: str = MAIN_SET) -> pd.Series[float]:
    """Over the first sixteenth of the steps: ten of 160."""
    return steps_of(runs, method, metric, 0.0, 1 / 16, run_set)


def after_gap(first: str, second: str, metric: str, scale: float = 1.0) -> Statistic:
    """How much a metric is greater after training with the first method."""
    return lambda runs: welch(scale * after(runs, first, metric), scale * after(runs, second, metric))


def gain(runs: Runs, method: str, run_set: str) -> pd.Series[float]:
    """What the reward of rollouts gained in training, in points."""
    return 100 * (after(runs, method, "reward/on", run_set) - before(runs, method, "reward/on", run_set))


def _towards_traces(runs: Runs) -> Effect:
    traces = after(runs, "luffy", "length/off")
    start, end = before(runs, "luffy", "length/on"), after(runs, "luffy", "length/on")
    return inference.mean((traces - start).abs() - (traces - end).abs())


def _steps_to_half(runs: Runs, method: str) -> pd.Series[float]:
    """First step at which rollouts are half as long as demonstrations, by run; if never, one after the last."""
    curves = runs.curves_of(runs.of(method=method)).dropna(subset=["length/on", "length/off"])
    reached = curves[(curves["step"] > 0) & (curves["length/on"] >= curves["length/off"] / 2)]
    never = curves.groupby("run")["step"].max() + 1
    return reached.groupby("run")["step"].min().reindex(never.index).fillna(never)


def _on_same_seeds(first: pd.Series[float], second: pd.Series[float]) -> Effect:
    """Their difference in points, on the seeds that both have: so both have the same base models."""
    seeds = first.index.intersection(second.index)
    return welch(100 * first[seeds], 100 * second[seeds])


def _over_gamma(gamma: float) -> Statistic:
    def statistic(runs: Runs) -> Effect:
        return _on_same_seeds(values(runs, "luffy", "id"), values(runs, "luffy", "id", "gamma", gamma=gamma))

    return statistic


def _pass_at(runs: Runs, method: str, temperature: float) -> pd.Series[float]:
    """pass@8 of final models by seed, in percent. Raises NoDataError."""
    table = runs.extra("temperatures")
    chosen = table[(table["method"] == method) & np.isclose(table["temperature"], temperature)]
    if chosen.empty:
        raise NoDataError(f"no final models of {method} were evaluated at temperature {temperature}")
    return chosen.set_index("seed")["pass@8"]


def _with_temperature(method: str, end: float, start: float) -> Statistic:
    """The change of one model with the temperature: the same models on both sides, so paired."""
    return lambda runs: inference.mean((_pass_at(runs, method, end) - _pass_at(runs, method, start)).dropna())


def _answer_length(runs: Runs) -> Effect:
    table = runs.extra("answers")
    table = table.assign(total=table["tokens"] * table["count"])
    sums = table.groupby(["method", "seed"])[["total", "count"]].sum()
    means = (sums["total"] / sums["count"]).unstack("method")
    if not {"sft", "luffy"} <= set(means):
        raise NoDataError("no final models of sft and luffy were evaluated")
    return welch(means["sft"], means["luffy"])


def cost_to_reach(runs: Runs, method: str, accuracy: float, run_set: str = MAIN_SET) -> pd.Series[float]:
    """Operations until the accuracy in distribution of a validation, by run, interpolated between validations; all of
    them where it is never reached, which is too few."""
    curves = runs.curves_of(runs.of(run_set, method=method)).sort_values(["run", "step"])
    curves = curves.assign(spent=cost.operations(curves))
    found = {}
    for run, rows in curves.groupby("run"):
        known = rows.dropna(subset=["eval/id"]).groupby("step").last()  # the last of one stage is the first of the next
        costs, reached = known["spent"].to_numpy(), np.maximum.accumulate(known["eval/id"].to_numpy())
        found[run] = float(np.interp(accuracy, reached, costs)) if reached[-1] >= accuracy else float(costs[-1])
    return pd.Series(found)


def _saved(other: str) -> Statistic:
    """How much less LUFFY spends than the other method until a validation that every run of both has reached: 100 ln of
    the ratio of operations, as costs differ by factors."""

    def statistic(runs: Runs) -> Effect:
        both = runs.of()
        both = both[both["method"].isin(["luffy", other])]
        values(runs, other, "id"), values(runs, "luffy", "id")  # raises NoDataError without either
        target = float(runs.curves_of(both).groupby("run")["eval/id"].max().min())
        costs = [100 * np.log(cost_to_reach(runs, method, target)) for method in (other, "luffy")]
        return welch(*costs)

    return statistic


def _on_other_base(other: str, share: str) -> Statistic:
    """LUFFY's lead, in points, on another base model, as the map has it: few seeds, but what all cells vary by."""

    def statistic(runs: Runs) -> Effect:
        for place, effect in leads(points(runs), "id"):
            if (place["axis"], place["point"], place["rival"]) == ("base", share, other):
                return effect
        raise NoDataError(f"no runs of LUFFY and {other} on the base of own share {share} in the map")

    return statistic


# --- the claims ------------------------------------------------------------------------------------------------------


def _published(table: str, first: str, second: str, column: str = "id", group: str | None = None) -> float:
    """The difference of two models in a published table."""
    rows = read_published(table)
    rows = rows if group is None else rows[rows["group"] == group]
    accuracy = rows[rows["benchmark"] == column].set_index("model")["accuracy"]
    return float(accuracy[first] - accuracy[second])


def _above(first: str, second: str, column: str, statement: str = "", where: str = "Table 1") -> Claim:
    place = "in" if column == "id" else "out of"
    labels = METHODS[first].label, METHODS[second].label
    return Claim(
        statement or f"{labels[0]} is above {labels[1]} {place} distribution", where, f"{place} distribution",
        gap(first, second, column), paper=_published("table1", *labels, column), reruns=(*labels, column),
    )  # fmt: skip


def _ablation(first: str, second: str, statement: str, paper: float, where: str = "Table 4") -> Claim:
    return Claim(statement, where, "ablation", gap(first, second, "id"), paper=paper)


CLAIMS: tuple[Claim, ...] = (
    *(_above("luffy", other, column) for column in ("id", "ood") for other in RIVALS),
    _above("sft", "rl_sft_loss", "id", "RL w/ SFT Loss is below SFT in distribution"),
    _above("on_policy", "sft", "ood"),
    _ablation("luffy", "mixed", "LUFFY is above plain mixed-policy RL", 5.7),
    _ablation("on_policy", "mixed", "Plain mixed-policy RL is below on-policy RL", 1.1),
    _ablation("mixed_shaping", "mixed", "Shaping improves mixed-policy RL", 3.4),
    _ablation("luffy", "mixed_shaping", "Removing the clip improves shaped mixed-policy RL", 2.3),
    _ablation("on_policy", "on_policy_shaping", "Shaping hurts on-policy RL", 3.5, "Table 4, Sec. 5.4"),
    _ablation("on_policy", "on_policy_no_clip", "Removing the clip hurts on-policy RL", 0.6),
    Claim(
        "Shaping keeps the entropy that plain mixing loses, per token", "Figures 2 and 6", "entropy",
        after_gap("mixed_shaping", "mixed", "entropy/on"), "nats",
    ),
    Claim(
        "Shaping keeps the entropy that plain mixing loses, per answer", "Figures 2 and 6", "entropy",
        after_gap("mixed_shaping", "mixed", "entropy/answer"), "nats an answer",
    ),
    Claim(
        "LUFFY keeps more entropy than on-policy RL, per token", "Figure 5", "entropy",
        after_gap("luffy", "on_policy", "entropy/on"), "nats",
    ),
    Claim(
        "LUFFY keeps more entropy than on-policy RL, per answer", "Figure 5", "entropy",
        after_gap("luffy", "on_policy", "entropy/answer"), "nats an answer",
    ),
    Claim(
        "LUFFY's reward is at first below on-policy RL's", "Figure 5", "rewards",
        lambda runs: welch(*(100 * before(runs, method, "reward/on") for method in ("on_policy", "luffy"))),
    ),
    Claim(
        "LUFFY's reward is in the end above on-policy RL's", "Figure 5", "rewards",
        after_gap("luffy", "on_policy", "reward/on", 100),
    ),
    Claim(
        "On hard problems the reward of on-policy RL falls", "Figure 4", "rewards",
        lambda runs: inference.mean(-gain(runs, "on_policy", "hard")),
    ),
    Claim(
        "On hard problems LUFFY learns where on-policy RL does not", "Figure 4", "rewards",
        lambda runs: welch(gain(runs, "luffy", "hard"), gain(runs, "on_policy", "hard")),
    ),
    *(
        Claim(
            f"On easy problems {METHODS[method].label} learns", "Figure 4", "rewards",
            lambda runs, method=method: inference.mean(gain(runs, method, "easy")),  # type: ignore[misc]
        )
        for method in ("on_policy", "luffy")
    ),
    Claim(
        "Answers grow towards the length of the demonstrations", "Figure 5", "lengths", _towards_traces, "tokens"
    ),
    Claim(
        "Answers grow faster with an SFT loss", "Figure 11", "lengths",
        lambda runs: welch(_steps_to_half(runs, "luffy"), _steps_to_half(runs, "rl_sft_loss")), "steps",
    ),
    Claim(
        "With an SFT loss answers grow beyond the demonstrations", "Figure 11", "lengths",
        lambda runs: inference.mean(after(runs, "rl_sft_loss", "length/on") - after(runs, "rl_sft_loss", "length/off")),
        "tokens",
    ),
    Claim("LUFFY's answers are shorter than SFT's", "Figure 10", "lengths", _answer_length, "tokens", 4646 - 2832),
    Claim(
        "Mixed-policy RL with shaping is clipped more often than on-policy RL", "Figure 8", "clip",
        lambda runs: welch(
            *(100 * steps_of(runs, method, "pg_clipfrac", 0, 1) for method in ("mixed_shaping", "on_policy"))
        ),
        "% of tokens",
    ),
    Claim(
        "LUFFY's pass@8 at temperature 1 is above SFT's", "Figure 12", "pass@8",
        lambda runs: welch(_pass_at(runs, "luffy", 1.0), _pass_at(runs, "sft", 1.0)),
    ),
    Claim(
        "LUFFY's pass@8 at temperature 1 is above on-policy RL's", "Figure 12", "pass@8",
        lambda runs: welch(_pass_at(runs, "luffy", 1.0), _pass_at(runs, "on_policy", 1.0)),
    ),
    Claim("LUFFY's pass@8 rises with the temperature", "Figure 12", "pass@8", _with_temperature("luffy", 1.0, 0.1)),
    Claim(
        "SFT's pass@8 falls with the temperature", "Figure 12", "pass@8", _with_temperature("sft", 0.1, 1.0)
    ),
    *(
        Claim(f"gamma = 0.1 is better than {gamma}", "Figure 9", "gamma", _over_gamma(gamma))
        for gamma in (0.05, 0.2, 0.3, 0.5)
    ),
    *(
        Claim(
            f"LUFFY is above {METHODS[other].label} on a {kind} base", "Table 3, Figure 3", "other bases",
            _on_other_base(other, share),
            paper=_published("table3", "LUFFY", METHODS[other].label, "id", group),
        )
        for kind, share, group in (
            ("weaker", "0.1", "Qwen2.5-Math-1.5B"),
            ("stronger", "0.8", "Qwen2.5-7B-Instruct"),
        )
        for other in ("on_policy", "sft")
    ),
    *(
        Claim(
            f"Longer training improves LUFFY {'in' if column == 'id' else 'out of'} distribution", "Table 1", "longer",
            lambda runs, column=column: _on_same_seeds(  # type: ignore[misc]
                values(runs, "luffy", column, "plus"), values(runs, "luffy", column)
            ),
            paper=paper,
        )
        for column, paper in (("id", 0.3), ("ood", 4.0))
    ),
    *(
        Claim(
            f"LUFFY needs less than {METHODS[other].label} to become as good (ours: operations; the paper: GPU hours)",
            "Table 2", "cost", _saved(other), "log points", 100 * math.log(rival / 77),
        )
        for other, rival in (("sft_rl", 130), ("rl_sft_loss", 133))  # GPU hours of Table 2; LUFFY's are 77
    ),
)  # fmt: skip


def table(runs: Runs) -> pd.DataFrame:
    """One row per claim: our value with its 95% interval and seeds, the paper's value, that of the independent re-runs,
    p with and without Holm's correction, and the verdict. Without runs it is "no data"; if it is undecided, the row has
    the seeds a method that would decide."""
    reruns = pd.read_csv(PUBLISHED / "reruns.csv")
    effects: list[Effect | None] = []
    for claim in CLAIMS:
        try:
            effects.append(claim.statistic(runs))
        except NoDataError:
            effects.append(None)
    adjusted: dict[int, float] = {}
    for family in dict.fromkeys(claim.family for claim in CLAIMS):
        places = [i for i, claim in enumerate(CLAIMS) if claim.family == family and effects[i] is not None]
        ps = [effect.p for i in places if (effect := effects[i]) is not None]
        adjusted |= dict(zip(places, inference.holm(ps), strict=True))
    rows = []
    for i, (claim, effect) in enumerate(zip(CLAIMS, effects, strict=True)):
        row: dict[str, object] = {"claim": claim.statement, "where": claim.where, "family": claim.family}
        row |= {"unit": claim.unit, "paper": claim.paper, "re-runs": _rerun_values(reruns, claim), "verdict": "no data"}
        if effect is not None and effect.seeds:
            found = inference.verdict(effect, adjusted[i], BOUNDS[claim.unit])
            row |= {"ours": effect.value, "low": effect.low, "high": effect.high, "seeds": effect.seeds}
            row |= {"p": effect.p, "p (Holm)": adjusted[i], "verdict": found}
            if found == "undecided":
                level = inference.LEVEL * effect.p / adjusted[i] if adjusted[i] > 0 else inference.LEVEL
                row["seeds needed"] = inference.seeds_needed(effect, BOUNDS[claim.unit], level)
        rows.append(row)
    columns = ["claim", "where", "family", "ours", "low", "high", "unit", "seeds", "paper", "re-runs"]
    return pd.DataFrame(rows).reindex(columns=[*columns, "p", "p (Holm)", "verdict", "seeds needed"])


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


def spread(runs: Runs) -> pd.DataFrame:
    """Standard deviations of the scores of the main runs, in points, told apart: "base", over base models; "seed", of
    runs on one base; and "problems", the error that the choice of evaluation problems leaves, which all runs share."""
    chosen = runs.runs[runs.runs["set"] == MAIN_SET].rename(columns={"model": "base"})
    rows = []
    for column in [column for column in ("id", "ood") if chosen[column].notna().any()]:
        parts = inference.components(chosen, column)
        row: dict[str, object] = {"score": column, **{name: 100 * value for name, value in parts.items()}}
        if f"{column} problems" in chosen:
            row["problems"] = 100 * float(np.sqrt((chosen[f"{column} problems"] ** 2).mean()))
        rows.append(row)
    return pd.DataFrame(rows, columns=["score", "base", "seed", "problems"])


def sensitivity(runs: Runs) -> pd.DataFrame:
    """How LUFFY's lead, in points, moves with what we chose: a row per change, a column per other method in and out of
    distribution. Rows whose runs do not exist are left out."""
    usual = runs.runs[runs.runs["set"] == MAIN_SET]
    rows = [_leads(usual, "none")]
    # gamma is LUFFY's alone: the others are those of the main runs
    others = usual[usual["method"].isin(RIVALS)]
    for gamma, part in runs.runs[runs.runs["set"] == "gamma"].groupby("gamma", sort=True):
        rows.append(_leads(pd.concat([part, others]), f"gamma {gamma:g}"))
    changed = runs.runs[runs.runs["set"] == "sensitivity"]
    names = {
        "trace_errors": "share of wrong traces", "verbosity": "share of steps written twice",
        "learning_rate": "learning rate", "num_traces": "traces per problem and group",
    }  # fmt: skip
    for column, name in names.items():
        own = changed["method"].map(usual.groupby("method")[column].first()) if len(usual) else changed[column]
        for value, part in changed[changed[column] != own].groupby(column, sort=True):
            rows.append(_leads(part, f"{name} {value:g} (one seed)"))
    return pd.DataFrame([row for row in rows if len(row) > 1])


def _leads(runs: pd.DataFrame, name: str) -> dict[str, object]:
    row: dict[str, object] = {"change": name}
    for column in [name for name in ("id", "ood") if name in runs]:
        means = 100 * runs.groupby("method")[column].mean()
        for other in [other for other in RIVALS if {"luffy", other} <= set(means.index)]:
            row[f"{METHODS[other].label}, {column}"] = float(means["luffy"] - means[other])
    return row
