"""Prefix-RFT (Huang et al. 2025, arXiv 2507.01679): one row of a group begins in a trace and goes on by itself; of the
beginning only the tokens at which the policy is least sure are learned."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..base import register
from ..fields import Clip, Share
from ..on_policy import Grouped
from ..rows import PREFIXES, ROLLOUT, Batch, Draw, Now, Rounds, Signal, begun
from ..schedules import Scheduled, at, check_share, scheduled


@register("prefix_rft", "Prefix-RFT")
class PrefixRFT(Grouped):
    scores_foreign = True

    epsilon: Clip | None = 0.2
    prefix_low: Scheduled = scheduled(start=0.95, end=0.05, steps=500)
    """Least share of the trace that the row begins with."""
    prefix_high: Share = 0.95
    """Greatest share."""
    entropy_quantile: Share = 0.8
    """Share of the beginning, the tokens of the lowest entropy in the row, that is not learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        said = f"prefix_low is a share between 0 and prefix_high {self.prefix_high}"
        check_share(self.prefix_low, said, most=self.prefix_high)

    def traces_wanted(self) -> int:
        return 1

    def rounds(self, draw: Draw) -> Rounds:
        share = draw.rng(PREFIXES).uniform(at(self.prefix_low, draw.step), self.prefix_high)
        starts = [begun(trace, share) for trace in draw.some_traces(1)]
        yield [ROLLOUT] * (draw.size - len(starts)) + starts

    def signal(self, batch: Batch) -> Signal:
        return Signal.of(batch, self.advantages(batch))

    def live(self, signal: Signal, now: Now) -> Signal:
        """A ratio to the policy that has sampled the rest of the row, and none for the surer tokens."""
        learned = ~signal.foreign | _uncertain(now.entropy, now.rows, signal.foreign, self.entropy_quantile)
        teacher = torch.where(signal.foreign, now.old_logp, signal.teacher)
        return replace(signal, teacher=teacher, policy=signal.policy * learned)


def _uncertain(entropy: torch.Tensor, rows: torch.Tensor, foreign: torch.Tensor, quantile: float) -> torch.Tensor:
    """(M,) bool: the foreign tokens whose entropy is at least the row's quantile."""
    found = torch.zeros_like(foreign)
    for row in rows[foreign].unique():
        tokens = (foreign & (rows == row)).nonzero().squeeze(-1)
        values = entropy[tokens]
        found[tokens] = values >= values.quantile(quantile)
    return found
