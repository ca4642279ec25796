"""Benchmarks as data: the paper's nine, the embedded world's families, and anyone's own file.

A benchmark comes from the Hugging Face hub by its name, or from a file. Three kinds of files are known: the reference's
parquet files, which hold several benchmarks told apart by `data_source`; a file with `problem` and `answer`; and one
with options in the columns of ARC, GPQA, MMLU or MMLU-Pro. The reference repeats rows to get several samples
of a problem; they are folded into one problem here.
"""

from __future__ import annotations

import logging
import string
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import TINYWORLD
from ..errors import DataError
from . import tinyworld
from .problems import Problem, RowError, hopeless, problem_from_row, read_rows

log = logging.getLogger(__name__)

WINDOW = 8192  # tokens of a completion in the paper's evaluation (App. C.1)
TINY_WINDOW = 128
TINY_PROBLEMS = 500  # per family
MAX_SOURCES = 50
Source = tuple[bool, str]


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark is.

    label: as tables write it. hub, subset, split: where it lives on the hub. sources: its names in the `data_source`
    column of files. kind: "math" (an expression) or "choice" (the letter of an option). samples: completions per
    problem in the paper; the metric is their mean, avg@samples. window: tokens of a completion. ood: whether the paper
    counts it as out of distribution. size: its problems, where the paper has it. drop_system: leave out a system
    message of the data, as the reference does.
    """

    name: str
    label: str
    hub: str = ""
    subset: str | None = None
    split: str = "test"
    sources: tuple[str, ...] = ()
    kind: str = "math"
    samples: int = 1
    window: int = WINDOW
    ood: bool = False
    size: int = 0
    drop_system: bool = True

    @property
    def metric(self) -> str:
        return f"avg@{self.samples}"


_PAPER = (
    Benchmark("aime24", "AIME 24", "HuggingFaceH4/aime_2024", split="train", sources=("aime",), samples=32, size=30),
    Benchmark("aime25", "AIME 25", "math-ai/aime25", sources=("aime25",), samples=32, size=30),
    Benchmark("amc", "AMC", "AI-MO/aimo-validation-amc", split="train", sources=("amc",), samples=32, size=83),
    Benchmark("math500", "MATH-500", "HuggingFaceH4/MATH-500", sources=("math",), size=500),
    Benchmark("minerva", "Minerva", "math-ai/minervamath", sources=("minerva",), size=272),
    Benchmark(
        "olympiad",
        "OlympiadBench",
        "Hothan/OlympiadBench",
        "OE_TO_maths_en_COMP",
        "train",
        ("olympiad_bench",),
        size=675,
    ),
    Benchmark(
        "arc_c", "ARC-c", "allenai/ai2_arc", "ARC-Challenge", sources=("arc_c",), kind="choice", ood=True, size=1172
    ),
    Benchmark("gpqa", "GPQA", "Idavidrein/gpqa", "gpqa_diamond", "train", ("gpqa",), kind="choice", ood=True, size=198),
    Benchmark("mmlu_pro", "MMLU-Pro", "TIGER-Lab/MMLU-Pro", sources=("mmlu_pro",), kind="choice", ood=True, size=12032),
)
_TINY = tuple(
    Benchmark(name, name, samples=4, window=TINY_WINDOW, ood=name in tinyworld.OUT_OF_DISTRIBUTION, drop_system=False)
    for name in tinyworld.FAMILIES
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in (*_PAPER, *_TINY)}
_BY_SOURCE = {source: benchmark for benchmark in _PAPER for source in benchmark.sources}


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark with its problems. counts: its rows by what became of them."""

    benchmark: Benchmark
    problems: tuple[Problem, ...]
    counts: dict[str, int]

    @property
    def name(self) -> str:
        return self.benchmark.name


