"""Groups: for each problem some fresh rollouts and, in the mixed-policy methods, a few demonstrations.

Off-policy rows are never generated. Which trace a problem contributes is drawn from (seed, step, problem) alone.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .batching import TokenSequence
from .data import DataError, Problem
from .sampling import Rollout, SamplingRequest
from .templates import check_template, continuation, render_prompt, turn_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Completion:
    """One row of a group: a rollout of the policy, or a demonstration (off_policy).

    group, index: which group of the step and which place in it, demonstrations last.
    sampler_logprobs: log-probs under the sampler, one per token; empty for a demonstration.
    truncated: the window ended before the EOS. reward: set by the verifier; NaN if a reward function has not judged it.
    """

    problem_index: int
    group: int
    index: int
    prompt_ids: list[int]
    token_ids: list[int]
    off_policy: bool
    truncated: bool
    sampler_logprobs: list[float] = field(default_factory=list)
    text: str = ""
    reward: float = 0.0

    @property
    def judged(self) -> bool:
        return not math.isnan(self.reward)

    @property
    def sequence(self) -> TokenSequence:
        return TokenSequence(self.prompt_ids, self.token_ids)


@dataclass(frozen=True)
class TokenizedProblem:
    """A problem as the trainer uses it: prompt tokens, and its usable traces as int32 completion tokens with an end."""

    problem: Problem
    prompt_text: str
    prompt_ids: tuple[int, ...]
    traces: tuple[np.ndarray, ...]


def tokenize_trace(
    trace: str, prompt_text: str, tokenizer: PreTrainedTokenizerBase, end: int | None = None
) -> list[int]:
    """A trace in the student's tokens, up to an end that it may contain, with `end` behind it: the token that ends a
    turn (templates.turn_end), the tokenizer's EOS if it is None.

    The opening of a think block that the prompt has opened already is left out.
    """
    end = tokenizer.eos_token_id if end is None else end
    ids = tokenizer.encode(continuation(trace, prompt_text), add_special_tokens=False)
    place = next((place for place, token in enumerate(ids) if token in (end, tokenizer.eos_token_id)), len(ids))
    return [*ids[:place], end]


def tokenize_problems(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "chat",
    max_prompt_length: int,
    max_completion_length: int,
    long_traces: str = "cut",
    template_kwargs: Mapping[str, Any] | None = None,
    day: date | None = None,
) -> tuple[list[TokenizedProblem], Counter[str]]:
    """Prepares problems for training and counts what did not fit.

    A problem whose prompt is empty or longer than max_prompt_length tokens is left out. A trace longer than
    max_completion_length is cut to it, without EOS (long_traces="cut", as the reference does), or left out ("drop").
    Counts: "problems", "long_prompts", "empty_prompts", "traces", "cut_traces", "dropped_traces",
    "without_trace". Raises DataError if no problem is left, TemplateError if there is no such template.
    template_kwargs, day: see `render_prompt`.
    """
    if long_traces not in ("cut", "drop"):
        raise ValueError(f"long_traces is 'cut' or 'drop', not {long_traces!r}")
    check_template(tokenizer, template)
    counts: Counter[str] = Counter()
    kept = []
    end = turn_end(tokenizer, template)
    longest = 0
    for problem in problems:
        text = render_prompt(problem, tokenizer, template, template_kwargs=template_kwargs, day=day)
        # A chat template writes a BOS where the model has one; plain text gets it from the tokenizer.
        prompt_ids = tokenizer.encode(text, add_special_tokens=template != "chat")
        longest = max(longest, len(prompt_ids))
        if not prompt_ids or len(prompt_ids) > max_prompt_length:
            counts["long_prompts" if prompt_ids else "empty_prompts"] += 1
            continue
        traces = []
        for trace in problem.traces:
            ids = tokenize_trace(trace, text, tokenizer, end)
            if len(ids) > max_completion_length:
                if long_traces == "drop":
                    counts["dropped_traces"] += 1
                    continue
                counts["cut_traces"] += 1
                ids = ids[:max_completion_length]
            traces.append(np.asarray(ids, dtype=np.int32))
        counts["problems"] += 1
        counts["traces"] += len(traces)
        counts["without_trace"] += not traces
        kept.append(TokenizedProblem(problem, text, tuple(prompt_ids), tuple(traces)))
    if not kept:
        raise DataError(
            f"no usable problem: {dict(counts)}; max_prompt_length is {max_prompt_length}, and the longest prompt has "
            f"{longest} tokens"
        )
    return kept, counts


# The last words of the keys below, which no prompt or generation index is: they keep the streams apart from sampling's.
_ORDER, _TRACES = 2**32 - 1, 2**32 - 2


def draw_problems(count: int, per_step: int, seed: int, step: int) -> list[int]:
    """Which of `count` problems a step trains on: every epoch is a new permutation, its incomplete last step dropped.

    Raises ValueError if there are fewer problems than a step takes.
    """
    if count < per_step:
        raise ValueError(f"{count} problems are fewer than the {per_step} of one step (rollout_batch_size)")
    epoch, place = divmod(step, count // per_step)
    order = np.random.default_rng([seed, epoch, _ORDER]).permutation(count)
    return [int(i) for i in order[place * per_step : (place + 1) * per_step]]


def draw_traces(available: int, wanted: int, seed: int, step: int, problem_index: int) -> list[int]:
    """Which of a problem's traces join its group: `wanted` different ones, or all if there are fewer."""
    order = np.random.default_rng([seed, step, problem_index, _TRACES]).permutation(available)
    return [int(i) for i in order[:wanted]]


