"""The map: how far LUFFY is ahead of each rival, over what the base elicits by itself and over what the teacher adds.

Not a figure of the paper. A point of the map is a set of runs that differ in method and seed only. Leads are
differences of means; their intervals have one standard deviation for all cells of the map (inference.pooled), which few
seeds a cell could not give on their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from luffy.config import DEFAULT_MODEL
from luffy.methods import METHODS
from luffy.study import cost, inference, style
from luffy.study.inference import Effect

from .claims import BOUNDS, RIVALS
from .files import missing
from .runs import MAIN_SET, NoDataError, Runs, own_share, recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = ("luffy", *RIVALS)
TEACHER = {"easy": "3, 4", MAIN_SET: "3 to 7", "hard": "6, 7"}  # sets that differ in the training problems
COLUMNS = {"id": "in distribution", "ood": "out of distribution"}
AXES = {
    "base": "share of the base's answers that are worked step by step",
    "teacher": "difficulty of the training problems",
}
OWN = recipe(DEFAULT_MODEL).removeprefix("tiny:own_share=")  # the world's own point on the first axis
DRAWS = 4000
CAPTION = (
    "Map. LUFFY's lead over each rival, in points of accuracy, with 95% intervals (one standard deviation for all "
    "cells). Left: over how often the base works step by step by itself, before training. Right: over the training "
    "problems, from those that the base's own steps finish (the teacher adds little) to those that they do not. Above "
    "0 LUFFY is ahead; the band is +-2 points."
)


def points(runs: Runs) -> pd.DataFrame:
    """The runs of the map: columns axis ("base", "teacher"), point, x, place, method, seed, id, ood, base id, run. The
    world's own point is on both axes. Raises NoDataError."""
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
    return table[["axis", "point", "x", "place", "method", "seed", "id", "ood", "base id", "run"]]


def data(runs: Runs) -> pd.DataFrame:
    """Columns axis, point, x, score ("id", "ood"), rival, lead, low, high, se (points), p (Holm, over the map),
    verdict, seeds. Empty where there are no runs."""
    columns = ["axis", "point", "x", "score", "rival", "lead", "low", "high", "se", "p", "verdict", "seeds"]
    try:
        table = points(runs)
    except NoDataError:
        return pd.DataFrame(columns=columns)
    rows: list[dict[str, Any]] = []
    effects: list[Effect] = []
    for score in [score for score in COLUMNS if table[score].notna().any()]:
        for row, effect in _leads(table, score):
            rows.append(row)
            effects.append(effect)
    tests = [_test(row) for row in rows]  # the world's own point is on both axes and is one test
    distinct = {test: effect.p for test, effect in zip(tests, effects, strict=True)}
    adjusted = dict(zip(distinct, inference.holm(list(distinct.values())), strict=True))
    for row, test, effect in zip(rows, tests, effects, strict=True):
        row |= {"lead": effect.value, "low": effect.low, "high": effect.high, "se": effect.se}
        row |= {"p": adjusted[test], "seeds": effect.seeds}
        row["verdict"] = inference.lead(effect, adjusted[test], BOUNDS["points"])
    return pd.DataFrame(rows).reindex(columns=columns)


def _test(row: dict[str, Any]) -> tuple[str, ...]:
    own = row["point"] == {"base": OWN, "teacher": TEACHER[MAIN_SET]}[row["axis"]]
    return row["score"], row["rival"], *(("own",) if own else (row["axis"], row["point"]))


def _leads(table: pd.DataFrame, score: str) -> list[tuple[dict[str, Any], Effect]]:
    scaled = table.assign(value=100 * table[score]).dropna(subset=["value"])
    # a cell that is on both axes counts once
    _, deviation, df = inference.pooled(scaled.drop_duplicates("run"), "value", ["axis", "point", "method"])
    found = []
    for (axis, _), part in scaled.groupby(["axis", "place"], sort=True):
        cells = {str(method): rows["value"].tolist() for method, rows in part.groupby("method")}
        facts = {"axis": axis, "point": part["point"].iloc[0], "x": part["x"].iloc[0], "score": score}
        for rival in [rival for rival in RIVALS if {rival, "luffy"} <= set(cells)]:
            effect = inference.pooled_difference(cells["luffy"], cells[rival], deviation, df)
            found.append(({**facts, "rival": rival}, effect))
    return found