def load(names: str | Iterable[str], *, limit: int = 0, option_seed: int = 0) -> list[LoadedBenchmark]:
    """The benchmarks of each name: a name in BENCHMARKS, "tinyworld" for all its families, a file, or a hub name.
    `FILE#NAME,NAME` takes only these benchmarks of a file. They come in the order of BENCHMARKS, then the others.

    limit: problems taken of each benchmark, 0: all, of the tiny world's 500. option_seed: order of the options where
    we write them; a file whose questions contain their options keeps them. Raises DataError for a benchmark that is
    not there, holds no usable problem, or is named twice.
    """
    names = [names] if isinstance(names, str) else names
    if limit < 0:
        raise DataError(f"limit must not be negative, not {limit}")
    found = [loaded for name in names for loaded in _load(name, limit, option_seed)]
    twice = [name for name, count in Counter(loaded.name for loaded in found).items() if count > 1]
    if twice:
        raise DataError(f"two benchmarks of the name {', '.join(twice)}")
    if not found:
        raise DataError("no benchmark to evaluate on")
    order = {name: place for place, name in enumerate(BENCHMARKS)}
    found.sort(key=lambda loaded: order.get(loaded.name, len(order)))
    return [replace(loaded, problems=loaded.problems[: limit or None]) for loaded in found]


def _load(name: str, limit: int, option_seed: int) -> list[LoadedBenchmark]:
    if name == TINYWORLD:
        return [loaded for family in tinyworld.FAMILIES for loaded in _load(family, limit, option_seed)]
    if name in tinyworld.FAMILIES:
        problems = tuple(tinyworld.make_problems(name, "eval", limit or TINY_PROBLEMS))
        return [LoadedBenchmark(BENCHMARKS[name], problems, {"kept": len(problems)})]
    path, _, wanted = name.partition("#")
    known = BENCHMARKS.get(path)
    table = read_rows(known.hub, known.split, known.subset) if known else read_rows(path, "test")
    problems_of: defaultdict[Source, list[Problem]] = defaultdict(list)
    counts_of: defaultdict[Source, Counter[str]] = defaultdict(Counter)
    for index, row in enumerate(table):
        # Only the reference's files are known to mean the paper's benchmarks by their sources.
        of_reference = "reward_model" in row
        source = row.get("data_source" if of_reference else "source")
        key = (of_reference, "" if known else str(source or ""))
        try:
            problems_of[key].append(_problem(row, option_seed))
            counts_of[key]["kept"] += 1
        except RowError as error:
            counts_of[key][str(error)] += 1
            log.warning("%s: row %d rejected: %s", path, index, error)
    if len(counts_of) > MAX_SOURCES:
        raise DataError(f"{path} has {len(counts_of)} different sources: leave the column out to have one benchmark")
    loaded = []
    for key, counts in counts_of.items():
        of_reference, source = key
        benchmark = known or (_BY_SOURCE.get(source) if of_reference else None) or _own(path, source, problems_of[key])
        loaded.append(_folded(benchmark, problems_of[key], counts))
    chosen = [entry for entry in loaded if not wanted or entry.name in wanted.split(",")]
    missing = set(filter(None, wanted.split(","))) - {entry.name for entry in chosen}
    if missing or not chosen:
        here = ", ".join(entry.name for entry in loaded) or "nothing"
        raise DataError(f"{path} has no {', '.join(sorted(missing)) or 'problems'}: there is {here}")
    for entry in chosen:
        if not entry.problems:
            raise DataError(f"{path}: no usable problem of {entry.name} ({entry.counts})")
    return chosen


def _own(path: str, source: str, problems: Sequence[Problem]) -> Benchmark:
    name = source or Path(path).stem
    if name in (*BENCHMARKS, "id", "ood"):  # it must not be taken for one of those
        name = f"own-{name}"
    kind = "choice" if problems and all("options" in problem.columns for problem in problems) else "math"
    return Benchmark(name, name, kind=kind, drop_system=False)


