"""The arena: the methods that came after LUFFY beside it and its rivals, in three worlds.

Not a figure of the paper. The newer methods' runs are the sets of luffy.study.arena.WORLDS, LUFFY's and its rivals'
those of the main set and the map on the same base models. The table, the intervals and the ranks are those of
luffy.study.arena.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from luffy.evaluation.paper_numbers import PUBLISHED
from luffy.methods import METHODS
from luffy.study import arena, style
from luffy.study.inference import LEADS

from .claims import BOUNDS
from .files import missing
from .runs import SETTINGS, NoDataError, Runs, from_jobs, merge, recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from luffy.study.experiments import Job

TITLES = {
    "paper": "the default base",
    "corner": "a base that shows nothing of the skill",
    "strong": "a base that works step by step in four of five answers",
}
SCORES = {"id": "in distribution", "equal": "at equal cost", "ood": "out of distribution"}
DIFFERS = "not decided alike"
ASKED = ("sft_rl", "luffy", "on_policy")  # first whom all must meet (arXiv 2604.23747)
COMMAND = "python -m paper_figures.make_runs"
SHARED = ("steps", "difficulties", "num_traces", "trace_errors", "verbosity")  # settings of all runs of a world
CAPTION = (
    "Arena. Top: accuracy in distribution (%) of every method with its 95% interval, over base models in equal parts "
    "(one standard deviation for all methods of a world, or a method's own where that is larger); open: at equal cost, "
    "when as much is spent as by the methods with rollouts in the median, or all if that is less. Bottom: accuracy "
    "over operations per parameter, means over seeds. Methods of a world share base models, problems, steps and rows "
    "of a group; SFT+RL has as many steps again, with other problems."
)


def scores(runs: Runs) -> dict[str, pd.DataFrame]:
    """The runs of each world, as luffy.study.arena.scores has them. A world without newer methods, or without runs of
    LUFFY and its rivals with the same base and settings, is left out."""
    found, on_bases = {}, runs.on_bases()
    for world, preset in arena.WORLDS.items():
        own = runs.runs[runs.runs["set"] == preset]
        rivals = on_bases.get(recipe(own["model"].iloc[0])) if len(own) else None
        if rivals is None:
            continue
        alike = (rivals[list(SHARED)] == own[list(SHARED)].iloc[0]).all(axis=1)
        rivals = rivals[alike & rivals["method"].isin(arena.RIVALS)]
        if set(rivals["method"]) == set(arena.RIVALS):
            table = pd.concat([rivals, own], ignore_index=True)
            found[world] = arena.with_cost(table, _curves(runs, table))
    return found


def _curves(runs: Runs, table: pd.DataFrame) -> pd.DataFrame:
    curves = runs.curves[runs.curves["run"].isin(table["run"])]
    return arena.with_spent(curves.merge(table[["run", "method"]], on="run"))


def data(runs: Runs) -> pd.DataFrame:
    """A row per world, score ("id", "ood", "equal") and method, as luffy.study.arena.standings has them, then rows of
    score "curve" with columns spent and mean. Empty where there are no runs."""
    columns = ["world", "score", "method", "seeds", "mean", "half", "rank", "rank low", "rank high", "best", "spent"]
    frames = []
    for world, table in scores(runs).items():
        for score in ("id", "ood", "equal"):
            ranked = arena.standings(table, score).rename(columns={score: "mean"})
            frames.append(ranked.assign(world=world, score=score))
        curves = arena.mean_curves(_curves(runs, table)).rename(columns={"accuracy": "mean"})
        frames.append(curves.assign(world=world, score="curve"))
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def draw(table: pd.DataFrame) -> Figure:
    worlds = [world for world in TITLES if world in set(table["world"])] or ["paper"]
    figure, axes = style.panels(len(worlds), 2, width=4.4, height=4.8)
    known = table[table["score"].isin(("id", "equal"))]
    top = (known["mean"] + known["half"].fillna(0)).max()
    for place, world in enumerate(worlds):
        mine = table[table["world"] == world]
        above, below = axes[place], axes[len(worlds) + place]
        above.set(title=fill(TITLES[world], 36), xlabel="accuracy in distribution (%)")
        arena.draw_cost(below, mine[mine["score"] == "curve"].rename(columns={"mean": "accuracy"}))
        if mine.empty:
            missing(above, f"no runs: {COMMAND}")
            missing(below, f"no runs: {COMMAND}")
            continue
        _standings(above, mine)
        above.set_xlim(0, 1.02 * top)  # the same for all worlds
    style.legend_below(figure, axes[len(worlds) :])
    return figure


def _standings(axis: Axes, table: pd.DataFrame) -> None:
    ranked = table[table["score"] == "id"].sort_values("mean")
    equal = table[table["score"] == "equal"].set_index("method")["mean"]
    for place, row in enumerate(ranked.to_dict("records")):
        look = dict(color=style.look(row["method"])["color"], markersize=4)
        half = row["half"] if row["half"] == row["half"] else None
        axis.errorbar(row["mean"], place, xerr=half, marker="o", capsize=2, **look)
        axis.plot(equal.get(row["method"], np.nan), place, marker="D", markerfacecolor="none", **look)
    labels = [METHODS[method].label for method in ranked["method"]]
    axis.set_yticks(range(len(ranked)), labels, fontsize=7)  # so that 25 have room
    axis.set_ylim(-0.7, len(ranked) - 0.3)


def agreement(worlds: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """How far each paper's order of methods is that of the default world: columns paper, benchmarks, grader, claimed
    (the methods with their numbers, in the claimed order), quoted (numbers that the paper has from others, which do not
    count), methods, tau, low, high (luffy.study.arena.agreement), source.

    A paper's numbers are of its own runs, by one grader; numbers of different papers are not compared.
    """
    rows = []
    for paper, part in pd.read_csv(PUBLISHED / "arena.csv").groupby("paper", sort=False):
        ordered = part.sort_values("accuracy", ascending=False)
        own, quoted = (
            {row["method"]: row["accuracy"] for row in ordered.to_dict("records") if row["own"] == said}
            for said in ("yes", "no")
        )
        facts = {"paper": paper, "benchmarks": part["benchmarks"].iloc[0], "grader": part["grader"].iloc[0]}
        facts |= {"claimed": _numbers(own), "quoted": _numbers(quoted)}
        found = arena.agreement(worlds["paper"], own)
        rows.append({**facts, **found, "source": "; ".join(dict.fromkeys(part["source"]))})
    return pd.DataFrame(rows)


def _numbers(accuracies: Mapping[str, float]) -> str:
    return ", ".join(f"{METHODS[method].label} {value:.1f}" for method, value in accuracies.items())


def beside(runs: Runs, world: str, jobs: Sequence[Job]) -> pd.DataFrame:
    """The scores of a world's committed runs with those of one's own newer methods beside them, as `scores` has them.
    Raises NoDataError if nothing is committed of the world, or one's own runs have another base or other settings."""
    preset = arena.WORLDS.get(world, world)
    known = runs.runs[runs.runs["set"] == preset]
    if world not in scores(runs):
        raise NoDataError(f"no runs of the world {world} are committed, or not all of its rivals': {COMMAND}")
    own = from_jobs({preset: [job for job in jobs if job.config.method.name not in arena.RIVALS]}, "own")
    for row in own.runs.to_dict("records"):
        same = known[known["method"] == row["method"]]
        there = (same if len(same) else known).iloc[0]
        names = set(SHARED if same.empty else SETTINGS) - {"model"}  # a method that is committed is one with its values
        other = sorted(name for name in names if not _equal(row[name], there[name]))
        other += ["model"] * (recipe(row["model"]) != recipe(there["model"]))
        if other:
            raise NoDataError(f"the runs of {row['method']} differ from the committed ones in {', '.join(other)}")
    return scores(merge(runs, own))[world]


