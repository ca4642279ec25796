"""On-policy distillation (Agarwal et al. 2024, arXiv 2306.13649; Thinking Machines 2025): a teacher model scores the
policy's own answers token by token."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...errors import ConfigError
from ..base import RunConfig, register
from ..fields import NonNegative
from ..on_policy import Grouped
from ..rows import Batch, Now, Signal


@register("opd", "On-policy distillation")
class OPD(Grouped):
    teacher: str = ""
    """The model that scores: a folder, hub name or embedded one, with the policy's vocabulary."""
    teacher_coef: NonNegative = 1.0
    """Weight of log pi_teacher - log pi in a token's advantage."""
    reward_coef: NonNegative = 0.0
    """Weight of the usual advantage of its row."""

    def check(self, config: RunConfig) -> None:
        if not self.teacher:
            raise ConfigError("method opd needs a teacher: the folder or name of the model that scores")

    def reference(self, model: str) -> str | None:
        return self.teacher

    def signal(self, batch: Batch) -> Signal:
        return Signal.of(batch, self.reward_coef * self.advantages(batch))

    def live(self, signal: Signal, now: Now) -> Signal:
        assert now.reference_logp is not None  # a method with a reference is given its scores
        gap = now.reference_logp - now.old_logp
        return replace(signal, advantage=torch.where(signal.foreign, 0.0, signal.advantage + self.teacher_coef * gap))
