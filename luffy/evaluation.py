"""Evaluation on held-out problems: avg@k and pass@k per family, in and out of distribution."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import tinyworld
from .config import TINYWORLD, Config
from .data import Problem, load_problems
from .rewards import Reward
from .rollouts import TokenizedProblem, completion_text, tokenize_problems
from .sampling import Sampler, SamplingRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Evaluation draws its random numbers beside those of training, whose problems have smaller indices.
PROMPT_INDEX_OFFSET = 1 << 31


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from `right` of `samples` (Chen et al. 2021).

    Raises ValueError unless 0 <= right <= samples and 1 <= k <= samples.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {right} right in {samples} samples is not defined")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


@dataclass(frozen=True)
class FamilyResult:
    """What a model did on one family of problems.

    right: of each problem's samples, how many were right; samples: samples per problem;
    mean_length: tokens of a completion; truncated, think: shares of completions.
    """

    right: list[int]
    samples: int
    mean_length: float
    truncated: float
    think: float

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
            "samples": self.samples,
            "right": self.right,
        }


def evaluation_problems(config: Config, per_family: int) -> dict[str, list[Problem]]:
    """The held-out problems by family (tiny world) or source (files), at most `per_family` of each."""
    families: dict[str, list[Problem]] = defaultdict(list)
    for dataset in config.eval_datasets:
        if dataset == TINYWORLD:
            for family in tinyworld.FAMILIES:
                families[family] += tinyworld.make_problems(family, "eval", per_family)
        else:
            for problem in load_problems(dataset, split="test")[0]:
                families[problem.source or dataset].append(problem)
    return {family: problems[:per_family] for family, problems in families.items()}


def tokenize_families(
    families: dict[str, list[Problem]], tokenizer: PreTrainedTokenizerBase, config: Config
) -> dict[str, list[TokenizedProblem]]:
    """Prompt tokens for every family, without traces; a prompt longer than the window is left out, and logged."""
    tokenized = {}
    for family, problems in families.items():
        tokenized[family], counts = tokenize_problems(
            [replace(problem, traces=()) for problem in problems],
            tokenizer,
            template=config.template,
            max_prompt_length=config.max_prompt_length,
            max_completion_length=config.max_completion_length,
        )
        if counts["problems"] < len(problems):
            log.warning("evaluation problems %s: %s", family, dict(counts))
    return tokenized


def evaluate(
    sampler: Sampler,
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    families: dict[str, list[TokenizedProblem]],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> dict[str, FamilyResult]:
    """Samples every problem `samples` times and scores the completions. A reward above 0.5 counts as right."""
    problems = [(family, problem) for family, members in families.items() for problem in members]
    requests = [
        SamplingRequest(problem.prompt_ids, PROMPT_INDEX_OFFSET + index, generation)
        for index, (_, problem) in enumerate(problems)
        for generation in range(samples)
    ]
    order, lengths, truncated, think = [], [0] * len(requests), [False] * len(requests), [False] * len(requests)
    for i, rollout in sampler.sample(
        requests, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, step=0
    ):
        problem = problems[i // samples][1]
        text = completion_text(rollout.token_ids, tokenizer)
        reward.start(problem.problem, problem.prompt_text, text)
        order.append(i)
        lengths[i], truncated[i], think[i] = len(rollout.token_ids), rollout.truncated, "</think>" in text
    right = [False] * len(requests)
    for i, score in zip(order, reward.finish(), strict=True):
        right[i] = score > 0.5
    results = {}
    start = 0
    for family, members in families.items():
        rows = slice(start, start + len(members) * samples)
        start = rows.stop
        results[family] = FamilyResult(
            right=[sum(right[i : i + samples]) for i in range(rows.start, rows.stop, samples)],
            samples=samples,
            mean_length=_mean(lengths[rows]),
            truncated=_mean(truncated[rows]),
            think=_mean(think[rows]),
        )
    return results


def averages(results: dict[str, FamilyResult], ood_sources: Sequence[str]) -> dict[str, float]:
    """Unweighted mean accuracy over the families in ("id") and out of distribution ("ood"); absent if there is none."""
    groups = {
        "id": [result.accuracy for family, result in results.items() if family not in ood_sources],
        "ood": [result.accuracy for family, result in results.items() if family in ood_sources],
    }
    return {name: _mean(values) for name, values in groups.items() if values}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
