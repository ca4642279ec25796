"""TRAPO (Su et al. 2025, arXiv 2512.17636): a group is sampled bit by bit, and the less of it is right so far, the more
of the trace the next rows begin with; traces are imitated, but for what the policy finds unlikely (a trust region)."""

from __future__ import annotations

from dataclasses import replace

import torch

from ... import shaping
from ...objective import Ratios
from ..base import register
from ..fields import Positive, Share
from ..on_policy import Grouped
from ..rows import ROLLOUT, Batch, Draw, Rounds, Signal, part


@register("trapo", "TRAPO")
class TRAPO(Grouped):
    alpha: Positive = 0.1
    """Probability below which a trace's token counts for less: min(1, p / alpha)."""
    first_share: Share = 0.25
    """Share of the trace that a quarter of the rows begin with if fewer than half of those before are right."""
    second_share: Share = 0.5
    """Share that the row before the last begins with if fewer than two thirds are right; the last one is the whole
    trace unless all are."""

    def traces_wanted(self) -> int:
        return 1

    @property
    def ratios(self) -> Ratios:
        return replace(super().ratios, off_shaping=shaping.TrustRegion(self.alpha))

    def rounds(self, draw: Draw) -> Rounds:
        traces = draw.some_traces(1)
        parts = micro_groups(draw.size)
        group = yield [ROLLOUT] * parts[0]
        for rows, bound, share in zip(
            parts[1:], (1 / 2, 2 / 3, 1.0), (self.first_share, self.second_share, 1.0), strict=True
        ):
            guided = traces and sum(row.right for row in group) < bound * len(group)
            if not rows:
                continue
            start = part(traces[0], share) if guided else ROLLOUT
            group = yield [start] * rows

    def signal(self, batch: Batch) -> Signal:
        """Foreign tokens count as if their advantage were 1, of two rows with the same beginning once."""
        usual = Signal.of(batch, self.advantages(batch))
        first: dict[tuple[int, int], int] = {}
        again = torch.tensor([first.setdefault((r.group, r.foreign), i) < i for i, r in enumerate(batch.rows)])
        weight = torch.where(batch.foreign & batch.spread(again), 0.0, 1.0)
        advantage = torch.where(batch.foreign, torch.ones(()), usual.advantage)
        return replace(usual, advantage=advantage, policy=weight)


def micro_groups(size: int) -> list[int]:
    """How many rows each of the four parts of a group has: of 8 rows 4, 2, 1, 1."""
    half, quarter = size // 2, size // 4
    return [size - quarter - 2 * ((size - half - quarter) // 2), quarter, *[(size - half - quarter) // 2] * 2]
