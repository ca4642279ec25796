"""ReLIFT (Ma et al. 2025, arXiv 2506.07527): problems that no rollout solves wait in a queue; when enough do, their
traces are imitated in an optimiser step of their own."""

from __future__ import annotations

from ..base import register
from ..fields import NonNegative, PositiveInt
from ..on_policy import Grouped
from ..rows import ROLLOUT, Batch, Draw, Memory, Rounds, Signal, whole


@register("relift", "ReLIFT")
class ReLIFT(Grouped):
    sft_queue: PositiveInt = 128
    """Unsolved problems that wait for each other, and are then learned together, the newest first."""
    sft_loss_coef: NonNegative = 1.0
    """Weight of the token-mean negative log-likelihood of their traces."""

    def traces_wanted(self) -> int:
        return 1

    def rounds(self, draw: Draw) -> Rounds:
        waiting = [problem for problem in draw.memory.numbers if draw.problems[problem]]
        due = waiting[-self.sft_queue :] if draw.group == 0 and len(waiting) >= self.sft_queue else []
        traces = [whole(draw.problems[problem][0], problem=problem, apart=True) for problem in due]
        yield [ROLLOUT] * draw.size + traces

    def signal(self, batch: Batch) -> Signal:
        return self.imitating(batch, self.sft_loss_coef, baseline="on_policy")

    def remember(self, memory: Memory, batch: Batch) -> None:
        for row in batch.rows:
            if row.apart:
                memory.forget(row.problem)
        right = batch.per_group(lambda row: row.right and not row.apart).tolist()
        for row, solved in zip(batch.rows, right, strict=True):
            if not row.apart and not solved:
                memory.forget(row.problem)  # it comes last again
                memory.numbers[row.problem] = float(batch.step)