def _equal(first: object, second: object) -> bool:
    return first == second or (first != first and second != second)


def conclusions(worlds: Mapping[str, pd.DataFrame]) -> list[str]:
    """Which methods are ahead of SFT then RL, LUFFY and on-policy RL, in distribution after as many steps and at equal
    cost, and out of distribution: for all worlds together, if there are several, then for every world."""
    found = {rival: _verdicts(worlds, rival) for rival in ASKED}
    several = ASKED if len(worlds) > 1 else ()
    told = [_said(f"With each of {len(worlds)} bases", rival, _alike(found[rival])) for rival in several]
    return told + [_said(f"With {TITLES[world]}", rival, found[rival][world]) for world in worlds for rival in ASKED]


def summary(worlds: Mapping[str, pd.DataFrame]) -> str:
    """How many methods are ahead of LUFFY, behind it and so on in the default world, and which are ahead in all worlds,
    if there are several. Empty without runs."""
    if "paper" not in worlds:
        return ""
    found = _verdicts(worlds, "luffy")
    alike = _alike(found)
    all_of = found["paper"]
    shown = [verdict for verdict in LEADS if any((verdicts == verdict).any() for verdicts in all_of.values())]
    counts = [
        f"{SCORES[score]} {'/'.join(str(int((verdicts == verdict).sum())) for verdict in shown)}"
        for score, verdicts in all_of.items()
    ]
    said = (
        f"Of {len(all_of['id'])} other methods in the default world, against LUFFY ({'/'.join(shown)}): "
        f"{', '.join(counts)}."
    )
    if len(worlds) == 1:
        return said
    everywhere = [
        f"{METHODS[str(method)].label} ({', '.join(where)})"
        for method in alike["id"].index
        if (where := [SCORES[score] for score, verdicts in alike.items() if verdicts.get(method) == "ahead"])
    ]
    return (
        f"{said} Of {len(alike['id'])} in all {len(worlds)} worlds, ahead in each: {', '.join(everywhere) or 'none'}."
    )


