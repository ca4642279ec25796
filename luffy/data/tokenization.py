"""Problems and traces in the tokens of the student model."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from ..methods.rows import Trace
from ..runs import writing
from .hub import held_in_cache
from .problems import Problem
from .templates import check_template, continuation, render_prompt, turn_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CACHED_CHARACTERS = 10_000_000  # of all traces; fewer are tokenized in seconds


@dataclass(frozen=True)
class TokenizedProblem:
    """A problem as the trainer uses it: prompt tokens, (P,) int32, and its usable traces, which have an end."""

    problem: Problem
    prompt_text: str
    prompt_ids: np.ndarray
    traces: tuple[Trace, ...]


def tokenize_traces(
    continuations: Sequence[str], tokenizer: PreTrainedTokenizerBase, end: int | None = None
) -> list[np.ndarray]:
    """Traces, without what their prompts begin for them, in the student's tokens, (n,) int32 each: up to an end that
    one may contain, with `end` behind it: the token that ends a turn (templates.turn_end), the tokenizer's EOS if it is
    None. Many are kept in the cache folder, by a hash of all that they depend on: the first of several processes does
    the work, the others, and later starts, read the result.
    """
    end = tokenizer.eos_token_id if end is None else end
    if sum(map(len, continuations)) < CACHED_CHARACTERS:
        return _tokenize_traces(continuations, tokenizer, end)
    digest = hashlib.sha256(f"{end} {tokenizer.eos_token_id} {importlib.metadata.version('tokenizers')}".encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for text in continuations:
        digest.update(len(text).to_bytes(8, "little") + text.encode())
    with held_in_cache("traces", f"{digest.hexdigest()[:24]}.npz") as file:
        if (known := _saved(file)) is not None:
            return known
        log.info("tokenizing %d traces, to be kept in %s", len(continuations), file)
        made = _tokenize_traces(continuations, tokenizer, end)
        aside = file.with_suffix(".tmp.npz")
        with writing(file):
            np.savez(aside, tokens=np.concatenate(made), lengths=[len(ids) for ids in made])
            os.replace(aside, file)
        return made


def _saved(file: Path) -> list[np.ndarray] | None:
    """What a file holds; None if there is none. One that is damaged is logged and passed over."""
    try:
        with np.load(file) as saved:  # (checks the sums of what it reads)
            return np.split(saved["tokens"], np.cumsum(saved["lengths"])[:-1])
    except FileNotFoundError:
        return None
    except Exception as error:  # zip, zlib and numpy have many for a damaged file
        log.warning("%s is damaged (%s) and made again", file, error)
        return None


def _tokenize_traces(continuations: Sequence[str], tokenizer: PreTrainedTokenizerBase, end: int) -> list[np.ndarray]:
    found = []
    for start in range(0, len(continuations), 1024):
        batch = list(continuations[start : start + 1024])
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            place = next((i for i, token in enumerate(ids) if token in (end, tokenizer.eos_token_id)), len(ids))
            found.append(np.asarray([*ids[:place], end], dtype=np.int32))
    return found


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
    texts = [
        render_prompt(problem, tokenizer, template, template_kwargs=template_kwargs, day=day) for problem in problems
    ]
    tokens = iter(
        tokenize_traces(
            [
                continuation(trace, text)
                for problem, text in zip(problems, texts, strict=True)
                for trace in problem.traces
            ],
            tokenizer,
            end,
        )
    )
    for number, (problem, text) in enumerate(zip(problems, texts, strict=True)):
        found = [next(tokens) for _ in problem.traces]
        # A chat template writes a BOS where the model has one; plain text gets it from the tokenizer.
        prompt_ids = tokenizer.encode(text, add_special_tokens=template != "chat")
        longest = max(longest, len(prompt_ids))
        if not prompt_ids or len(prompt_ids) > max_prompt_length:
            counts["long_prompts" if prompt_ids else "empty_prompts"] += 1
            continue
        traces = []
        for place, ids in enumerate(found):
            known = problem.trace_logprobs[place] if teacher and problem.trace_logprobs else None
            if known is not None and len(known) != len(ids):
                raise DataError(
                    f"problem {number}: trace_logprobs has {len(known)} values for a trace of {len(ids)} tokens, "
                    f"its end included: {problem.traces[place][:60]!r}"
                )
            if len(ids) > max_completion_length:
                if long_traces == "drop":
                    counts["dropped_traces"] += 1
                    continue
                counts["cut_traces"] += 1
                ids = ids[:max_completion_length]
            logprobs = None if known is None else np.asarray(known[: len(ids)], dtype=np.float32)
            traces.append(Trace(ids, logprobs))
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
