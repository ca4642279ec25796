"""The map: how far LUFFY is ahead of each rival, over what the base elicits by itself and over the problems it learns.

Not a figure of the paper. points.py has the points and the leads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from luffy.methods import METHODS
from luffy.study import cost, inference, style
from luffy.study.inference import Effect

from . import tables
from .claims import BOUNDS
from .files import missing
from .points import RIVALS, SHOWN, cell, is_own, leads, means_of, points
from .runs import NoDataError, Runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = {"id": "in distribution", "ood": "out of distribution"}
AXES = {
    "base": "answers that the base works step by step (%)",
    "teacher": "steps of the training problems",
}
DRAWS = 4000
CAPTION = (
    "Map. LUFFY's lead over each rival, in points of accuracy, with 95% intervals (one standard deviation for all "
    "cells, or that of the method at the point where it is larger). Left: over how often the base works step by step "
    "by itself, before training (at temperature 1); `tiny` is the model before the training that shows steps. Crosses "
    "at the bottom: where a lead changes sign, with the 95% interval, pale if it does so in less than 95% of draws of "
    "the leads' errors. Right: over the training problems, from those that the base's own steps finish (the teacher "
    "adds little) to those that they do not; all are evaluated on problems of 3 to 7 steps, so that the last point is "
    "also one of other problems in training than in the test. Above 0 LUFFY is ahead; the band is +-2 points."
)


def data(runs: Runs) -> pd.DataFrame:
    """Columns axis, point, x, measured (percent of the base's answers that are worked step by step, NaN if it was not
    measured), score ("id", "ood"), rival, lead, low, high, se (points), df, p (Holm, over the points of a rival
    and score), verdict, seeds. Empty where there are no runs."""
    columns = "axis point x measured score rival lead low high se df p verdict seeds".split()
    try:
        table = points(runs)
    except NoDataError:
        return pd.DataFrame(columns=columns)
    shares, rows = measured(runs), []
    for score in [score for score in COLUMNS if table[score].notna().any()]:
        found = leads(table, score)
        adjusted = _holm(found)
        for (row, effect), p in zip(found, adjusted, strict=True):
            row |= {"lead": effect.value, "low": effect.low, "high": effect.high, "se": effect.se, "df": effect.df}
            row |= {"p": p, "seeds": effect.seeds, "verdict": inference.lead(effect, p, BOUNDS["points"])}
            row["measured"] = shares.get(row["point"], np.nan) if row["axis"] == "base" else np.nan
            rows.append(row)
    return pd.DataFrame(rows).reindex(columns=columns)


def _holm(found: Sequence[tuple[dict[str, Any], Effect]]) -> list[float]:
    """Adjusted p-values of leads, each within those over the same rival; the default world is one test on two axes."""
    tests = [(row["rival"], *([] if is_own(row) else [row["axis"], row["point"]])) for row, _ in found]
    distinct = {test: effect.p for test, (_, effect) in zip(tests, found, strict=True)}
    adjusted: dict[tuple[str, ...], float] = {}
    for rival in RIVALS:
        family = [test for test in distinct if test[0] == rival]
        adjusted |= dict(zip(family, inference.holm([distinct[test] for test in family]), strict=True))
    return [adjusted[test] for test in tests]


def measured(runs: Runs) -> dict[str, float]:
    """Percent of answers worked step by step before training, at temperature 1, by point of the base axis: over the
    models of a recipe and all difficulties."""
    table = runs.bases_in_training()
    shares = 100 * table.groupby("recipe")["steps"].mean() if len(table) else pd.Series(dtype=float)
    return {str(name).removeprefix("tiny:own_share="): float(share) for name, share in shares.items()}


def crossings(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Where LUFFY's lead changes sign along the base axis, a row per change. Columns: score, rival, share (own_share,
    interpolated between two points), low and high (its 95%: where drawn leads have the change that is nearest), and
    the share of the draws in which the lead changes sign at all. Leads that never do have one row with share NaN."""
    rng = np.random.default_rng(seed)
    rows = []
    chosen = table[(table["axis"] == "base") & (table["x"] >= 0)]
    for (score, rival), part in chosen.groupby(["score", "rival"], sort=False):
        part = part.sort_values("x")
        x, values, errors, df = (part[name].to_numpy(float) for name in ("x", "lead", "se", "df"))
        known, drawn = not np.isnan(errors).any(), []
        if known:
            drawn = [_crossings(x, values + errors * rng.standard_t(df)) for _ in range(DRAWS)]
            drawn = [places for places in drawn if len(places)]
        for share in _crossings(x, values) if len(_crossings(x, values)) else [np.nan]:
            row: dict[str, Any] = {"score": score, "rival": rival, "share": share}
            if drawn and share == share:
                near = [places[np.abs(places - share).argmin()] for places in drawn]
                row["low"], row["high"] = np.quantile(near, [0.025, 0.975])
            if known:
                row["draws with a change"] = len(drawn) / DRAWS
            rows.append(row)
    return pd.DataFrame(rows, columns=["score", "rival", "share", "low", "high", "draws with a change"])


