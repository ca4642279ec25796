"""Problems: what the policy is asked, what counts as right, and what a stronger model wrote about it."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..verifier.answers import final_answer
from ..verifier.meaning import exact
from ..verifier.notation import tidy
from ..verifier.strict import unreadable
from . import hub, school

log = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".csv", ".json", ".jsonl", ".json.gz", ".jsonl.gz")
SHOWN = 3  # examples in a message

Message = dict[str, str]


@dataclass(frozen=True)
class Problem:
    """One training or evaluation problem.

    prompt: chat messages; answer: ground truth, in the notation the reward function reads;
    traces: full texts by a stronger model, possibly none; source: name of the data set or family;
    trace_logprobs: for each trace the stronger model's log-prob of each of its tokens, or none at all;
    columns: whatever else the row had, passed on to a custom reward function; kind: what the answer is, "math" (an
    expression) or "choice" (the letter of an option).
    """

    prompt: tuple[Message, ...]
    answer: str
    traces: tuple[str, ...] = ()
    source: str = ""
    columns: dict[str, Any] = field(default_factory=dict, compare=False)
    kind: str = "math"
    trace_logprobs: tuple[tuple[float, ...], ...] = ()


class RowError(ValueError):
    """A row of a data set that cannot become a Problem; the message says why."""


QUESTIONS = ("problem", "question", "prompt", "query", "messages")
ANSWERS = ("answer", "final_answer", "ground_truth", "expected_answer", "solution")


def problem_from_row(row: dict[str, Any]) -> Problem:
    """Reads a row in the reference's schema (prompt, target, reward_model), or one with a question and an answer under
    one of the names in QUESTIONS and ANSWERS. A question may be text or chat messages; if these end with the
    assistant's, that is a trace. Of several answers all count; of a worked solution its box does, or what follows the
    `####` of GSM8K.

    Raises RowError if the question, the answer or a trace is missing or of the wrong kind.
    """
    if "reward_model" in row:
        prompt = _messages(row.get("prompt"), "prompt")
        model = row["reward_model"]
        answer = model.get("ground_truth") if isinstance(model, dict) else None
        targets = row.get("target")
        traces = tuple(m["content"] for m in _messages(targets, "target")) if _given(targets) else ()
        used = {"reward_model", "prompt", "target", "data_source", "trace_logprobs"}
        source = str(row.get("data_source") or "")
    else:
        asked = next((name for name in QUESTIONS if _given(row.get(name))), "")
        prompt, own = _question(row, asked)
        stated = next((name for name in ANSWERS if _given(row.get(name))), "")
        answer = _stated(row.get(stated), stated)
        traces = (*own, *_traces(row.get("traces")))
        used = {asked, stated, "traces", "source", "trace_logprobs"}
        source = str(row.get("source") or "")
    answer = _written(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise RowError(
            "no answer"
            if "reward_model" in row or any(name in row for name in ANSWERS)
            else f"no answer ({_columns(row)})"
        )
    if "reward_model" not in row and _contradicted(row, stated, answer):
        raise RowError("two columns state different answers")
    if not all(map(_is_text, (answer, *traces, *(message["content"] for message in prompt)))):
        raise RowError("half a character (a lone surrogate), which no tokenizer takes")
    columns = {key: value for key, value in row.items() if key not in used}
    logprobs = _trace_logprobs(row.get("trace_logprobs"), len(traces))
    kept = [i for i, trace in enumerate(traces) if trace.strip()]
    return Problem(
        prompt,
        answer,
        tuple(traces[i] for i in kept),
        source,
        columns,
        trace_logprobs=tuple(logprobs[i] for i in kept) if logprobs else (),
    )


def _question(row: dict[str, Any], name: str) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The prompt of a row, and the assistant's last message if it has one."""
    asked = row.get(name)
    if isinstance(asked, str) and asked.strip():
        return ({"role": "user", "content": asked},), ()
    if not name or isinstance(asked, (str, bytes)) or not isinstance(asked, Iterable):
        raise RowError(f"no `problem` text, nor another question ({_columns(row)})")
    messages = _messages(asked, name)
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        return messages[:-1], (messages[-1]["content"],)
    return messages, ()


