"""BREAD (Zhang et al. 2025, arXiv 2506.17211): where no rollout is right, a group that begins in the shortest part of
the trace with which some are, found by bisection. That part is context, and not learned."""

from __future__ import annotations

from typing import Literal

from ...errors import ConfigError
from ..base import register
from ..fields import Clip, PositiveInt, Share
from ..on_policy import Grouped
from ..rows import ROLLOUT, Batch, Draw, Rounds, Row, Signal, begun


@register("bread", "BREAD")
class BREAD(Grouped):
    scale_rewards: Literal["none", "group", "mean"] = "group"
    epsilon: Clip | None = 0.2
    episodes: PositiveInt = 10
    """Pieces that a trace is cut into."""
    success_min: Share = 0.125
    """Least share of right rows with which a beginning will do."""
    success_max: Share = 0.875
    """Greatest share."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.success_min > self.success_max:
            raise ConfigError(f"success_min {self.success_min} exceeds success_max {self.success_max}")

    def traces_wanted(self) -> int:
        return 1

    def rounds(self, draw: Draw) -> Rounds:
        group = yield [ROLLOUT] * draw.size
        traces = draw.some_traces(1)
        if any(row.right for row in group) or not traces:
            return
        low, high = 0, self.episodes  # with none of the pieces too few are right
        while high - low > 1:
            pieces = (low + high) // 2
            group = yield [begun(traces[0], pieces / self.episodes)] * draw.size
            enough = sum(row.right for row in group[-draw.size :]) >= self.success_min * draw.size
            low, high = (low, pieces) if enough else (pieces, high)

    def signal(self, batch: Batch) -> Signal:
        chosen = self._chosen(batch)
        kept = batch.of_rows(lambda row: chosen[row.group] == row.round)
        weight = batch.spread(kept.float()) * (1.0 - batch.foreign.float())
        return Signal.of(batch, self.advantages(batch, among=kept), policy=weight)

    def _chosen(self, batch: Batch) -> dict[int, int]:
        """The round of each group with the shortest beginning with which a share within the bounds is right; its last
        one if there is none."""
        groups: dict[int, dict[int, list[Row]]] = {}
        for row in batch.rows:
            groups.setdefault(row.group, {}).setdefault(row.round, []).append(row)
        chosen = {}
        for group, rounds in groups.items():
            good = [number for number, rows in rounds.items() if number and self._will_do(rows)]
            chosen[group] = min(good, key=lambda number: rounds[number][0].foreign) if good else max(rounds)
        return chosen

    def _will_do(self, rows: list[Row]) -> bool:
        return self.success_min <= sum(row.right for row in rows) / len(rows) <= self.success_max
