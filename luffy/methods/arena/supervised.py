"""Supervised learning that moves the policy less: DFT (Wu et al. 2025, arXiv 2508.05629), PSFT (Zhu et al. 2025, arXiv
2508.17784)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch

from ... import shaping
from ...objective import Ratios
from ..base import register
from ..fields import Clip, NonNegative
from ..rows import Batch, Now, Signal
from ..supervised import SFT


@register("dft", "DFT")
class DFT(SFT):
    """A token's likelihood counts for its own probability."""

    def live(self, signal: Signal, now: Now) -> Signal:
        return signal.shaped(shaping.Identity(), now.logp)


@register("psft", "PSFT")
class PSFT(SFT):
    """PPO on demonstrations, each of advantage 1, with ratios to the policy that the step began with."""

    scores_foreign = True
    defaults: ClassVar[dict[str, Any]] = {**SFT.defaults, "loss_type": "dapo"}

    epsilon: Clip = 0.2
    """Clip of the ratio below."""
    epsilon_high: NonNegative = 0.28
    """Clip of the ratio above."""

    @property
    def ratios(self) -> Ratios:
        return Ratios(off_clip=(self.epsilon, self.epsilon_high))

    def signal(self, batch: Batch) -> Signal:
        return Signal.of(batch, torch.ones(len(batch.rows)), policy=self.sft_loss_coef)

    def live(self, signal: Signal, now: Now) -> Signal:
        return replace(signal, teacher=now.old_logp)
