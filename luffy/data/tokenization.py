"""Problems and traces in the tokens of the student model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from ..methods.rows import Trace
from .problems import Problem
from .templates import check_template, continuation, render_prompt, turn_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizedProblem:
    """A problem as the trainer uses it: prompt tokens, (P,) int32, and its usable traces, which have an end."""

    problem: Problem
    prompt_text: str
    prompt_ids: np.ndarray
    traces: tuple[Trace, ...]


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
    teacher: bool = False,
) -> tuple[list[TokenizedProblem], Counter[str]]:
    """Prepares problems for training and counts what did not fit.

    A problem whose prompt is empty or longer than max_prompt_length tokens is left out. A trace longer than
    max_completion_length is cut to it, without EOS (long_traces="cut", as the reference does), or left out ("drop").
    Counts: "problems", "long_prompts", "empty_prompts", "traces", "cut_traces", "dropped_traces",
    "without_trace". Raises DataError if no problem is left, or a trace's log-probs are not one per token of it, its end
    included; TemplateError if there is no such template.
    template_kwargs, day: see `render_prompt`. teacher: whether the traces' log-probs are wanted.
    """
    if long_traces not in ("cut", "drop"):
        raise ValueError(f"long_traces is 'cut' or 'drop', not {long_traces!r}")
    check_template(tokenizer, template)
    counts: Counter[str] = Counter()
    kept = []
    end = turn_end(tokenizer, template)
    longest = 0
    for number, problem in enumerate(problems):
        text = render_prompt(problem, tokenizer, template, template_kwargs=template_kwargs, day=day)
        # A chat template writes a BOS where the model has one; plain text gets it from the tokenizer.
        prompt_ids = tokenizer.encode(text, add_special_tokens=template != "chat")
        longest = max(longest, len(prompt_ids))
        if not prompt_ids or len(prompt_ids) > max_prompt_length:
            counts["long_prompts" if prompt_ids else "empty_prompts"] += 1
            continue
        traces = []
        for place, trace in enumerate(problem.traces):
            ids = tokenize_trace(trace, text, tokenizer, end)
            known = problem.trace_logprobs[place] if teacher and problem.trace_logprobs else None
            if known is not None and len(known) != len(ids):
                raise DataError(
                    f"problem {number}: trace_logprobs has {len(known)} values for a trace of {len(ids)} tokens, "
                    f"its end included: {trace[:60]!r}"
                )
            if len(ids) > max_completion_length:
                if long_traces == "drop":
                    counts["dropped_traces"] += 1
                    continue
                counts["cut_traces"] += 1
                ids = ids[:max_completion_length]
            logprobs = None if known is None else np.asarray(known[: len(ids)], dtype=np.float32)
            traces.append(Trace(np.asarray(ids, dtype=np.int32), logprobs))
        counts["problems"] += 1
        counts["traces"] += len(traces)
        counts["without_trace"] += not traces
        kept.append(TokenizedProblem(problem, text, np.asarray(prompt_ids, dtype=np.int32), tuple(traces)))
    if not kept:
        raise DataError(
            f"no usable problem: {dict(counts)}; max_prompt_length is {max_prompt_length}, and the longest prompt has "
            f"{longest} tokens"
        )
    return kept, counts


def completion_text(token_ids: Sequence[int] | np.ndarray, tokenizer: Any, ends: Collection[int] = ()) -> str:
    """The completion as the verifier reads it: special tokens kept, as in the reference, but for a final EOS or another
    of the tokens that end a completion."""
    ids = [int(token) for token in token_ids]
    if ids and (ids[-1] == tokenizer.eos_token_id or ids[-1] in ends):
        ids.pop()
    return tokenizer.decode(ids, skip_special_tokens=False)
