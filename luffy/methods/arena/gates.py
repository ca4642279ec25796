"""A trace only where the policy fails: HPT (Lv et al. 2025, arXiv 2509.04419), SuperRL (2506.01096), AMPO
(2510.02227)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from ... import shaping
from ...objective import Ratios
from ..base import register
from ..fields import Clip, Count, NonNegative, PositiveInt
from ..on_policy import Grouped
from ..rows import ROLLOUT, Batch, Draw, Rounds, Signal, whole


@register("hpt", "HPT")
class HPT(Grouped):
    """Rollouts learn by reward; where too few are right they leave the batch, and the trace is imitated instead."""

    gate: Count = 0
    """Rollouts of a group that may be right for its trace to take their place."""
    sft_loss_coef: NonNegative = 0.1
    """Weight of the token-mean negative log-likelihood of the traces; the reference's 1 (REFERENCE.md converts)."""

    def traces_wanted(self) -> int:
        return 1

    def rounds(self, draw: Draw) -> Rounds:
        group = yield [ROLLOUT] * draw.size
        if sum(row.right for row in group) <= self.gate:
            yield [whole(trace) for trace in draw.some_traces(1)]

    def signal(self, batch: Batch) -> Signal:
        plain = batch.per_group(lambda row: row.foreign > 0) == 0
        return Signal.of(
            batch,
            self.advantages(batch, "on_policy"),
            policy=batch.spread(plain.float()),
            likelihood=self.sft_loss_coef * batch.foreign.float(),
        )


@register("superrl", "SuperRL")
class SuperRL(HPT):
    """The same with GRPO's own advantage and clip."""

    scale_rewards: Literal["none", "group", "mean"] = "group"
    epsilon: Clip | None = 0.2


@register("ampo", "AMPO")
class AMPO(Grouped):
    """Where no rollout is right, traces take the place of some, and are learned as LUFFY does."""

    epsilon: Clip | None = 0.2
    num_off_policy: PositiveInt = 2
    """Rollouts that traces take the place of, as far as the problem has so many."""

    def traces_wanted(self) -> int:
        return self.num_off_policy

    def traces_needed(self) -> int:
        return 1

    @property
    def ratios(self) -> Ratios:
        return replace(super().ratios, off_shaping=shaping.Regularized(self.gamma))

    def rounds(self, draw: Draw) -> Rounds:
        group = yield [ROLLOUT] * draw.size
        if not any(row.right for row in group):
            yield [whole(trace) for trace in draw.some_traces(min(self.num_off_policy, draw.size))]

    def signal(self, batch: Batch) -> Signal:
        traces = batch.per_group(lambda row: row.foreign > 0)
        rollouts = batch.per_group(lambda row: row.foreign == 0)
        index = torch.tensor([row.index for row in batch.rows])
        kept = (index < rollouts - traces) | (index >= rollouts)  # without the last rollouts, and with the traces
        return Signal.of(batch, self.advantages(batch, among=kept), policy=batch.spread(kept.float()))
