"""One group under the magnifying glass: what each token of a trace counts for, and what one update changes.

Made of the trainer's own parts, for notebooks: a group is sampled, verified and given its advantages exactly as in a
training step.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import Config
from ..methods.rows import Batch, Row
from ..runs import RunDirectory
from ..training.trainer import Trainer

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.figure import Figure


@dataclass
class Group:
    """The rows of one problem, demonstrations last, with their rewards, and advantages (B,) over the union (Eq. 4)."""

    prompt: str
    answer: str
    rows: list[Row]
    advantages: Tensor

    def table(self) -> pd.DataFrame:
        """One line a row: completion, off_policy, reward, advantage, tokens."""
        import pandas as pd

        return pd.DataFrame(
            {
                "completion": [row.text for row in self.rows],
                "off_policy": [row.off_policy for row in self.rows],
                "reward": [row.reward for row in self.rows],
                "advantage": self.advantages.tolist(),
                "tokens": [len(row.token_ids) for row in self.rows],
            }
        )


def open_trainer(config: Config, folder: Path) -> Trainer:
    """A trainer for single groups in a folder of its own: one problem a step."""
    return Trainer(config.replace(rollout_batch_size=1, mini_batch_size=1), RunDirectory(folder))


def draw_group(trainer: Trainer, step: int) -> Group:
    """The group of a step: sampled, verified, with advantages. The policy is not changed."""
    rows = trainer.collect(step)
    problem = trainer.problems[rows[0].problem]
    batch = Batch.of(rows)
    advantages = trainer.config.method.signal(batch).advantage[batch.first]
    return Group(problem.prompt_text, problem.problem.answer, rows, advantages)


def trace_tokens(
    trainer: Trainer, group: Group, shapings: dict[str, Callable[[Tensor], Tensor]], row: int = -1
) -> pd.DataFrame:
    """Each token of a row, the group's trace unless said otherwise: token, probability under the policy, and for each
    shaping f what it adds to the objective, f(pi) A, and how hard it pulls on its own logit, f'(pi) pi (1 - pi) A
    (Eq. 8). f is any differentiable function of a tensor of probabilities.
    """
    import pandas as pd

    chosen = group.rows[row]
    pi = trainer.logprobs([chosen], trainer.engine.token_logprobs).cpu().double().exp()
    columns = {
        "token": [trainer.tokenizer.decode([token]) for token in chosen.token_ids.tolist()],
        "probability": pi.tolist(),
    }
    advantage = float(group.advantages[row])
    for name, shaping in shapings.items():
        leaf = pi.clone().requires_grad_()
        value = shaping(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        columns[f"objective: {name}"] = (value.detach() * advantage).tolist()
        columns[f"pull: {name}"] = (slope * pi * (1 - pi) * advantage).tolist()
    return pd.DataFrame(columns)


def update(trainer: Trainer, group: Group) -> dict[str, float]:
    """One optimiser step on the group, as the trainer takes it. Returns its metrics."""
    batch = Batch.of(group.rows)
    (part,) = trainer.mini_batches(batch, trainer.config.method.signal(batch))
    return trainer.update(part)


def coloured(tokens: Sequence[str], values: Sequence[float], low: float = 0.0, high: float = 1.0) -> str:
    """The tokens as HTML, each on a background from red (low) through white to blue (high), its value on hovering."""
    from matplotlib import colormaps, colors

    scale = colormaps["RdBu"]
    parts = []
    for token, value in zip(tokens, values, strict=True):
        place = (value - low) / (high - low)
        red, green, blue, _ = scale(0.15 + 0.7 * min(1.0, max(0.0, place)))
        style = f"background:{colors.to_hex((red, green, blue))};color:black;padding:1px 2px;border-radius:2px"
        parts.append(f'<span style="{style}" title="{value:.4f}">{html.escape(token)}</span>')
    return f'<div style="font-family:monospace;font-size:15px;line-height:1.9">{"".join(parts)}</div>'


def plot_pull(table: pd.DataFrame) -> Figure:
    """How hard each token of `trace_tokens` pulls on its logit, a line of bars per shaping."""
    import matplotlib.pyplot as plt

    names = [column for column in table if column.startswith("pull: ")]
    figure, axes = plt.subplots(figsize=(max(7.0, 0.24 * len(table)), 3.0), layout="constrained")
    plt.close(figure)  # whoever gets the figure shows it
    places = range(len(table))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        axes.bar([p + i * width for p in places], table[name], width, label=name.removeprefix("pull: "), color=f"C{i}")
    labels = [token.replace("\n", "\\n") for token in table["token"]]
    axes.set_xticks([p + 0.4 - width / 2 for p in places], labels, fontsize=8, rotation=90)
    axes.set(ylabel="pull on the token's logit", xlim=(-0.5, len(table)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
