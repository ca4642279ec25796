"""How the rule for intervals of map and arena was chosen: simulated runs, of which it is known who is ahead.

`python -m paper_figures.intervals` prints the table of PILOTS.md. A method of ten runs is compared with 16 of three, by
the rule (inference.cell_means) and by Welch's test of each pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from luffy.study import inference
from luffy.study.inference import Effect

SEEDS = (10, *[3] * 16)
WORLDS = {  # standard deviations of the methods
    "all alike": (1.0,) * 17,
    "a quarter vary 3 times as much": (1.0, *(1.0, 1.0, 1.0, 3.0) * 4),
    "one varies 6 times as much": (*(1.0,) * 16, 6.0),
}
LEAD = 5.0  # deviations of a method like most, of which power is told


def rates(deviations: Sequence[float], lead: float = 0.0, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """The share of comparisons with the first method that find a difference, for methods that are like the first and
    those that vary more, if the first is ahead of all by `lead`: with p < 0.05, and after Holm's correction; and the
    share of draws in which any does after it. Two rows: rule, Welch."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[list[float]]] = {"rule": [], "Welch": []}
    for _ in range(draws):
        runs = [deviation * rng.standard_normal(size) for deviation, size in zip(deviations, SEEDS, strict=True)]
        runs[0] += lead
        rows = [(str(i).zfill(2), value) for i, cell in enumerate(runs) for value in cell]
        means = inference.cell_means(pd.DataFrame(rows, columns=["method", "value"]), "value")
        effects: dict[str, list[Effect]] = {
            "rule": [means.difference(means.names[0], other) for other in means.names[1:]],
            "Welch": [inference.welch(runs[0].tolist(), cell.tolist()) for cell in runs[1:]],
        }
        for rule, each in effects.items():
            found[rule].append([effect.p for effect in each])
    more = np.array(deviations[1:]) > 1
    shares = {}
    for rule, ps in found.items():
        raw = np.array(ps) < inference.LEVEL
        corrected = np.array([inference.holm(row) for row in ps]) < inference.LEVEL
        shares[rule] = {
            "alike": raw[:, ~more].mean(),
            "vary more": raw[:, more].mean() if more.any() else np.nan,
            "alike, Holm": corrected[:, ~more].mean(),
            "any, Holm": corrected.any(axis=1).mean(),
        }
    return pd.DataFrame(shares).T


def table(draws: int = 2000) -> pd.DataFrame:
    """Percent of comparisons, a row per world and rule: without any difference, and with a lead of LEAD."""
    rows = []
    for world, deviations in WORLDS.items():
        none, ahead = rates(deviations, draws=draws), rates(deviations, LEAD, draws)
        for rule in none.index:
            row = none.loc[rule, ["alike", "vary more", "any, Holm"]].to_dict()
            rows.append({"world": world, "test": rule, **row, "found, Holm": ahead.loc[rule, "alike, Holm"]})
    frame = pd.DataFrame(rows)
    numbers = frame.columns[2:]
    frame[numbers] = 100 * frame[numbers]
    return frame


if __name__ == "__main__":
    print(table().round(1).to_markdown(index=False))
