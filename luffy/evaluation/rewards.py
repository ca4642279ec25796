"""The two kinds of reward behind one face: the paper's verifier, or a user's function.

A batch of completions is judged together. It is filled while others are still being sampled; `finish` waits for the
rewards. A batch that is left alone, because its sampling has failed, costs nothing.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from ..data.problems import Problem
from ..data.templates import opens_think
from ..errors import ConfigError
from ..methods.fields import LARGE
from ..verifier.answers import boxed
from ..verifier.pool import Verifier, solution
from ..verifier.strict import strict_answer, strict_right

RewardFunction = Callable[..., list[float]]


class RewardBatch(Protocol):
    def add(self, problem: Problem, prompt: str, completion: str) -> None: ...

    def finish(self) -> list[float]:
        """The rewards in the order in which the completions were added; NaN for one that is not judged."""
        ...


class Reward(Protocol):
    counts: Counter[str]

    def batch(self) -> RewardBatch: ...

    def close(self) -> None: ...


class MathReward:
    """math-verify against the ground truth, for multiple choice the strict rule's letter (verifier/strict.py); checks
    run in the verifier's processes from the moment that a completion is added.

    think: whether an answer counts only after a closed think block; None: if its prompt ends inside an open one.
    boxed: whether it counts only in a box.
    """

    def __init__(self, verifier: Verifier, *, think: bool | None, boxed: bool = False) -> None:
        self.verifier = verifier
        self.think, self.boxed = think, boxed
        self.counts = verifier.counts

    def batch(self) -> RewardBatch:
        return _MathBatch(self)

    def close(self) -> None:
        self.verifier.close()


class _MathBatch:
    def __init__(self, reward: MathReward) -> None:
        self.reward = reward
        self.verdicts: list[Future[float]] = []

    def add(self, problem: Problem, prompt: str, completion: str) -> None:
        think = opens_think(prompt) if self.reward.think is None else self.reward.think
        if self.reward.boxed and not boxed(completion):
            self.verdicts.append(_known(0.0))
            self.reward.counts["unboxed"] += 1
        elif problem.kind == "choice":  # a parser of mathematics has no opinion on letters
            given = strict_answer(solution(completion, think) or "", "choice")
            self.verdicts.append(_known(float(strict_right(problem.answer, given, "choice"))))
        else:
            self.verdicts.append(self.reward.verifier.submit(completion, problem.answer, think=think))

    def finish(self) -> list[float]:
        return [verdict.result() for verdict in self.verdicts]


def _known(value: float) -> Future[float]:
    known: Future[float] = Future()
    known.set_result(value)
    return known


class FunctionReward:
    """A function with TRL's signature: reward(prompts, completions, **columns) -> list[float | None].

    None says that the function does not judge a completion: it gets NaN, is counted as "unjudged", takes no part in the
    baseline of its group, and has no advantage.

    prompts and completions are texts; columns are lists: answer, source, and every other column that all rows have.
    """

    def __init__(self, function: RewardFunction) -> None:
        self.function = function
        self.counts: Counter[str] = Counter()

    def batch(self) -> RewardBatch:
        return _FunctionBatch(self)

    def close(self) -> None:
        pass


class _FunctionBatch:
    def __init__(self, reward: FunctionReward) -> None:
        self.reward = reward
        self.rows: list[tuple[Problem, str, str]] = []

    def add(self, problem: Problem, prompt: str, completion: str) -> None:
        self.rows.append((problem, prompt, completion))

    def finish(self) -> list[float]:
        """Raises ConfigError if the function does not return one number of at most LARGE, or None, per completion."""
        if not self.rows:
            return []
        problems, prompts, completions = zip(*self.rows, strict=True)
        shared = set.intersection(*(set(problem.columns) for problem in problems))
        columns = {name: [problem.columns[name] for problem in problems] for name in sorted(shared)}
        columns |= {"answer": [p.answer for p in problems], "source": [p.source for p in problems]}
        values = self.reward.function(prompts=list(prompts), completions=list(completions), **columns)
        try:
            rewards = [math.nan if value is None else float(value) for value in values]
            right = len(rewards) == len(self.rows) and all(
                value is None or abs(reward) <= LARGE for value, reward in zip(values, rewards, strict=True)
            )
        except (TypeError, ValueError, OverflowError):
            right = False
        if not right:
            raise ConfigError(
                f"the reward function must return one finite number, or None, for each of {len(self.rows)} "
                f"completions (and none beyond {LARGE:g}), not {str(values)[:200]}"
            )
        self.reward.counts["unjudged"] += sum(map(math.isnan, rewards))
        return rewards


def load_function(path: str) -> RewardFunction:
    """The function named "module:function". Raises ConfigError if there is none."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two of a name that is none
        raise ConfigError(f"no reward function {path!r}: {error}") from error
    if not callable(function):
        raise ConfigError(f"the reward {path!r} is not a function")
    return function


class RewardConfig(Protocol):
    """The fields of a configuration that say what the reward is."""

    @property
    def reward(self) -> str: ...
    @property
    def verifier_workers(self) -> int: ...
    @property
    def verifier_timeout(self) -> float: ...
    @property
    def think_format(self) -> bool | None: ...
    @property
    def boxed_format(self) -> bool: ...


def make_reward(config: RewardConfig) -> Reward:
    """The reward of the configuration."""
    if config.reward == "math_verify":
        verifier = Verifier(workers=config.verifier_workers, timeout_s=config.verifier_timeout)
        return MathReward(verifier, think=config.think_format, boxed=config.boxed_format)
    return FunctionReward(load_function(config.reward))
