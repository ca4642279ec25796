"""Table 2: what each method costs."""

from __future__ import annotations

import pandas as pd

from luffy.evaluation.paper_numbers import PUBLISHED
from luffy.methods import METHODS
from luffy.study import cost

from .runs import MAIN_SET, Runs

SHOWN = ("sft", "rl_sft_loss", "sft_rl", "luffy", "on_policy")
NOTE = (
    "Table 2. Published: GPU hours on 8 A100 and samples (64K = 500 x 128). Measured: means over seeds of problems "
    "asked, of tokens generated and trained on, and of the operations per parameter that these take, in millions (2 a "
    "generated token, 6 one trained on). The runs were made on several machines, so that their seconds would not "
    "compare. SFT's own row in the paper counts 64K samples where the row of SFT+RL counts 135K for the same stage. "
    "'LUFFY at 59% of the GPU hours' is 77 / 130."
)


def data(runs: Runs) -> pd.DataFrame:
    """Columns model, gpu_hours (published, all GPUs), on_policy_samples, off_policy_samples, and measured means."""
    paper = pd.read_csv(PUBLISHED / "table2.csv").set_index("model")
    paper["gpu_hours"] *= paper["gpus"]
    paper = paper[["gpu_hours", "on_policy_samples", "off_policy_samples"]]
    chosen = runs.runs[(runs.runs["set"] == MAIN_SET) & runs.runs["method"].isin(SHOWN)]
    ours = chosen.groupby("method")[["prompts", "generated_tokens", "trained_tokens"]].mean()
    ours["operations"] = cost.spent_on(ours["generated_tokens"], ours["trained_tokens"]) / 1e6
    ours.index = pd.Index([METHODS[str(method)].label for method in ours.index])
    return paper.join(ours.add_prefix("ours "), how="outer").rename_axis("model").reset_index()


def table(runs: Runs) -> pd.DataFrame:
    frame = data(runs).set_index("model")
    measured = [name for name in frame if name.startswith("ours ")]
    shown = frame.copy().astype(object)
    for name in [*measured, "gpu_hours"]:
        form = "{:,.1f}" if name == "ours operations" else "{:,.0f}"
        shown[name] = [form.format(value) if value == value else "–" for value in frame[name]]
    names = {name: name.removeprefix("ours ").replace("_", " ") + " (ours)" for name in measured}
    names["ours operations"] = "operations, millions (ours)"
    return (
        shown.fillna("–")
        .rename(columns={**names, "gpu_hours": "GPU hours"})
        .rename(columns=lambda n: n.replace("_", " "))
    )