def _stated(answer: Any, name: str) -> Any:
    """The answer that a column states."""
    if isinstance(answer, (list, tuple)) and answer:
        plain = all(isinstance(part, (str, int, float)) and str(part).strip() for part in answer)
        return ", ".join(map(str, answer)) if plain else None
    if isinstance(answer, str) and "####" in answer:
        return answer.rpartition("####")[2].strip()
    if name == "solution" and isinstance(answer, str):
        return final_answer(answer) or answer
    return answer


def _written(answer: Any) -> Any:
    """A number as text; None for one that is not finite, or longer than Python writes."""
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        return answer
    return str(answer) if -math.inf < answer < math.inf and abs(answer) < 10**4000 else None


def _contradicted(row: dict[str, Any], name: str, answer: str) -> bool:
    """Whether another column, that is no worked solution, states another number."""
    others = [_written(_stated(row.get(other), "")) for other in ANSWERS if other not in (name, "solution")]
    return name != "solution" and any(isinstance(other, str) and _contradict(answer, other) for other in others)


def _contradict(answer: str, other: str) -> bool:
    """Whether two ground truths are numbers, and not the same. (Of other answers it takes a grader to know.)"""
    if answer == other:
        return False
    ours, theirs = exact(tidy(answer)), exact(tidy(other))
    return ours is not None and theirs is not None and ours != theirs


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _traces(listed: Any) -> tuple[str, ...]:
    if not _given(listed):
        return ()
    if not isinstance(listed, (str, Sequence)):
        raise RowError("`traces` is not a list of texts")
    traces = (listed,) if isinstance(listed, str) else tuple(trace for trace in listed if trace is not None)
    if any(not isinstance(trace, str) for trace in traces):
        raise RowError("a trace is not a text")
    return traces


def _trace_logprobs(listed: Any, traces: int) -> tuple[tuple[float, ...], ...]:
    """One list of log-probs per trace."""
    if not _given(listed):
        return ()
    try:
        logprobs = tuple(tuple(float(value) for value in values) for values in listed)
    except (TypeError, ValueError, OverflowError):
        raise RowError("`trace_logprobs` is not a list of lists of numbers") from None
    if len(logprobs) != traces:
        raise RowError("`trace_logprobs` does not have one list per trace")
    if not all(-math.inf < value <= 1e-6 for values in logprobs for value in values):
        raise RowError("`trace_logprobs` has a value that is not the logarithm of a probability")
    return logprobs


def _columns(row: dict[str, Any]) -> str:
    return f"columns: {', '.join(map(str, row))}" if row else "the row is empty or damaged"