def _verdicts(worlds: Mapping[str, pd.DataFrame], rival: str) -> dict[str, dict[str, pd.Series]]:
    """By world and score the verdict on every method against a rival."""
    bound = BOUNDS["points"]
    return {
        world: {score: arena.against(table, rival, bound, score).set_index("method")["verdict"] for score in SCORES}
        for world, table in worlds.items()
    }


def _alike(found: Mapping[str, Mapping[str, pd.Series]]) -> dict[str, pd.Series]:
    """By score the verdicts on the methods that all worlds have, or that they differ."""
    alike = {}
    for score in SCORES:
        verdicts = pd.concat([world[score] for world in found.values()], axis=1, join="inner")
        alike[score] = verdicts.iloc[:, 0].where(verdicts.nunique(axis=1) == 1, DIFFERS)
    return alike


def _said(where: str, rival: str, found: Mapping[str, pd.Series]) -> str:
    clauses: list[str] = []
    for score, verdicts in found.items():
        parts = [f"{verdict}: {labels}" for verdict in LEADS[:3] if (labels := _labels(verdicts, verdict))]
        parts += [
            f"{verdict}: {count} of {len(verdicts)} methods"
            for verdict in ("undecided", DIFFERS)
            if (count := int((verdicts == verdict).sum()))
        ]
        name = SCORES[score] if not clauses else SCORES[score].capitalize()  # each later one begins a sentence
        clauses.append(f"{name}, {'; '.join(parts)}")
    return f"{where}, against {METHODS[rival].label}: {'. '.join(clauses)}."


def _labels(verdicts: pd.Series, verdict: str) -> str:
    return ", ".join(METHODS[str(method)].label for method in verdicts.index[verdicts == verdict])
