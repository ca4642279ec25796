"""ExGRPO (Zhan et al. 2025, arXiv 2510.02245): groups of problems that were half solved before, with a right answer of
then replayed among the rollouts, at its ratio to the policy that wrote it. No stronger model."""

from __future__ import annotations

import math
from dataclasses import replace

from ... import shaping
from ...objective import Ratios
from ..base import register
from ..fields import Positive, Share
from ..on_policy import Grouped
from ..rows import ROLLOUT, SHARES, Batch, Draw, Memory, Rounds, Row, Signal, Start


@register("exgrpo", "ExGRPO")
class ExGRPO(Grouped):
    replay_share: Share = 0.5
    """Share of groups that go back to a problem of an earlier step."""
    replay_start: Share = 0.35
    """Share of right rollouts in a step from which on answers are kept."""
    replay_sigma: Positive = 1.0
    """Width, in rows, of the normal distribution around half of a group, by which problems are chosen."""

    @property
    def ratios(self) -> Ratios:
        return replace(super().ratios, off_shaping=shaping.Regularized(self.gamma))

    def rounds(self, draw: Draw) -> Rounds:
        rng, memory = draw.rng(SHARES), draw.memory
        if not memory.numbers or rng.random() >= self.replay_share:
            yield [ROLLOUT] * draw.size
            return
        buckets: dict[int, list[int]] = {}
        for problem, right in memory.numbers.items():
            buckets.setdefault(int(right), []).append(problem)
        weights = [math.exp(-(((k - draw.size / 2) / self.replay_sigma) ** 2) / 2) for k in buckets]
        bucket = list(buckets.values())[rng.choice(len(weights), p=[w / sum(weights) for w in weights])]
        problem = bucket[rng.integers(len(bucket))]
        best = max(memory.of(problem), key=_certainty)
        again = Start(best.tokens, best.logprobs, whole=True, problem=problem, replayed=True)
        yield [Start(problem=problem)] * (draw.size - 1) + [again]

    def signal(self, batch: Batch) -> Signal:
        return Signal.of(batch, self.advantages(batch), teacher=batch.logprobs)

    def remember(self, memory: Memory, batch: Batch) -> None:
        """Right rollouts of problems that are not always solved. A problem that always is, is not asked again."""
        own = [row for row in batch.rows if not row.replayed]
        if not memory.numbers and sum(row.right for row in own) < self.replay_start * len(own):
            return
        groups: dict[int, list[Row]] = {}  # each of one problem
        for row in own:
            groups.setdefault(row.group, []).append(row)
        for rows in groups.values():
            for row in rows:
                if row.right:
                    memory.keep(row.problem, Start(row.token_ids, row.logprobs, whole=True), most=len(rows))
        for rows in groups.values():
            if memory.of(rows[0].problem):
                memory.numbers[rows[0].problem] = float(sum(row.right for row in rows))
        for rows in groups.values():  # last: two groups may have had the same problem
            if all(row.right for row in rows):
                memory.forget(rows[0].problem)


def _certainty(start: Start) -> float:
    """The mean log-prob of an answer when it was sampled."""
    return -math.inf if start.logprobs is None else float(start.logprobs.mean())
