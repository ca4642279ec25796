"""The points of the map, and LUFFY's lead over each rival at them.

A point is a set of runs that differ in method and seed only. Leads are differences of means; their intervals have the
variance of all cells of the map (inference.cell_means), which few seeds a cell could not give on their own.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from luffy.config import DEFAULT_MODEL
from luffy.study import inference
from luffy.study.inference import Effect, Means

from .runs import MAIN_SET, NoDataError, Runs, own_share, recipe

RIVALS = ("on_policy", "sft", "rl_sft_loss", "sft_rl")
SHOWN = ("luffy", *RIVALS)
TEACHER = {"easy": "3, 4", MAIN_SET: "3 to 7", "hard": "6, 7"}  # sets that differ in the training problems
OWN = recipe(DEFAULT_MODEL).removeprefix("tiny:own_share=")  # the world's own point on the first axis


def points(runs: Runs) -> pd.DataFrame:
    """The runs of the map: columns axis ("base", "teacher"), point, x, place, method, seed, id, ood, base id, base ood,
    run. The world's own point is on both axes. Raises NoDataError."""
    frames = []
    for place, (name, chosen) in enumerate(runs.on_bases().items()):
        point = name.removeprefix("tiny:own_share=")
        frames.append(chosen.assign(axis="base", point=point, x=own_share(name), place=place))
    for place, (run_set, label) in enumerate(TEACHER.items()):
        chosen = runs.runs[runs.runs["set"] == run_set]
        frames.append(chosen.assign(axis="teacher", point=label, x=float(place), place=place))
    table = pd.concat(frames, ignore_index=True)
    table = table[table["method"].isin(SHOWN)]
    if table[table["method"] == "luffy"].empty:
        raise NoDataError("no runs of the map: python -m paper_figures.make_runs")
    return table[["axis", "point", "x", "place", "method", "seed", "id", "ood", "base id", "base ood", "run"]]


def is_own(row: dict[Any, Any]) -> bool:
    """Whether a row with axis and point is of the default world, which is on both axes."""
    return bool(row["point"] == {"base": OWN, "teacher": TEACHER[MAIN_SET]}[row["axis"]])


def leads(table: pd.DataFrame, score: str) -> list[tuple[dict[str, Any], Effect]]:
    """LUFFY's lead over each rival at each of the `points`, in points of accuracy, with axis, point, x, score, rival.

    score: "id" or "ood"."""
    table = table.assign(value=100 * table[score])
    means, found = means_of(table), []
    for (axis, _), part in table.dropna(subset=["value"]).groupby(["axis", "place"], sort=True):
        facts = {"axis": axis, "point": part["point"].iloc[0], "x": part["x"].iloc[0], "score": score}
        for rival in [rival for rival in RIVALS if {rival, "luffy"} <= set(part["method"])]:
            effect = means.difference(cell(facts, "luffy"), cell(facts, rival))
            found.append(({**facts, "rival": rival}, effect))
    return found


def means_of(table: pd.DataFrame) -> Means:
    """The mean `value` of every `cell` of the points, with the variance of all: a cell on both axes counts once."""
    rows = table.to_dict("records")
    named = table.assign(cell=[cell(row, row["method"]) for row in rows])
    return inference.cell_means(named.drop_duplicates("run"), "value", "cell")


def cell(row: dict[Any, Any], method: str) -> str:
    """The name of a method's runs at a point, which is that of the base axis if it is on both."""
    axis, point = ("base", OWN) if is_own(row) else (row["axis"], row["point"])
    return f"{method}, {axis} {point}"
