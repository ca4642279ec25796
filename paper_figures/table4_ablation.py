"""Table 4: the ablation of mixing, shaping and clipping, published and measured."""

from __future__ import annotations

import pandas as pd

from . import tables
from .runs import Runs

METHODS = ("mixed", "mixed_shaping", "luffy", "on_policy", "on_policy_shaping", "on_policy_no_clip")
NOTE = (
    "Table 4. Left: the paper (v5), Qwen2.5-Math-7B, six benchmarks. Right, marked with the base model: measured; "
    "of the embedded world chains are in distribution (Avg), the other families are out of it. "
    "LUFFY is mixed-policy RL with "
    "shaping and without clip."
)


def data(runs: Runs) -> pd.DataFrame:
    """Published columns by benchmark and measured ones (ours NAME, ours NAME +-), percent, a row per model."""
    ours = tables.measured_wide(runs, METHODS)
    return (
        tables.published_wide("table4").join(ours.add_prefix("ours "), how="outer").rename_axis("model").reset_index()
    )


def table(runs: Runs) -> pd.DataFrame:
    return tables.side_by_side(tables.published_wide("table4"), tables.measured_wide(runs, METHODS), tables.tier(runs))
