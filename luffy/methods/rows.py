"""What a method is told and what it answers: the only words that the trainer and the methods share.

A group is made in *rounds*. In each, the method says how rows begin (`Start`): with nothing (a fresh rollout), with
tokens that the policy goes on from (a prefix), or as a whole (a demonstration, a replayed row). The trainer samples
what is open, has all rows rewarded, and gives the group back, so that a later round may depend on how many are right.

Then the method says what every token counts for (`Signal`). Tokens are told apart one by one: *foreign* tokens were not
sampled by the policy in this step, all others are its own; each carries the log-prob of whoever wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..objective import group_advantages, row_means
from ..shaping import Shaping

NO_TOKENS = np.zeros(0, dtype=np.int32)
# The last words of the keys of random numbers, which no prompt or generation index is: they keep the streams apart.
TRACES, PREFIXES, SHARES = 2**32 - 2, 2**32 - 3, 2**32 - 4


@dataclass(frozen=True)
class Trace:
    """A demonstration in the student's tokens, (n,) int32 with its end, and the teacher's log-probs of them, (n,)
    float32, or None if nobody knows them."""

    tokens: np.ndarray
    logprobs: np.ndarray | None = None

    def head(self, count: int) -> Trace:
        """Its first tokens."""
        return Trace(self.tokens[:count], None if self.logprobs is None else self.logprobs[:count])


@dataclass(frozen=True)
class Start:
    """How a row begins: with foreign tokens, as `Trace`, behind which the policy goes on, unless they are the whole.

    problem: which one it answers, if not the group's; in a group each problem has its own baseline. replayed: the
    tokens are the policy's own, of an earlier step. apart: the row is learned from in an optimiser step of its own,
    with the others of the step that are, after the usual ones.
    """

    tokens: np.ndarray = field(default_factory=lambda: NO_TOKENS)
    logprobs: np.ndarray | None = None
    whole: bool = False
    problem: int | None = None
    replayed: bool = False
    apart: bool = False


ROLLOUT = Start()


def whole(trace: Trace, **values: Any) -> Start:
    """A row that is the trace."""
    return Start(trace.tokens, trace.logprobs, whole=True, **values)


def begun(trace: Trace, share: float) -> Start:
    """A row that begins with a share of the trace, rounded down, and goes on by itself for one token at least."""
    head = trace.head(min(int(share * len(trace.tokens)), len(trace.tokens) - 1))
    return Start(head.tokens, head.logprobs)


def part(trace: Trace, share: float) -> Start:
    """A row that begins with a share of the trace, or is the trace if that is all of it."""
    return whole(trace) if share == 1.0 else begun(trace, share)


@dataclass
class Row:
    """One row of a group.

    problem, group, index: which problem, which group of the step, and which place in it.
    prompt_ids, token_ids: (P,), (n,) int32. foreign: how many leading tokens the policy did not sample in this step.
    logprobs: (n,) float32, the log-prob of each token under whoever wrote it: the sampler, the teacher, an earlier
        policy; NaN where unknown. truncated: the window ended before the end of the answer.
    reward: set by the verifier; NaN if a reward function has not judged it. round: in which it was made, from 0.
    replayed, apart: as in `Start`.
    """

    problem: int
    group: int
    index: int
    prompt_ids: np.ndarray
    token_ids: np.ndarray
    foreign: int
    logprobs: np.ndarray
    truncated: bool
    text: str = ""
    reward: float = 0.0
    round: int = 0
    replayed: bool = False
    apart: bool = False

    @property
    def judged(self) -> bool:
        return not math.isnan(self.reward)

    @property
    def right(self) -> bool:
        return self.reward > 0.5

    @property
    def off_policy(self) -> bool:
        """Whether all of it is foreign: a demonstration or a replayed row."""
        return self.foreign == len(self.token_ids)

    @property
    def prefixed(self) -> bool:
        """Whether it begins with foreign tokens and goes on by itself."""
        return 0 < self.foreign < len(self.token_ids)


class Memory:
    """What a method keeps from step to step, by problem: starts of later rows, and a number. It is saved in every
    checkpoint. Problems are in the order in which they came."""

    def __init__(self) -> None:
        self.starts: dict[int, list[Start]] = {}
        self.numbers: dict[int, float] = {}

    def __bool__(self) -> bool:
        return bool(self.starts or self.numbers)

    def of(self, problem: int) -> list[Start]:
        return self.starts.get(problem, [])

    def keep(self, problem: int, start: Start, most: int) -> None:
        """Adds a start; of more than `most` of a problem the oldest is forgotten."""
        self.starts[problem] = [*self.of(problem), start][-most:] if most else []

    def forget(self, problem: int) -> None:
        self.starts.pop(problem, None)
        self.numbers.pop(problem, None)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, as arrays that a file can hold."""
        flat = [(problem, start) for problem, starts in self.starts.items() for start in starts]
        unknown = [np.full(len(start.tokens), np.nan, np.float32) for _, start in flat]
        known = [u if s.logprobs is None else s.logprobs for u, (_, s) in zip(unknown, flat, strict=True)]
        return {
            "problems": np.array([problem for problem, _ in flat], np.int64),
            "lengths": np.array([len(start.tokens) for _, start in flat], np.int64),
            "whole": np.array([start.whole for _, start in flat], np.bool_),
            "known": np.array([start.logprobs is not None for _, start in flat], np.bool_),
            "tokens": np.concatenate([NO_TOKENS, *(start.tokens for _, start in flat)]).astype(np.int32),
            "logprobs": np.concatenate([np.zeros(0, np.float32), *known]).astype(np.float32),
            "elsewhere": np.array([-1 if start.problem is None else start.problem for _, start in flat], np.int64),
            "replayed": np.array([start.replayed for _, start in flat], np.bool_),
            "apart": np.array([start.apart for _, start in flat], np.bool_),
            "numbered": np.array(list(self.numbers), np.int64),
            "numbers": np.array(list(self.numbers.values()), np.float64),
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Becomes what `arrays` was made from."""
        self.starts = {}
        self.numbers = dict(zip(arrays["numbered"].tolist(), arrays["numbers"].tolist(), strict=True))
        ends = np.cumsum(arrays["lengths"])
        names = ("problems", "lengths", "whole", "known", "elsewhere", "replayed", "apart")
        columns = [arrays[name].tolist() for name in names]
        for end, problem, length, complete, known, other, replayed, apart in zip(ends, *columns, strict=True):
            tokens, logprobs = arrays["tokens"][end - length : end], arrays["logprobs"][end - length : end]
            start = Start(tokens, logprobs if known else None, complete, None if other < 0 else other, replayed, apart)
            self.starts.setdefault(problem, []).append(start)


@dataclass(frozen=True)
class Draw:
    """What a method knows of a group before it is made: the problem and its traces, how many rows a group has, the step
    (from 0), what the method remembers, and the seed from which its random numbers derive.

    group: the group's number in the step. problems: the traces of every problem there is. spare: the problem that takes
    the place of this one at the nth attempt (from 0), of those that the step does not have; None if there is none.
    """

    problem: int
    traces: Sequence[Trace]
    size: int
    seed: int
    step: int
    memory: Memory
    group: int = 0
    problems: Sequence[Sequence[Trace]] = ()
    spare: Callable[[int], int | None] = lambda attempt: None

    def rng(self, stream: int) -> np.random.Generator:
        """Random numbers that depend on (seed, step, problem) and the stream alone."""
        return np.random.default_rng([self.seed, self.step, self.problem, stream])

    def some_traces(self, wanted: int) -> list[Trace]:
        """`wanted` different traces of the problem, or all if there are fewer."""
        return [self.traces[i] for i in self.rng(TRACES).permutation(len(self.traces))[:wanted]]

    def others(self, wanted: int, stream: int) -> list[int]:
        """`wanted` different problems with traces, of all there are but this one."""
        known = [i for i, traces in enumerate(self.problems) if traces and i != self.problem]
        return [known[i] for i in self.rng(stream).permutation(len(known))[:wanted]]


Rounds = Generator[list[Start], list[Row], None]


@dataclass(frozen=True)
class Batch:
    """All rows of a step, whole groups, and their tokens on one flat axis (N,) in the order of the rows.

    lengths: (B,) int64; foreign: (N,) bool; logprobs: (N,) float32 as in `Row`. step: from 0.
    """

    rows: Sequence[Row]
    lengths: Tensor
    foreign: Tensor
    logprobs: Tensor
    step: int = 0

    @staticmethod
    def of(rows: Sequence[Row], step: int = 0) -> Batch:
        lengths = [len(row.token_ids) for row in rows]
        foreign = [np.arange(length) < row.foreign for length, row in zip(lengths, rows, strict=True)]
        return Batch(
            rows,
            torch.tensor(lengths, dtype=torch.long),
            torch.from_numpy(np.concatenate([np.zeros(0, np.bool_), *foreign])),
            torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *(row.logprobs for row in rows)])),
            step,
        )

    @property
    def first(self) -> Tensor:
        """(B,) int64: the place of each row's first token."""
        return self.lengths.cumsum(0) - self.lengths

    def of_rows(self, value: Callable[[Row], bool]) -> Tensor:
        """(B,) bool: of which rows it is true."""
        return torch.tensor([value(row) for row in self.rows], dtype=torch.bool)

    def spread(self, values: Tensor) -> Tensor:
        """(N,): the value of each token's row, from (B,)."""
        return values.repeat_interleave(self.lengths)

    @property
    def groups(self) -> Tensor:
        """(B,) int64: numbers that rows of one group and problem share."""
        places: dict[tuple[int, int], int] = {}
        return torch.tensor([places.setdefault((row.group, row.problem), len(places)) for row in self.rows])

    def per_group(self, value: Callable[[Row], bool]) -> Tensor:
        """(B,) int64: of how many rows of each row's group it is true."""
        found, groups = self.of_rows(value).long(), self.groups
        return torch.zeros_like(found).index_add(0, groups, found)[groups]

    def last_round(self) -> Tensor:
        """(B,) bool: the rows that were made in the last round of their group."""
        last: dict[int, int] = {}
        for row in self.rows:
            last[row.group] = max(row.round, last.get(row.group, 0))
        return self.of_rows(lambda row: row.round == last[row.group])

    def advantages(
        self, *, baseline: str = "union", scale_rewards: str = "none", among: Tensor | None = None
    ) -> Tensor:
        """(B,) float32: reward over the group's baseline, "union" (Eq. 4) or "on_policy" (the rows without foreign
        tokens); 0 for a row that no one has judged, which is in no baseline either. among: (B,) bool, the rows that a
        baseline may have; default all."""
        if not self.rows:
            return torch.zeros(0)
        judged = self.of_rows(lambda row: row.judged)
        counted = judged if baseline == "union" else judged & self.of_rows(lambda row: row.foreign == 0)
        counted = counted if among is None else counted & among
        groups = self.groups
        empty = ~torch.isin(groups, groups[counted])  # the rows of groups without a baseline
        advantages = group_advantages(
            torch.tensor([row.reward if row.judged else 0.0 for row in self.rows]),
            groups,
            scale_rewards=scale_rewards,
            baseline_mask=counted | empty,
        )
        return torch.where(judged & ~empty, advantages, 0.0)


@dataclass(frozen=True)
class Now:
    """What the policy that is being updated says of some tokens, (M,) float32 each, without gradient.

    logp, entropy: under that policy. old_logp: under the policy that has sampled; of foreign tokens only for a method
    that asks for it (`scores_foreign`). reference_logp: of own tokens under the method's reference model, if it has
    one. rows: (M,) int64, the row of each token; whole rows are there.
    """

    logp: Tensor
    entropy: Tensor
    old_logp: Tensor
    reference_logp: Tensor | None
    rows: Tensor

    def row_means(self, values: Tensor, where: Tensor) -> Tensor:
        """(M,): the mean of each token's row over the tokens of it that are chosen, (M,) bool; 0 where there are
        none."""
        return row_means(values, self.rows, where)


@dataclass(frozen=True)
class Signal:
    """What every token counts for, (N,) each.

    advantage: float32. policy: float32 weight in the policy term. likelihood: float32 weight in the likelihood term. A
    weight of 0 takes no part, nor in the term's denominator. teacher: float32 log-probs that foreign tokens' ratios are
    taken to, read on these only; zeros for pi_phi = 1. foreign: bool. rows: int64, the row of the batch.
    """

    advantage: Tensor
    policy: Tensor
    likelihood: Tensor
    teacher: Tensor
    foreign: Tensor
    rows: Tensor

    @staticmethod
    def of(
        batch: Batch,
        advantages: Tensor | None = None,
        *,
        policy: Tensor | float = 1.0,
        likelihood: Tensor | float = 0.0,
        teacher: Tensor | None = None,
    ) -> Signal:
        """From advantages (B,), and weights that may be one number for all tokens."""
        zeros = torch.zeros(len(batch.foreign))
        return Signal(
            zeros if advantages is None else batch.spread(advantages),
            zeros + policy,
            zeros + likelihood,
            zeros if teacher is None else teacher,
            batch.foreign,
            batch.spread(torch.arange(len(batch.rows))),
        )

    def shaped(self, shape: Shaping, logp: Tensor) -> Signal:
        """With a likelihood term whose tokens count for f'(p) p, the weight that a shaping f has in the policy term.

        logp: (N,) of the policy, without gradient."""
        return replace(self, likelihood=self.likelihood * shape.gradient_weight(logp.exp()))

    @property
    def active(self) -> Tensor:
        """(N,) bool: tokens with a weight in a term."""
        return (self.policy != 0) | (self.likelihood != 0)

    def at(self, tokens: Tensor | slice) -> Signal:
        """The signal of some of the tokens."""
        return Signal(*(getattr(self, f.name)[tokens] for f in fields(self)))

    def to(self, device: torch.device) -> Signal:
        return Signal(*(getattr(self, f.name).to(device) for f in fields(self)))
