"""What is logged of a step. METRICS.md says what each name means."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.tokenization import TokenizedProblem
from ..evaluation.stats import mean
from ..methods.rows import Row
from ..sampling.ranks import Ranks
from ..verifier.answers import boxed

GAP_BOUND = 0.2  # nats; a token whose log-probs differ by more counts as mismatched between sampler and trainer


class Metrics:
    """Means, sums and maxima of an optimiser step, gathered over micro-batches and ranks.

    They are kept as sums and counts in float64 on the device, until `values`. A mean of nothing is 0, a maximum too.
    """

    def __init__(self, device: torch.device) -> None:
        self.zero = torch.zeros((), dtype=torch.float64, device=device)
        self.sums: defaultdict[str, Tensor] = defaultdict(lambda: self.zero)
        self.counts: Counter[str] = Counter()
        self.tops: defaultdict[str, Tensor] = defaultdict(lambda: self.zero)

    def means(self, values: Mapping[str, Tensor]) -> None:
        """Takes in values of which the mean is reported, any number of each name."""
        for name, tensor in values.items():
            self.sums[name] = self.sums[name] + tensor.detach().double().sum()
            self.counts[name] += tensor.numel()

    def totals(self, values: Mapping[str, Tensor]) -> None:
        """Takes in single values of which the sum is reported."""
        for name, tensor in values.items():
            self.sums[name] = self.sums[name] + tensor.detach().double()

    def maxima(self, values: Mapping[str, Tensor]) -> None:
        """Takes in values of at least 0 of which the greatest is reported."""
        for name, tensor in values.items():
            top = tensor.detach().double().amax() if tensor.numel() else self.zero
            self.tops[name] = torch.maximum(self.tops[name], top)

    def values(self, ranks: Ranks) -> dict[str, float]:
        """All of them over all ranks, which must have taken in the same names."""
        names = list(self.sums)
        sums = torch.stack([self.zero, *(self.sums[name] for name in names)])
        counts = self.zero.new_tensor([0.0, *(float(self.counts[name]) for name in names)])
        tops = [top.item() for top in self.tops.values()]
        greatest = [max(found) for found in zip(*ranks.gather(tops), strict=True)]
        quotients = (ranks.sum(sums) / ranks.sum(counts).clamp(min=1)).tolist()
        return dict(zip(names, quotients[1:], strict=True)) | dict(zip(self.tops, greatest, strict=True))


def rollout_metrics(
    rows: Sequence[Row], advantages: Tensor, traces_wanted: int, unused: Collection[int] = ()
) -> dict[str, float]:
    """What the groups of a step look like: rewards, advantages, lengths; shares are of rows or groups. 0 where empty.

    advantages: (B,). "on" are the rows that the policy sampled from their first token, "off" the wholly foreign ones,
    "prefix" those that begin in foreign tokens and go on. groups/all_right and all_wrong look at the first kind only
    (where there are any); groups/without_trace is the share of groups with fewer than traces_wanted of the others.
    unused: the places of rows that are not learned from.
    """
    parts = {
        "on": [row for row in rows if row.foreign == 0],
        "off": [row for row in rows if row.off_policy],
        "prefix": [row for row in rows if row.prefixed],
    }
    groups: defaultdict[tuple[int, int], list[Row]] = defaultdict(list)
    for row in parts["on"] or rows:
        groups[row.group, row.problem] += [row] if row.judged else []
    judged = [members for members in groups.values() if members]
    lengths = {name: [len(row.token_ids) for row in part] for name, part in {"mean": rows, **parts}.items()}
    prompts = [len(row.prompt_ids) for row in rows]
    guided = Counter(row.group for row in rows if row.foreign and not row.replayed)
    asked: defaultdict[int, set[int]] = defaultdict(set)
    for row in rows:
        asked[row.group] |= set() if row.off_policy else {row.problem}
    return {
        "reward/mean": mean([row.reward for row in rows if row.judged]),
        **{f"reward/{name}": mean([row.reward for row in part if row.judged]) for name, part in parts.items()},
        "groups/all_right": mean([all(row.right for row in members) for members in judged]),
        "groups/all_wrong": mean([not any(row.right for row in members) for members in judged]),
        "groups/off_policy_share": mean([row.off_policy for row in rows]),
        "groups/prefix_share": mean([row.prefixed for row in rows]),
        "groups/without_trace": mean([guided[group] < traces_wanted for group in {row.group for row in rows}]),
        "groups/redrawn": mean([len(problems) > 1 for problems in asked.values()]),
        "rows/replayed": mean([row.replayed for row in rows]),
        "rows/unused": len(unused) / max(1, len(rows)),
        "prefix/share": mean([row.foreign / len(row.token_ids) for row in parts["prefix"]]),
        "advantage/mean": advantages.mean().item() if len(rows) else 0.0,
        "advantage/max": max(advantages.tolist(), default=0.0),
        "advantage/min": min(advantages.tolist(), default=0.0),
        **{f"length/{name}": mean(values) for name, values in lengths.items()},
        "length/max": max(lengths["mean"], default=0),
        "length/min": min(lengths["mean"], default=0),
        "length/prompt": mean(prompts),
        "length/prompt_max": max(prompts, default=0),
        "truncated/on": mean([row.truncated for row in parts["on"]]),
        "boxed/on": mean([boxed(row.text) for row in parts["on"]]),
        "truncated/off": mean([row.truncated for row in parts["off"]]),
    }


def readable(
    rows: Sequence[Row], advantages: Tensor, problems: Sequence[TokenizedProblem], groups: int = 2
) -> list[dict[str, Any]]:
    """The first groups of a step as a person wants to see them. advantages: (B,)."""
    return [
        {
            "prompt": problems[row.problem].prompt_text,
            "answer": problems[row.problem].problem.answer,
            "completion": row.text,
            "off_policy": row.off_policy,
            "foreign_tokens": row.foreign,
            "reward": row.reward if row.judged else None,
            "advantage": round(advantage, 6),
            "truncated": row.truncated,
        }
        for row, advantage in zip(rows, advantages.tolist(), strict=True)
        if row.group < groups
    ]
