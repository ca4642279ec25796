"""Asking a model questions and counting what is right: the part that validation during training, the final evaluation
of a run and the evaluation of a checkpoint on benchmarks have in common.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import Config
from ..data import benchmarks
from ..data.benchmarks import LoadedBenchmark
from ..data.tokenization import TokenizedProblem, completion_text, tokenize_problems
from ..errors import NonFiniteError
from ..sampling.protocol import Sampler, SamplingParams, SamplingRequest
from ..verifier.answers import boxed
from ..verifier.pool import THINK_CLOSE
from .rewards import Reward
from .stats import mean, pass_at_k

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Evaluation draws its random numbers beside those of training, whose problems have smaller indices.
PROMPT_INDEX_OFFSET = 1 << 31


@dataclass(frozen=True)
class Question:
    """A problem to be answered `samples` times. seed_index names it for the random numbers."""

    problem: TokenizedProblem
    samples: int
    seed_index: int


@dataclass(frozen=True)
class Answer:
    """One completion: its text, its length in tokens, and whether the window ended before it did."""

    text: str
    tokens: int
    truncated: bool

    @property
    def think(self) -> bool:
        """Whether it closes a think block."""
        return THINK_CLOSE in self.text

    @property
    def boxed(self) -> bool:
        """Whether it boxes an answer, and its last box is closed."""
        return boxed(self.text)


def ask(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    params: SamplingParams,
    *,
    ends: Collection[int] = (),
) -> Iterator[tuple[int, int, Answer]]:
    """Yields (question, sample, answer) as completions finish, in any order. ends: tokens that end a completion.

    Raises NonFiniteError if the model's probabilities are not numbers.
    """
    places = [(i, sample) for i, question in enumerate(questions) for sample in range(question.samples)]
    requests = [
        SamplingRequest(questions[i].problem.prompt_ids, questions[i].seed_index, sample) for i, sample in places
    ]
    for row, rollout in sampler.sample(requests, params):
        if not np.isfinite(rollout.logprobs).all():
            raise NonFiniteError("the model's probabilities are not numbers")
        text = completion_text(rollout.token_ids, tokenizer, ends)
        yield *places[row], Answer(text, len(rollout.token_ids), rollout.truncated)


@dataclass(frozen=True)
class Result:
    """What a model did on one benchmark.

    right: of each problem's samples, how many were right; samples: samples per problem; mean_length: tokens of a
    completion; truncated, think, boxed: shares of completions that hit the window, closed a think block, boxed an
    answer.
    """

    right: list[int]
    samples: int
    mean_length: float
    truncated: float
    think: float
    boxed: float

    @property
    def scores(self) -> list[float]:
        """Per problem the share of its samples that are right."""
        return [right / self.samples for right in self.right]

    @property
    def accuracy(self) -> float:
        """avg@k with k = samples."""
        return sum(self.right) / (len(self.right) * self.samples)

    def pass_at(self, k: int) -> float:
        return sum(pass_at_k(self.samples, right, k) for right in self.right) / len(self.right)

    def to_dict(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "pass_at": {str(k): self.pass_at(k) for k in range(1, self.samples + 1)},
            "mean_length": self.mean_length,
            "truncated": self.truncated,
            "think": self.think,
            "boxed": self.boxed,
            "samples": self.samples,
            "right": self.right,
        }


def count(problems: Sequence[Mapping[str, Sequence[Any]]], column: str = "scores") -> Result:
    """The result of a benchmark. Each problem has lists with an entry per completion: `column`, "tokens", "truncated",
    "think" and "boxed"; a score above 0.5 is right.

    Raises ValueError unless there are problems and each has the same number of completions.
    """
    samples = {len(problem[column]) for problem in problems}
    if len(samples) != 1 or samples == {0}:
        raise ValueError(f"problems with {sorted(samples)} completions: each needs the same number")

    def average(name: str) -> float:
        return mean([value for problem in problems for value in problem[name]])

    return Result(
        right=[sum(score > 0.5 for score in problem[column]) for problem in problems],
        samples=samples.pop(),
        mean_length=average("tokens"),
        truncated=average("truncated"),
        think=average("think"),
        boxed=average("boxed"),
    )


def columns(answers: Sequence[Answer]) -> dict[str, list[Any]]:
    """What `count` wants to know of a problem's completions besides their scores."""
    return {name: [getattr(answer, name) for answer in answers] for name in ("tokens", "truncated", "think", "boxed")}


# --- during training -------------------------------------------------------------------------------------------------


def tokenize_families(
    loaded: Sequence[LoadedBenchmark], tokenizer: PreTrainedTokenizerBase, config: Config, day: date | None = None
) -> dict[str, list[TokenizedProblem]]:
    """Prompt tokens for every benchmark, without traces; a prompt longer than the window is left out, and logged."""
    tokenized = {}
    for benchmark in loaded:
        tokenized[benchmark.name], counts = tokenize_problems(
            [replace(problem, traces=()) for problem in benchmark.problems],
            tokenizer,
            template=config.data.template,
            max_prompt_length=config.data.max_prompt_length,
            max_completion_length=config.data.max_completion_length,
            template_kwargs=config.data.template_kwargs,
            day=day,
        )
        if counts["problems"] < len(benchmark.problems):
            log.warning("evaluation problems %s: %s", benchmark.name, dict(counts))
    return tokenized


def evaluate(
    sampler: Sampler,
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    families: Mapping[str, Sequence[TokenizedProblem]],
    params: SamplingParams,
    *,
    samples: int,
    ends: Collection[int] = (),
    here: Callable[[int], bool] = lambda problem: True,
) -> dict[int, dict[str, list[Any]]]:
    """Samples the problems `samples` times each and scores the completions, while others are still being sampled.

    here: which of the problems, counted through all families. Returns for each of those what `count` wants to know.
    """
    problems = [problem for members in families.values() for problem in members]
    asked = [i for i in range(len(problems)) if here(i)]
    questions = [Question(problems[i], samples, PROMPT_INDEX_OFFSET + i) for i in asked]
    answers = {}
    judged = reward.batch()
    for place, sample, answer in ask(sampler, tokenizer, questions, params, ends=ends):
        problem = problems[asked[place]]
        judged.add(problem.problem, problem.prompt_text, answer.text)
        answers[asked[place], sample] = answer
    scores = dict(zip(answers, judged.finish(), strict=True))
    return {
        i: {
            "scores": [scores[i, sample] for sample in range(samples)],
            **columns([answers[i, sample] for sample in range(samples)]),
        }
        for i in asked
    }


def results(
    families: Mapping[str, Sequence[TokenizedProblem]], found: Mapping[int, Mapping[str, list[Any]]]
) -> dict[str, Result]:
    """The result of each family, from what `evaluate` has returned for all problems."""
    lines = [found[i] for i in range(len(found))]
    results, start = {}, 0
    for family, members in families.items():
        results[family] = count(lines[start : start + len(members)])
        start += len(members)
    return results


def averages(results: dict[str, Result], ood: Sequence[str]) -> dict[str, float]:
    """Unweighted mean accuracy over the benchmarks in ("id") and out of distribution ("ood"); absent if none is."""
    groups = {
        "id": [result.accuracy for name, result in results.items() if name not in ood],
        "ood": [result.accuracy for name, result in results.items() if name in ood],
    }
    return {name: mean(values) for name, values in groups.items() if values}


def load_families(config: Config) -> list[LoadedBenchmark]:
    """The held-out problems of a configuration, as many of each benchmark as its evaluations take at most."""
    options = config.evaluation
    return benchmarks.load(options.eval_datasets, limit=max(options.eval_problems, options.final_eval_problems))