def crossings(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Where LUFFY's lead changes sign along the base axis. Columns: score, rival, share (own_share, interpolated
    between the two points around the last change), low and high (its 95%, by drawing the leads from their errors), and
    the share of the draws in which there is a change. Leads that never change sign have share NaN."""
    rng = np.random.default_rng(seed)
    rows = []
    chosen = table[(table["axis"] == "base") & (table["x"] >= 0)]
    for (score, rival), part in chosen.groupby(["score", "rival"], sort=False):
        part = part.sort_values("x")
        x, leads, errors = (part[name].to_numpy(float) for name in ("x", "lead", "se"))
        row: dict[str, Any] = {"score": score, "rival": rival, "share": _crossing(x, leads)}
        if not np.isnan(errors).any():
            drawn = [_crossing(x, leads + errors * rng.standard_normal(len(x))) for _ in range(DRAWS)]
            known = [value for value in drawn if value == value]
            row["low"], row["high"] = np.quantile(known, [0.025, 0.975]) if known else (np.nan, np.nan)
            row["draws with a change"] = len(known) / DRAWS
        rows.append(row)
    return pd.DataFrame(rows, columns=["score", "rival", "share", "low", "high", "draws with a change"])


def _crossing(x: np.ndarray, leads: np.ndarray) -> float:
    """The x at which the leads change sign for the last time, linear between points; NaN if they do not."""
    x, leads = x[leads != 0], leads[leads != 0]
    changes = np.flatnonzero(leads[:-1] * leads[1:] < 0)
    if not len(changes):
        return float("nan")
    i = changes[-1]
    return float(x[i] + (x[i + 1] - x[i]) * leads[i] / (leads[i] - leads[i + 1]))


def at_equal_cost(runs: Runs) -> pd.DataFrame:
    """Every method's accuracy in distribution, in percent, at the operations of the method with rollouts that spends
    the least at a point: columns axis, point, operations, base, a column per method, best (those that cannot be told
    from the best: pooled deviation, p >= 0.05). SFT spends less and stands at its end."""
    table = points(runs)
    curves = runs.curves[runs.curves["run"].isin(table["run"])].sort_values(["run", "step"])
    curves = curves.assign(spent=cost.operations(curves))
    table = table.assign(spent=table["run"].map(curves.groupby("run")["spent"].max()))
    rows = []
    for (axis, _), part in table.groupby(["axis", "place"], sort=True):
        sampled = part[part["method"] != "sft"]
        cheapest = sampled.groupby("method")["spent"].mean().idxmin()
        budget = float(sampled[sampled["method"] == cheapest]["spent"].max())
        mine = curves[curves["run"].isin(part["run"])]
        found = {run: cost.reached(rows_of, budget) for run, rows_of in mine.groupby("run")}
        part = part.assign(value=100 * part["run"].map(found)).dropna(subset=["value"])
        facts = {
            "axis": axis,
            "point": part["point"].iloc[0],
            "operations": budget,
            "base": 100 * part["base id"].mean(),
        }
        cells = {str(method): rows_of["value"].tolist() for method, rows_of in part.groupby("method")}
        means = {method: float(np.mean(cell)) for method, cell in cells.items()}
        _, deviation, df = inference.pooled(part, "value", ["method"])
        best = max(means, key=lambda method: means[method])
        near = [
            method
            for method in sorted(means, key=lambda method: -means[method])
            if method == best
            or not inference.pooled_difference(cells[best], cells[method], deviation, df).p < inference.LEVEL
        ]
        labels = {METHODS[method].label: means.get(method) for method in SHOWN}
        rows.append({**facts, **labels, "best": ", ".join(METHODS[method].label for method in near)})
    return pd.DataFrame(rows)


def conclusions(table: pd.DataFrame) -> list[str]:
    """One sentence per rival and score, from the verdicts along both axes."""
    said = []
    for (score, rival), part in table.groupby(["score", "rival"], sort=False):
        places = {
            verdict: [_place(row) for row in part[part["verdict"] == verdict].to_dict("records")]
            for verdict in ("ahead", "behind", "no effect")
        }
        parts = [f"{verdict} at {', '.join(where)}" for verdict, where in places.items() if where]
        if (part["verdict"] == "undecided").any():
            parts.append("undecided elsewhere" if parts else "undecided everywhere")
        said.append(f"{COLUMNS[score].capitalize()}, LUFFY against {METHODS[rival].label}: {'; '.join(parts)}.")
    return said


def _place(row: dict[Any, Any]) -> str:
    if row["axis"] == "teacher":
        return f"problems {row['point']}"
    return f"own share {row['point']}" if row["x"] >= 0 else f"base {row['point']}"


def draw(table: pd.DataFrame) -> Figure:
    figure, axes = style.panels(2, 2, width=4.6, height=2.9)
    for place, axis in enumerate(axes):
        score, name = list(COLUMNS)[place // 2], list(AXES)[place % 2]
        rows = table[(table["score"] == score) & (table["axis"] == name)]
        axis.set(title=f"LUFFY's lead {COLUMNS[score]} (points)", xlabel=AXES[name])
        if rows.empty:
            missing(axis, "no runs: python -m paper_figures.make_runs")
            continue
        _panel(axis, rows)
    for row in (axes[:2], axes[2:]):  # one range a row
        limits = [axis.get_ylim() for axis in row]
        for axis in row:
            axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    style.legend_below(figure, axes)
    return figure


def _panel(axis: Axes, rows: pd.DataFrame) -> None:
    order = list(dict.fromkeys(rows.sort_values("x")["point"]))
    axis.axhspan(-BOUNDS["points"], BOUNDS["points"], color="#DDDDDD", linewidth=0)
    axis.axhline(0, color="black", linewidth=0.8)
    rivals: Sequence[str] = [rival for rival in RIVALS if rival in set(rows["rival"])]
    for number, rival in enumerate(rivals):
        part = rows[rows["rival"] == rival].sort_values("x")
        places = np.array([order.index(point) for point in part["point"]]) + 0.07 * (number - (len(rivals) - 1) / 2)
        error = [part["lead"] - part["low"], part["high"] - part["lead"]]
        axis.errorbar(
            places, part["lead"], yerr=error if part["low"].notna().all() else None, marker="o", markersize=3.5,
            capsize=2, label=f"over {METHODS[rival].label}", **style.LOOKS[rival],
        )  # fmt: skip
    axis.set_xticks(range(len(order)), order)
