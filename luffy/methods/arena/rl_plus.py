"""RL-PLUS (Dong et al. 2025, arXiv 2508.00222): LUFFY's groups, with less weight for what the policy knows already. A
demonstration's ratio is to a mixture of the policy that has sampled and a teacher of whom half is unknown."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..base import register
from ..fields import NonNegative
from ..mixed import WithTraces
from ..rows import Batch, Now, Signal


@register("rl_plus", "RL-PLUS")
class RLPlus(WithTraces):
    scores_foreign = True

    focus: NonNegative = 0.5
    """Exponent of 1 - p in a demonstration token's weight."""

    def signal(self, batch: Batch) -> Signal:
        return Signal.of(batch, self.advantages(batch))

    def live(self, signal: Signal, now: Now) -> Signal:
        """Ratio 2 p / (p_old + (p_old + 1) / 2), weight (1 - p)^focus."""
        old = now.old_logp.exp()
        mixture = ((old + (old + 1) / 2) / 2).log()
        weight = (1 - now.logp.exp()).clamp(min=0) ** self.focus
        return replace(
            signal,
            teacher=torch.where(signal.foreign, mixture, signal.teacher),
            policy=torch.where(signal.foreign, signal.policy * weight, signal.policy),
        )