def plan_groups(
    problems: Sequence[TokenizedProblem],
    indices: Sequence[int],
    *,
    num_generations: int,
    num_off_policy: int,
    supervised: bool,
    eos_id: int,
    seed: int,
    step: int,
) -> tuple[list[Completion], list[SamplingRequest], list[int]]:
    """Decides a step's groups: which demonstrations join them and which rollouts are to be sampled.

    Every group has num_generations rows; where a problem has fewer than num_off_policy traces, fresh rollouts take
    their place. If supervised, groups are their demonstrations and nothing is sampled.

    Returns the demonstrations, the sampling requests and the group (0, 1, ...) of each request.
    """
    demonstrations: list[Completion] = []
    requests: list[SamplingRequest] = []
    groups: list[int] = []
    for group, index in enumerate(indices):
        problem = problems[index]
        chosen = draw_traces(len(problem.traces), num_off_policy, seed, step, index)
        fresh = 0 if supervised else num_generations - len(chosen)
        for generation in range(fresh):
            requests.append(SamplingRequest(problem.prompt_ids, index, generation))
            groups.append(group)
        for place, trace in enumerate((problem.traces[i] for i in chosen), start=fresh):
            ids = list(problem.prompt_ids), trace.tolist()
            cut = ids[1][-1] != eos_id
            demonstrations.append(Completion(index, group, place, *ids, off_policy=True, truncated=cut))
    return demonstrations, requests, groups


def from_rollout(request: SamplingRequest, group: int, rollout: Rollout) -> Completion:
    """The row that a finished rollout becomes."""
    return Completion(
        request.prompt_index,
        group,
        request.generation_index,
        list(request.prompt_ids),
        rollout.token_ids,
        off_policy=False,
        truncated=rollout.truncated,
        sampler_logprobs=rollout.logprobs,
    )


def completion_text(token_ids: Sequence[int], tokenizer: Any, ends: Collection[int] = ()) -> str:
    """The completion as the verifier reads it: special tokens kept, as in the reference, but for a final EOS or another
    of the tokens that end a completion."""
    ids = list(token_ids)
    if ids and (ids[-1] == tokenizer.eos_token_id or ids[-1] in ends):
        ids.pop()
    return tokenizer.decode(ids, skip_special_tokens=False)


def rollout_metrics(rows: Sequence[Completion], advantages: Tensor, num_off_policy: int) -> dict[str, float]:
    """What the sampled groups look like: rewards, advantages, lengths; shares are of rows or of groups. 0 where empty.

    groups/all_right and all_wrong look at rollouts only (where there are any); groups/without_trace is the share of
    groups with fewer than num_off_policy demonstrations.
    """
    on = [row for row in rows if not row.off_policy]
    off = [row for row in rows if row.off_policy]
    groups: defaultdict[int, list[float]] = defaultdict(list)
    for row in on or off:
        groups[row.group] += [row.reward] if row.judged else []
    lengths = {name: [len(r.token_ids) for r in part] for name, part in {"mean": rows, "on": on, "off": off}.items()}
    prompts = [len(row.prompt_ids) for row in rows]
    demonstrations = Counter(row.group for row in off)
    return {
        "reward/mean": mean([row.reward for row in rows if row.judged]),
        "reward/on": mean([row.reward for row in on if row.judged]),
        "reward/off": mean([row.reward for row in off if row.judged]),
        "groups/all_right": mean([min(rewards) > 0.5 for rewards in groups.values() if rewards]),
        "groups/all_wrong": mean([max(rewards) <= 0.5 for rewards in groups.values() if rewards]),
        "groups/off_policy_share": mean([row.off_policy for row in rows]),
        "groups/without_trace": mean([demonstrations[group] < num_off_policy for group in {row.group for row in rows}]),
        "advantage/mean": mean(advantages),
        "advantage/max": max(advantages.tolist(), default=0.0),
        "advantage/min": min(advantages.tolist(), default=0.0),
        **{f"length/{name}": mean(values) for name, values in lengths.items()},
        "length/max": max(lengths["mean"], default=0),
        "length/min": min(lengths["mean"], default=0),
        "length/prompt": mean(prompts),
        "length/prompt_max": max(prompts, default=0),
        "truncated/on": mean([row.truncated for row in on]),
        "truncated/off": mean([row.truncated for row in off]),
    }


def mean(values: Sequence[float] | Tensor) -> float:
    """The mean as a float, 0 of nothing."""
    if isinstance(values, Tensor):
        return values.mean().item() if len(values) else 0.0
    return float(sum(values) / len(values)) if values else 0.0