def _crossings(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Every x at which the values change sign, linear between points."""
    x, values = x[values != 0], values[values != 0]
    i = np.flatnonzero(values[:-1] * values[1:] < 0)
    return x[i] + (x[i + 1] - x[i]) * values[i] / (values[i] - values[i + 1])


def at_equal_cost(runs: Runs, score: str = "id") -> pd.DataFrame:
    """Every method's accuracy, in percent, at the cost.equal_budget of a point: columns axis, point, operations, base,
    then for every method its label, with "+-" the half-width of the 95% interval, with "less" whether the method spends
    less in all and stands at its end, and best (those that cannot be told from the best: p >= 0.05). The default world
    has one row."""
    table = points(runs)
    curves = runs.curves[runs.curves["run"].isin(table["run"])].sort_values(["run", "step"])
    curves = curves.assign(spent=cost.operations(curves))
    table = table.assign(spent=table["run"].map(curves.groupby("run")["spent"].max()), value=np.nan)
    rows = []
    for (axis, _), part in table.groupby(["axis", "place"], sort=True):
        facts = {"axis": axis, "point": part["point"].iloc[0]}
        if axis == "teacher" and is_own(facts):
            continue
        spent = part.groupby("method")["spent"].mean()
        budget = cost.equal_budget(spent.drop("sft", errors="ignore"))
        mine = curves[curves["run"].isin(part["run"])]
        found = {run: cost.reached(rows_of, budget, f"eval/{score}") for run, rows_of in mine.groupby("run")}
        table.loc[part.index, "value"] = 100 * part["run"].map(found)
        known = table.loc[part.index].dropna(subset=["value"])
        facts |= {"operations": budget, "base": 100 * known[f"base {score}"].mean()}
        facts |= {f"{METHODS[method].label} less": bool(spent.get(method, budget) < budget) for method in SHOWN}
        rows.append(facts)
    means = means_of(table)
    at = dict(zip(means.names, zip(means.values, means.halves, strict=True), strict=True))
    for facts in rows:
        here = {method: at[cell(facts, method)] for method in SHOWN if cell(facts, method) in at}
        for method in SHOWN:
            label = METHODS[method].label
            facts[label], facts[f"{label} +-"] = here.get(method, (np.nan, np.nan))
        order = sorted(here, key=lambda method: -here[method][0])
        near = [
            method
            for method in order
            if method == order[0]
            or not means.difference(cell(facts, order[0]), cell(facts, method)).p < inference.LEVEL
        ]
        facts["best"] = ", ".join(METHODS[method].label for method in near)
    return pd.DataFrame(rows)


def cost_table(runs: Runs, score: str = "id") -> pd.DataFrame:
    """`at_equal_cost` as text: operations in millions, accuracies with their intervals, * where less is spent."""
    rows = []
    for row in at_equal_cost(runs, score).to_dict("records"):
        cells = {name: row[name] for name in ("axis", "point")}
        cells |= {"operations": f"{row['operations'] / 1e6:.1f}", "base": f"{row['base']:.1f}"}
        for label in (METHODS[method].label for method in SHOWN):
            known = row[label] == row[label]
            cells[label] = tables.with_interval(row[label], row[f"{label} +-"]) if known else "–"
            cells[label] += " *" if known and row[f"{label} less"] else ""
        rows.append({**cells, "best": row["best"]})
    return pd.DataFrame(rows)


def conclusions(table: pd.DataFrame) -> list[str]:
    """One sentence per rival and score, from the verdicts along both axes."""
    said = []
    for (score, rival), part in distinct(table).groupby(["score", "rival"], sort=False):
        parts = [f"{verdict} at {', '.join(where)}" for verdict, where in decided(part).items()]
        if (part["verdict"] == "undecided").any():
            parts.append("undecided elsewhere" if parts else "undecided everywhere")
        said.append(f"{COLUMNS[score].capitalize()}, LUFFY against {METHODS[rival].label}: {'; '.join(parts)}.")
    return said


def decided(leads: pd.DataFrame, own: bool = True) -> dict[str, list[str]]:
    """The points of some leads by what was decided there. own: as for `place`."""
    found = {
        verdict: [place(row, own) for row in leads[leads["verdict"] == verdict].to_dict("records")]
        for verdict in inference.LEADS[:3]
    }
    return {verdict: places for verdict, places in found.items() if places}


def distinct(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `data` with the default world once, which is on both axes."""
    return table[[not (row["axis"] == "teacher" and is_own(row)) for row in table.to_dict("records")]]


def place(row: dict[Any, Any], own: bool = True) -> str:
    """A point of the map, in short. own: whether the default world is called that."""
    if own and is_own(row):
        return "the default world"
    if row["axis"] == "teacher":
        return f"problems {row['point']}"
    if row["x"] < 0:
        return str(row["point"])
    return f"{row['measured']:.0f}%" if row["measured"] == row["measured"] else f"own share {row['point']}"


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
    for row in crossings(rows).to_dict("records"):
        _cross(axis, rows, order, row, height=0.04 + 0.045 * rivals.index(row["rival"]))
    axis.margins(y=0.2)
    axis.set_xticks(range(len(order)), [_tick(rows[rows["point"] == point].iloc[0]) for point in order])


def _tick(row: pd.Series[Any]) -> str:
    return f"{row['measured']:.0f}" if row["measured"] == row["measured"] and row["x"] >= 0 else str(row["point"])


def _cross(axis: Axes, rows: pd.DataFrame, order: Sequence[str], row: dict[Any, Any], height: float) -> None:
    """A crossing between the points, which stand in equal distances. height: share of the panel's."""
    if row["share"] != row["share"]:
        return
    shares = rows.drop_duplicates("point").set_index("point").loc[list(order), "x"].to_numpy(float)
    low, place, high = np.interp([row["low"], row["share"], row["high"]], shares, range(len(order)))
    look: dict[str, Any] = dict(color=style.LOOKS[row["rival"]]["color"], transform=axis.get_xaxis_transform())
    look["alpha"] = 1.0 if row["draws with a change"] >= 0.95 else 0.3
    axis.plot(place, height, marker="x", markersize=5, linestyle="none", **look)
    axis.plot([low, high], [height, height], linewidth=1.2, **look)
