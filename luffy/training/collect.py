"""From problems to the rewarded rows of a step: the rounds of its groups, sampled and verified together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..config import Config
from ..data.tokenization import TokenizedProblem, completion_text
from ..errors import ConfigError, NonFiniteError
from ..evaluation.rewards import Reward
from ..methods.rows import Draw, Memory, Rounds, Row, Start
from ..sampling.protocol import Rollout, Sampler, SamplingParams, SamplingRequest
from .clock import Clock
from .problems import draw_problems, spare_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

APART = 1 << 20  # more than a group has rows; keeps keys of random numbers apart


@dataclass
class _Group:
    """A group that is being made: its number in the step, its problem, the method's rounds, the rows so far, and how
    many rounds they were made in."""

    number: int
    problem: int
    rounds: Rounds
    rows: list[Row]
    round: int = 0


@dataclass
class Collector:
    """Makes the groups of a step. turn_end: the token that a trace ends with; ends: all that end a completion."""

    config: Config
    problems: Sequence[TokenizedProblem]
    tokenizer: PreTrainedTokenizerBase
    reward: Reward
    turn_end: int
    ends: Collection[int]
    memory: Memory
    clock: Clock

    def collect(self, step: int, sampler: Sampler, groups: Collection[int] | None = None) -> list[Row]:
        """The rewarded rows of a step's groups, or of those with the given numbers, by group and place.

        Raises NonFiniteError with the rows that there are by then.
        """
        sampling, seed = self.config.sampling, self.config.seed
        rows: list[Row] = []
        waiting: list[tuple[_Group, list[Start]]] = []
        count, traces = sampling.rollout_batch_size, [problem.traces for problem in self.problems]
        drawn = draw_problems(len(self.problems), count, seed, step)
        for number, index in enumerate(drawn):
            if groups is None or number in groups:
                spare = partial(spare_problem, len(self.problems), drawn, number, seed, step)
                draw = Draw(
                    index, traces[index], sampling.num_generations, seed, step, self.memory,
                    group=number, problems=traces, spare=spare,
                )  # fmt: skip
                rounds = self.config.method.rounds(draw)
                waiting.append((_Group(number, index, rounds, []), next(rounds, [])))
        try:
            while waiting:
                self._round(waiting, rows, sampler, step)
                waiting = [(group, starts) for group, _ in waiting if (starts := _next(group)) is not None]
        except NonFiniteError as error:
            error.rows = rows
            raise
        return sorted(rows, key=lambda row: (row.group, row.index))

    def _round(
        self, waiting: Sequence[tuple[_Group, list[Start]]], rows: list[Row], sampler: Sampler, step: int
    ) -> None:
        """Adds the rows of one round, with their rewards, to the groups and to all rows."""
        judged = self.reward.batch()
        added: list[Row] = []

        def add(group: _Group, row: Row) -> None:
            problem = self.problems[row.problem]
            row.text = completion_text(row.token_ids, self.tokenizer, self.ends)
            judged.add(problem.problem, problem.prompt_text, row.text)
            for place in (group.rows, rows, added):
                place.append(row)

        requests: list[SamplingRequest] = []
        asked: list[tuple[_Group, int, Start]] = []
        with self.clock.phase("sample"):
            for group, starts in waiting:
                for index, start in enumerate(starts, start=len(group.rows)):
                    problem = group.problem if start.problem is None else start.problem
                    prompt = self.problems[problem].prompt_ids
                    if start.whole:
                        add(group, self._row(group, index, start))
                    else:
                        used = len(start.tokens)
                        if used >= self.config.data.max_completion_length:
                            raise ConfigError(
                                f"method {self.config.method.name} begins a row with {used} tokens, which leaves "
                                f"nothing of max_completion_length {self.config.data.max_completion_length}"
                            )
                        behind = np.concatenate([prompt, start.tokens]) if used else prompt
                        # (another group may answer the same problem, and must not draw the same numbers)
                        key = index if start.problem is None else (group.number + 1) * APART + index
                        requests.append(SamplingRequest(behind, problem, key, used))
                        asked.append((group, index, start))
            data, sampling = self.config.data, self.config.sampling
            params = SamplingParams(data.max_completion_length, sampling.temperature, seed=self.config.seed, step=step)
            for i, rollout in sampler.sample(requests, params) if requests else ():
                if not np.isfinite(rollout.logprobs).all():
                    raise NonFiniteError("the policy's probabilities are not numbers")
                group, index, start = asked[i]
                add(group, self._row(group, index, start, rollout))
        with self.clock.phase("verify"):
            for row, reward in zip(added, judged.finish(), strict=True):
                row.reward = reward
        for group, _ in waiting:
            group.rows.sort(key=lambda row: row.index)
            group.round += 1

    def _row(self, group: _Group, index: int, start: Start, rollout: Rollout | None = None) -> Row:
        """The row that a start becomes with what the policy has sampled behind it; without that it is whole."""
        tokens, logprobs, foreign = start.tokens, _known(start), len(start.tokens)
        if rollout is None:
            truncated = int(tokens[-1]) not in (self.turn_end, *self.ends)
        else:
            tokens = np.concatenate([tokens, rollout.token_ids])
            logprobs, truncated = np.concatenate([logprobs, rollout.logprobs]), rollout.truncated
        problem = group.problem if start.problem is None else start.problem
        prompt = self.problems[problem].prompt_ids
        return Row(
            problem, group.number, index, prompt, tokens, foreign, logprobs, truncated,
            round=group.round, replayed=start.replayed, apart=start.apart,
        )  # fmt: skip


def _known(start: Start) -> np.ndarray:
    """(n,) float32: the log-probs of a start's tokens, NaN where nobody knows them."""
    return np.full(len(start.tokens), np.nan, np.float32) if start.logprobs is None else start.logprobs


def _next(group: _Group) -> list[Start] | None:
    """How the rows of the group's next round begin; None if it has no other."""
    try:
        return group.rounds.send(group.rows)
    except StopIteration:
        return None