def _given(value: Any) -> bool:
    return value is not None and (not isinstance(value, Sequence) or len(value) > 0)


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    if value is None or isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise RowError(f"`{name}` is not a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise RowError(f"`{name}` holds something that is not a message with a text content")
        messages.append({"role": str(message.get("role", "user")), "content": message["content"]})
    if not messages:
        raise RowError(f"`{name}` is empty")
    return tuple(messages)


def load_problems(path: str, split: str = "train") -> tuple[list[Problem], Counter[str]]:
    """Loads problems from a file or from a data set on the Hugging Face hub, see `read_rows`.

    Returns the problems and a count of rows by what became of them ("kept", or the reason of the rejection), and of
    ground truths that are "unmatchable". Each rejected row is logged with its index. Raises DataError if nothing is
    kept or the file is not there.
    """
    problems: list[Problem] = []
    counts: Counter[str] = Counter()
    answers: dict[tuple[str, ...], str] = {}
    for index, row in enumerate(read_rows(path, split)):
        try:
            problem = problem_from_row(row)
            asked = tuple(message["content"] for message in problem.prompt)
            whole = not any(isinstance(value, (dict, list, bytes)) for value in problem.columns.values())  # no picture
            if whole and _contradict(answers.setdefault(asked, problem.answer), problem.answer):
                raise RowError("a row before it has the same problem with another answer")
            problems.append(problem)
            counts["kept"] += 1
        except RowError as error:
            counts[str(error)] += 1
            log.warning("%s: row %d rejected: %s", path, index, error)
    if unmatchable := hopeless(problems, path):
        counts["unmatchable"] = len(unmatchable)
    log.info("%s: %s", path, ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "no rows")
    if not problems:
        raise DataError(f"{path}: no usable problem ({dict(counts)})")
    return problems, counts


def read_rows(path: str, split: str = "train", subset: str | None = None) -> Iterable[dict[str, Any]]:
    """The rows of a file, of a data set (and subset) on the Hugging Face hub, or of the generated "school".

    A file is .parquet, .csv, .json or .jsonl, the last two also with .gz. Raises DataError if it cannot be read.
    """
    if path == school.NAME:
        if split not in school.SPLITS:
            raise DataError(f"the splits of {path} are {', '.join(school.SPLITS)}, not {split!r}")
        yield from school.rows(split)
        return
    from datasets import load_dataset

    path = hub.expanded(path)
    suffix = "".join(Path(path).suffixes[-2:]).lower()
    suffix = suffix if suffix in SUFFIXES else Path(path).suffix.lower()
    if suffix in SUFFIXES:
        yield from _file_rows(path, suffix)
        return
    if Path(path).is_file():
        raise DataError(f"cannot read {path}: a data file is one of {', '.join(SUFFIXES)}")
    try:
        table = load_dataset(hub.locate(path), subset, split=split)
    except hub.NotFoundError as error:
        raise DataError(f"no data set {path}: {error}") from None
    except (OSError, ValueError, RuntimeError) as error:  # the hub's and the cache's many ways of saying no
        reason = (str(error).splitlines() or [""])[0]
        reason = reason if Path(path).exists() else hub.missing(path, reason)
        raise DataError(f"cannot load {path} ({split}) from the hub: {reason}") from error
    yield from table


def _file_rows(path: str, suffix: str) -> Iterable[dict[str, Any]]:
    from datasets import Dataset, Features, Value

    if not Path(path).is_file():
        raise DataError(f"no data file {path}")
    try:
        if suffix == ".parquet":
            table = Dataset.from_parquet(path)
        elif suffix == ".csv":  # every cell as it is written: 025 stays 025
            with open(path, encoding="utf-8-sig", newline="") as handle:
                names = next(csv.reader(handle), [])
            if len(set(names)) < len(names) or not names:
                raise ValueError("its first line is not a name for each column, all different")
            texts = Features({name: Value("string") for name in names})
            table = Dataset.from_csv(path, features=texts, keep_default_na=False, encoding="utf-8-sig")
        else:
            opened = gzip.open if suffix.endswith(".gz") else open
            with opened(path, "rt", encoding="utf-8-sig") as handle:
                text = handle.read()
            lines = suffix.startswith(".jsonl")
            table = [line for line in text.split("\n") if line.strip()] if lines else json.loads(text)
            if isinstance(table, dict):
                table = [table]
            if not isinstance(table, list):
                raise ValueError("it is not a list of rows")
    except Exception as error:  # datasets, pyarrow, csv and zlib have many for a damaged file
        said = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        raise DataError(f"cannot read {path}: {said[0]}") from error
    # JSON rows are read one by one: a malformed one is a rejected row, not the end of the file.
    for entry in table:
        try:
            row = json.loads(entry) if isinstance(entry, str) else entry
        except (ValueError, RecursionError):  # no JSON, a number too long to read, or nested without end
            row = None
        yield row if isinstance(row, dict) else {}


def hopeless(problems: Sequence[Problem], path: str) -> list[tuple[str, str]]:
    """Ground truths that no answer can match, not even themselves in a box, each with the reason; logged, the first
    ones shown. Their problems stay: a reward function of one's own may know better."""
    found = [(answer, reason) for answer in dict.fromkeys(p.answer for p in problems) if (reason := unreadable(answer))]
    if found:
        shown = "; ".join(f"{answer[:60]!r} ({reason})" for answer, reason in found[:SHOWN])
        log.warning("%s: %d ground truths that math-verify cannot match with themselves: %s", path, len(found), shown)
    return found


def fingerprint(problems: Sequence[Problem]) -> str:
    """Hash of what the problems are (prompts, answers, traces), for a run's manifest."""
    digest = hashlib.sha256()
    for problem in problems:
        known = [problem.trace_logprobs] if problem.trace_logprobs else []
        digest.update(json.dumps([problem.prompt, problem.answer, problem.traces, *known], sort_keys=True).encode())
    return digest.hexdigest()[:16]