def _folded(benchmark: Benchmark, problems: Sequence[Problem], counts: Counter[str]) -> LoadedBenchmark:
    """One problem for rows that say the same; how often most are repeated is the number of samples."""
    if benchmark.drop_system:
        problems = [
            replace(problem, prompt=tuple(m for m in problem.prompt if m["role"] != "system") or problem.prompt)
            for problem in problems
        ]
    problems = [replace(problem, kind=benchmark.kind) for problem in problems]
    if unmatchable := hopeless([problem for problem in problems if problem.kind == "math"], benchmark.name):
        counts["unmatchable"] = len(unmatchable)
    first = {(str(problem.prompt), problem.answer): problem for problem in reversed(problems)}
    repetitions = Counter((str(problem.prompt), problem.answer) for problem in problems)
    times = Counter(repetitions.values())
    if len(times) > 1:
        log.warning("%s: rows are not all repeated alike (%s): each problem is taken once", benchmark.name, dict(times))
    # Of repetitions that are equally frequent the larger one, whatever the order of the rows.
    samples = max(times, key=lambda number: (times[number], number)) if times else 1
    if samples > 1:
        benchmark = replace(benchmark, samples=samples)
    return LoadedBenchmark(benchmark, tuple(first[key] for key in repetitions), dict(counts))


def _problem(row: dict[str, Any], option_seed: int) -> Problem:
    """A row of any benchmark as a problem. Raises RowError."""
    if "reward_model" in row:
        return problem_from_row(row)
    options = _options(row)
    if options is None:
        return problem_from_row(row)
    question, texts, right = options
    seed = (option_seed, zlib.crc32(question.encode()))  # a question keeps its order wherever it stands
    return choice_problem(question, texts, right, source=str(row.get("source") or ""), seed=seed)


def _options(row: dict[str, Any]) -> tuple[str, list[str], int] | None:
    """Question, options and place of the right one, from the columns of GPQA, ARC, MMLU or MMLU-Pro; None for rows
    without options. Raises RowError if the options or the answer cannot be read."""
    if "Correct Answer" in row:  # GPQA
        names = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
        question, texts, right = row.get("Question"), [row.get(name) for name in names], 0
    else:
        listed = row.get("choices", row.get("options"))
        if listed is None:
            return None
        labels = list(string.ascii_uppercase)
        if isinstance(listed, dict):  # ARC
            labels, listed = list(listed.get("label") or ()), listed.get("text")
        if not isinstance(listed, (list, tuple)):
            raise RowError("the options are not a list")
        question, texts = row.get("question", row.get("problem")), list(listed)
        answer = next(
            (row[name] for name in ("answer_index", "answerKey", "answer") if row.get(name) is not None), None
        )
        if answer in labels:
            answer = labels.index(answer)
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts):
            raise RowError("no answer: neither the place nor the letter of an option")
        right = answer
    if not isinstance(question, str) or not question.strip():
        raise RowError("no question")
    if not 2 <= len(texts) <= len(string.ascii_uppercase):
        raise RowError(f"{len(texts)} options")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise RowError("the options are not texts")
    return question, [str(text) for text in texts], right


def choice_problem(
    question: str, options: Sequence[str], right: int, *, source: str = "", seed: Sequence[int] = (0, 0)
) -> Problem:
    """A multiple-choice question with its options in an order drawn from `seed`, as the reference's files write them.

    The answer is the letter of the right option. columns["options"] are the options as shown, columns["order"] the
    place that each shown option has in `options`: what a letter means, whatever the order.
    """
    order = [int(i) for i in np.random.default_rng(seed).permutation(len(options))]
    letters = string.ascii_uppercase[: len(options)]
    shown = [options[i].strip() for i in order]
    lines = "".join(f"{letter}) {text}\n" for letter, text in zip(letters, shown, strict=True))
    return Problem(
        prompt=({"role": "user", "content": f"{question.strip()}\n\n{lines}"},),
        answer=letters[order.index(right)],
        source=source,
        columns={"options": shown, "order": order},
        kind="choice",
    )
