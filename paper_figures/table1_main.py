"""Table 1: the main comparison, published and measured."""

from __future__ import annotations

import pandas as pd

from . import tables
from .runs import Runs

METHODS = ("on_policy", "sft", "rl_sft_loss", "sft_rl", "luffy")
NOTE = (
    "Table 1. Left: the paper (v5), Qwen2.5-Math-7B, its nine benchmarks. Right, marked with the base model: "
    "measured; of the embedded world chains are in distribution (Avg), the other families are out of it. The "
    "paper's text claims +16.1 out of distribution over SFT+RL; its table gives 57.8 - 44.8 = 13.0 (17.0 for "
    "LUFFY+). Its stars claim significance over all baselines, also out of distribution, where on-policy RL has 57.3 "
    "against 57.8."
)


def data(runs: Runs) -> pd.DataFrame:
    """Published columns by benchmark and measured ones (ours NAME, ours NAME +-), percent, a row per model."""
    ours = tables.measured_wide(runs, METHODS)
    return (
        tables.published_wide("table1").join(ours.add_prefix("ours "), how="outer").rename_axis("model").reset_index()
    )


def table(runs: Runs) -> pd.DataFrame:
    return tables.side_by_side(tables.published_wide("table1"), tables.measured_wide(runs, METHODS), tables.tier(runs))
