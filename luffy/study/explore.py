"""One group under the magnifying glass: what each token of a trace counts for, and what one update changes.

Made of the trainer's own parts, for notebooks: a group is sampled, verified and given its advantages exactly as in a
training step.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import Config
from ..methods.rows import Batch, Row
from ..runs import RunDirectory
from ..training.metrics import Metrics
from ..training.trainer import Trainer
from ..training.update import loss_terms

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


def pushes(trainer: Trainer, group: Group, row: int = -1) -> pd.DataFrame:
    """How the first update of a step pushes on each token of a row, the group's trace unless said otherwise, under the
    trainer's method: minus the gradient of the loss in the token's log-prob. Columns token, probability, push.

    The loss is the one that trains (update.loss_terms), without its entropy term, which has no gradient in log-probs.
    """
    batch = Batch.of(group.rows)
    signal = trainer.config.method.signal(batch)
    found = torch.zeros(len(signal.rows))
    for part in trainer.mini_batches(batch, signal):
        places = torch.isin(signal.rows, part.signal.rows.cpu()).nonzero().squeeze(1)  # of the part's tokens
        for micro in [*part.micro_batches, *part.watched]:
            with torch.no_grad():
                logp, entropy = trainer.engine.token_logprobs(micro)
            trainer.take_old_logp(part, logp, micro.token_index)
            leaf = logp.requires_grad_()
            terms = loss_terms(
                part, micro.token_index, leaf, entropy, trainer.config.method, Metrics(trainer.model.device)
            )
            (slope,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), leaf)
            found[places[micro.token_index.cpu()]] = -slope.cpu()
    pushed = found[signal.rows == row % len(group.rows)]
    return trace_tokens(trainer, group, {}, row).assign(push=pushed.tolist())


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


def plot_group(group: Group, longest: int = 72) -> Figure:
    """The group as a diagram: the problem, its answers by who wrote them, their rewards and advantages. Answers are cut
    to `longest` characters."""
    from . import style

    count = len(group.rows)
    figure, (axes,) = style.panels(1, width=10.0, height=0.33 * count + 0.6)
    bars = axes.inset_axes((0.86, 0.0, 0.14, 1.0))
    colors = {False: style.look("on_policy")["color"], True: style.look("luffy")["color"]}
    middle = (count - 1) / 2
    box: dict[str, Any] = dict(boxstyle="round,pad=0.5", facecolor="white", edgecolor="black")
    problem = f"{group.prompt}\nanswer: {group.answer}"
    axes.text(0.08, middle, problem, ha="center", va="center", family="monospace", bbox=box)
    for place, row in enumerate(group.rows):
        text = row.text if len(row.text) <= longest else row.text[: longest - 1] + "…"
        color = colors[row.off_policy]
        box = dict(boxstyle="round,pad=0.25", facecolor=color, alpha=0.18, edgecolor="none")
        axes.plot((0.175, 0.235), (middle, place), color=color, alpha=0.7, linewidth=1.2)
        axes.text(0.245, place, text, va="center", family="monospace", fontsize=8, bbox=box)
        axes.text(0.825, place, f"{row.reward:g}", ha="center", va="center")
        bars.barh(place, float(group.advantages[place]), color=color, height=0.6)
    axes.text(0.01, 0, "sampled by the policy", color=colors[False], va="center", fontsize=9)
    axes.text(0.01, count - 1, "written by the teacher", color=colors[True], va="center", fontsize=9)
    axes.text(0.825, -1, "reward", ha="center", va="center", fontsize=9)
    bars.text(0, -1, "advantage", ha="center", va="center", fontsize=9)
    axes.set(xlim=(0, 1), ylim=(count - 0.4, -1.4))
    axes.axis("off")
    bars.plot((0, 0), (-0.5, count - 0.5), color="black", linewidth=0.8)
    bars.set(ylim=axes.get_ylim(), yticks=[])
    bars.spines[["left", "right", "top"]].set_visible(False)
    return figure


def plot_pushes(tables: dict[str, pd.DataFrame]) -> Figure:
    """The tables of `pushes` as a map, a line per method: each token's share of the method's whole push."""
    from . import style

    tokens = next(iter(tables.values()))["token"]
    shares = [table["push"] / table["push"].abs().sum() for table in tables.values()]
    figure, (axes,) = style.panels(1, width=max(7.0, 0.22 * len(tokens)), height=0.32 * len(tables) + 1.3)
    most = max(float(share.abs().max()) for share in shares)
    image = axes.imshow(shares, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    axes.set_yticks(range(len(tables)), list(tables))
    axes.set_xticks(range(len(tokens)), [token.replace("\n", "\\n") for token in tokens], fontsize=8, rotation=90)
    axes.grid(visible=False)
    figure.colorbar(image, label="share of the push")
    return figure


def plot_pull(table: pd.DataFrame) -> Figure:
    """How hard each token of `trace_tokens` pulls on its logit, a line of bars per shaping."""
    from . import style

    names = [column for column in table if column.startswith("pull: ")]
    figure, (axes,) = style.panels(1, width=max(7.0, 0.22 * len(table)), height=3.0)
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
