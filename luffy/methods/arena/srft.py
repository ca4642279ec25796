"""SRFT (Fu et al. 2025, arXiv 2506.19767): demonstrations are imitated and reinforced at once, and rollouts reinforced
without a baseline; how much, depends on the entropy of the row."""

from __future__ import annotations

from dataclasses import replace

import torch

from ... import shaping
from ...errors import ConfigError
from ...objective import Ratios
from ..base import register
from ..fields import NonNegative
from ..mixed import WithTraces
from ..rows import Batch, Now, Signal


@register("srft", "SRFT")
class SRFT(WithTraces):
    sft_weight: NonNegative = 0.03
    """Of a demonstration's likelihood, times e^-H, H the mean entropy of the row's tokens: 0.5 of the paper, taken to
    be divided as the policy term is, by 16 where one row of eight is a trace of half the window."""
    right_weight: NonNegative = 0.1
    """Of a right rollout, times e^H; a wrong one counts -1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_shaping != "none" or self.epsilon is not None:
            raise ConfigError("srft has no ratio of rollouts: epsilon and on_shaping have nothing to act on")

    @property
    def ratios(self) -> Ratios:
        return replace(super().ratios, level="none", off_shaping=shaping.Regularized(self.gamma))

    def signal(self, batch: Batch) -> Signal:
        """Of rollouts the reward itself, +1 or -1; of demonstrations the advantage over the union."""
        own = batch.of_rows(lambda row: row.foreign == 0)
        reward = torch.tensor([(1.0 if row.right else -1.0) if row.judged else 0.0 for row in batch.rows])
        if self.mask_truncated_completions:
            reward = torch.where(batch.of_rows(lambda row: row.truncated), 0.0, reward)
        advantages = torch.where(own, reward, self.advantages(batch))
        return Signal.of(batch, advantages, likelihood=batch.foreign.float())

    def live(self, signal: Signal, now: Now) -> Signal:
        entropy = now.row_means(now.entropy, torch.ones_like(signal.foreign))
        right = ~signal.foreign & (signal.advantage > 0)
        return replace(
            signal,
            policy=torch.where(right, signal.policy * self.right_weight * entropy.exp(), signal.policy),
            likelihood=signal.likelihood * self.sft_weight * (-entropy).exp(),
        )
