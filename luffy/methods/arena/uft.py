"""UFT (Liu et al. 2025, arXiv 2505.16984): all rows of a group begin with the same hint, a random part of the trace
that shrinks over the run; rewards teach what follows, and a small likelihood term the hint."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from ..base import register
from ..fields import Clip, Count, NonNegative, PositiveInt
from ..on_policy import Grouped
from ..rows import PREFIXES, ROLLOUT, Batch, Draw, Rounds, Signal, begun
from ..schedules import Scheduled, at, check_share, scheduled


@register("uft", "UFT")
class UFT(Grouped):
    defaults: ClassVar[dict[str, Any]] = {"loss_type": "dapo"}  # both terms are token means

    scale_rewards: Literal["none", "group", "mean"] = "group"
    epsilon: Clip | None = 0.2
    beta: NonNegative = 0.001
    hint_pieces: PositiveInt = 5
    """Pieces that a trace is cut into; a hint is a number of them, drawn from a binomial distribution."""
    hint_share: Scheduled = scheduled(start=0.95, end=0.05, steps=300)
    """Chance of a piece to be part of the hint."""
    hint_steps: Count = 300
    """Steps after which there is no hint."""
    sft_loss_coef: NonNegative = 0.001
    """Weight of the token-mean negative log-likelihood of the hints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.hint_share, "hint_share is a share, from 0 to 1")

    def traces_wanted(self) -> int:
        return 1

    def rounds(self, draw: Draw) -> Rounds:
        pieces = draw.rng(PREFIXES).binomial(self.hint_pieces, at(self.hint_share, draw.step))
        hints = draw.some_traces(1) if draw.step < self.hint_steps and pieces else []
        yield [begun(hints[0], pieces / self.hint_pieces) if hints else ROLLOUT] * draw.size

    def signal(self, batch: Batch) -> Signal:
        return self.imitating(batch, self.sft_loss_coef)
