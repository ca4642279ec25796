"""The problems that a run trains on, in the tokens of its model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING

import numpy as np

from ..config import TINYWORLD, Config
from ..data import tinyworld
from ..data.problems import Problem, load_problems
from ..data.tokenization import TokenizedProblem, tokenize_problems
from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# last words of keys of random numbers, beside those of methods/rows.py
_ORDER, _SPARE = 2**32 - 1, 2**32 - 5


def training_problems(config: Config) -> list[Problem]:
    """The problems of a configuration. Raises DataError if its method learns from traces and there are none."""
    data, world = config.data, config.world
    if data.dataset == TINYWORLD:
        return tinyworld.make_problems(
            tinyworld.IN_DISTRIBUTION,
            data.dataset_split,
            data.num_problems or 1000,
            difficulties=world.difficulties,
            trace_errors=world.trace_errors,
            num_traces=world.num_traces,
            verbosity=world.verbosity,
        )
    problems, _ = load_problems(data.dataset, data.dataset_split)
    taken = problems[: data.num_problems or None]
    log.info("%s: %d of %d problems taken", data.dataset, len(taken), len(problems))
    if config.method.traces_wanted():
        _check_traces(config, taken)
    return taken


def _check_traces(config: Config, problems: list[Problem]) -> None:
    """Raises DataError if there is no trace; warns where most problems have none."""
    source = config.data.dataset
    with_trace = sum(bool(problem.traces) for problem in problems)
    if not with_trace:
        raw = any("generations" in problem.columns for problem in problems)
        hint = (
            f"its column `generations` becomes traces by: luffy data openr1 --source {source} ..."
            if raw
            else "put them in a column `traces`, or choose an on-policy method"
        )
        raise DataError(f"{source} has no traces, which method {config.method.name} learns from: {hint}")
    if with_trace < len(problems) / 2:
        log.warning(
            "%s: only %d of %d problems have a trace; the groups of the others are on-policy",
            *(source, with_trace, len(problems)),
        )


def tokenized(
    config: Config, problems: list[Problem], tokenizer: PreTrainedTokenizerBase, day: date
) -> tuple[list[TokenizedProblem], Counter[str]]:
    """The problems as the trainer uses them, and counts of what did not fit. Raises DataError, ConfigError."""
    data, method = config.data, config.method
    kept, counts = tokenize_problems(
        problems,
        tokenizer,
        template=data.template,
        max_prompt_length=data.max_prompt_length,
        max_completion_length=data.max_completion_length,
        long_traces=data.long_traces,
        template_kwargs=data.template_kwargs,
        day=day,
        teacher=method.needs_teacher,
    )
    if method.traces_wanted() and not counts["traces"]:
        raise DataError(f"no trace of {data.dataset} fits max_completion_length {data.max_completion_length}")
    if not method.samples:
        kept = [problem for problem in kept if problem.traces]
    unknown = [i for i, problem in enumerate(kept) if any(trace.logprobs is None for trace in problem.traces)]
    if method.needs_teacher and unknown:
        raise DataError(
            f"{data.dataset} has traces without trace_logprobs, which off_ratio known needs: those of problem "
            f"{unknown[0]} and of {len(unknown) - 1} others"
        )
    if len(kept) < config.sampling.rollout_batch_size:
        raise ConfigError(f"rollout_batch_size {config.sampling.rollout_batch_size} exceeds the {len(kept)} problems")
    log.info("training problems: %s", dict(counts))
    return kept, counts


def draw_problems(count: int, per_step: int, seed: int, step: int) -> list[int]:
    """Which of `count` problems a step trains on: every epoch is a new permutation, its incomplete last step dropped.

    Raises ValueError if there are fewer problems than a step takes.
    """
    if count < per_step:
        raise ValueError(f"{count} problems are fewer than the {per_step} of one step (rollout_batch_size)")
    epoch, place = divmod(step, count // per_step)
    order = np.random.default_rng([seed, epoch, _ORDER]).permutation(count)
    return [int(i) for i in order[place * per_step : (place + 1) * per_step]]


def spare_problem(count: int, drawn: Sequence[int], group: int, seed: int, step: int, attempt: int) -> int | None:
    """The problem that takes the place of a group's at an attempt (from 0): of those that the step does not have, each
    for one group and attempt only; None when they are used up."""
    rest = np.setdiff1d(np.arange(count), drawn)
    order = np.random.default_rng([seed, step, _SPARE]).permutation(rest)
    place = attempt * len(drawn) + group
    return int(order[place]) if place < len(order) else None
