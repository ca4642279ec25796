"""CHORD (Zhang et al. 2025, arXiv 2508.11408): supervised learning from demonstrations beside the groups, whose share
of the loss follows a schedule (mu), or whose tokens count for p (1 - p) (phi)."""

from __future__ import annotations

from typing import Any, ClassVar

from ... import shaping
from ..base import register
from ..fields import Clip, PositiveInt, settings
from ..on_policy import Grouped
from ..rows import ROLLOUT, TRACES, Batch, Draw, Now, Rounds, Signal, whole
from ..schedules import Scheduled, at, check_share, scheduled


@settings
class Chord(Grouped):
    """(1 - mu) x policy term of the groups + mu x likelihood of demonstrations of other problems."""

    defaults: ClassVar[dict[str, Any]] = {"loss_type": "dapo"}  # both terms are token means

    epsilon: Clip | None = 0.2
    beside: PositiveInt = 2
    """Demonstrations of other problems beside each group."""
    mu: Scheduled = 0.1
    """Share of the likelihood term in the loss: a number, or a mapping of start, end, steps, warmup, shape."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.mu, "mu is a share of the loss, from 0 to 1")

    def traces_wanted(self) -> int:
        return self.beside

    def traces_needed(self) -> int:
        return 1

    @property
    def rows_beside(self) -> int:
        return self.beside

    def rounds(self, draw: Draw) -> Rounds:
        others = draw.others(self.beside, TRACES)
        yield [ROLLOUT] * draw.size + [whole(draw.problems[other][0], problem=other) for other in others]

    def signal(self, batch: Batch) -> Signal:
        mu = at(self.mu, batch.step)
        return self.imitating(batch, mu, baseline="on_policy", policy=1 - mu)


@register("chord_mu", "CHORD-mu")
class ChordMu(Chord):
    mu: Scheduled = scheduled(start=0.9, end=0.05, steps=200)


@register("chord_phi", "CHORD-phi")
class ChordPhi(Chord):
    def live(self, signal: Signal, now: Now) -> Signal:
        return signal.shaped(shaping.Parabola(), now.logp)
