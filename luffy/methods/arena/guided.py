"""Rows that begin in a trace which is context and never learned: POPE (arXiv 2601.18779), QuestA (2507.13266)."""

from __future__ import annotations

from ..base import register
from ..fields import Clip, Share
from ..on_policy import Grouped
from ..rows import ROLLOUT, SHARES, Batch, Draw, Rounds, Signal, begun
from ..schedules import Scheduled, at, check_share, scheduled


@register("pope", "POPE")
class POPE(Grouped):
    """Some groups are guided: all their rows go on from the same beginning of the trace."""

    epsilon: Clip | None = 0.2
    guided_share: Share = 0.5
    """Share of groups that are guided."""
    prefix_share: Scheduled = 0.5
    """Share of the trace that their rows begin with: a number, or a mapping of start, end, steps, warmup, shape."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.prefix_share, "prefix_share is a share, from 0 to 1")

    def traces_wanted(self) -> int:
        return 1

    def rounds(self, draw: Draw) -> Rounds:
        guided = draw.rng(SHARES).random() < self.guided_share
        traces = draw.some_traces(1) if guided else []
        yield [begun(traces[0], at(self.prefix_share, draw.step)) if traces else ROLLOUT] * draw.size

    def signal(self, batch: Batch) -> Signal:
        return Signal.of(batch, self.advantages(batch), policy=1.0 - batch.foreign.float())


@register("questa", "QuestA")
class QuestA(POPE):
    """All groups are guided, first by half of the trace, then by a quarter."""

    guided_share: Share = 1.0
    prefix_share: Scheduled = scheduled(start=0.5, end=0.25, steps=250, shape="step")
