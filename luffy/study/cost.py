"""What a run has cost, in operations per parameter of the model, and what it had reached by then."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def spent_on(generated: pd.Series[float], trained: pd.Series[float]) -> pd.Series[float]:
    """Operations per parameter of the model: 2 for a generated token and 6 for one trained on. Seconds would depend on
    what else the machine was doing."""
    return 2 * generated + 6 * trained


def operations(curves: pd.DataFrame) -> pd.Series[float]:
    """What was spent until each row, over the stages together. curves: rows of metrics with columns run and stage."""
    import pandas as pd

    spent = spent_on(curves["total/generated_tokens"], curves["total/trained_tokens"])
    ends = spent.groupby([curves["run"], curves["stage"]]).max()
    earlier = ends.groupby("run").cumsum() - ends
    keys = pd.MultiIndex.from_frame(curves[["run", "stage"]])
    return spent.fillna(0) + earlier.reindex(keys).to_numpy()


def equal_budget(spent: pd.Series[float]) -> float:
    """The operations at which methods are compared: the median of what a run of each method with rollouts spends (not
    the least, which may be that of a policy that has stopped to answer at length). A method that spends less in all is
    read at its end.

    spent: mean operations by method."""
    return float(spent.median()) if len(spent) else math.inf


def reached(curve: pd.DataFrame, budget: float, metric: str = "eval/id") -> float:
    """Validation accuracy when that many operations are spent: the mean of the validations within the last quarter of
    the budget, or of the run where it spends less; interpolated where there is none. NaN without validations.

    curve: the rows of one run, with columns step, spent and the metric."""
    # the last validation of a stage and the first of the next are of the same policy
    known = curve.dropna(subset=[metric]).drop_duplicates("step", keep="last")
    if known.empty:
        return math.nan
    end = min(budget, float(known["spent"].max()))
    near = known[(known["spent"] > 0.75 * end) & (known["spent"] <= end)]
    return float(near[metric].mean()) if len(near) else float(np.interp(end, known["spent"], known[metric]))
