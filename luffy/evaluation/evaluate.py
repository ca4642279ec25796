"""Evaluations on disk: one directory per model and way of sampling, which can be killed, resumed and re-graded.

    config.json         every field of the evaluation
    manifest.json       code and package versions, machine, model fingerprint, graders, first prompt, counts of rows
    completions.jsonl   one line a problem: its prompt and all its completions, appended when the last one is there
    scores.jsonl        one line a problem: both graders' opinions, lengths, format

Completions are kept for ever; scores are kept as long as they are by the present grader and against the present
ground truth. A problem is known by its benchmark, its place there and a hash of its prompt, and its random numbers
derive from them. So more benchmarks or more problems can be added to a directory at any time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import string
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import display
from ..data.benchmarks import LoadedBenchmark
from ..data.templates import check_template, opens_think
from ..data.tokenization import TokenizedProblem, tokenize_problems
from ..errors import ConfigError, DataError, RunError
from ..runs import RunDirectory, append_line, make_manifest, read_lines, replace_lines, write_json
from ..sampling.protocol import Sampler, SamplingParams
from ..sampling.ranks import Ranks
from ..verifier.pool import Unchecked, solution
from ..verifier.strict import grader_version, strict_answer, strict_right
from .ask import PROMPT_INDEX_OFFSET, Answer, Question, Result, ask, columns, count
from .options import NOT_SAMPLING, EvaluationConfig, grader_name, make_sampler, model_fingerprint, resolve_model
from .rewards import make_reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Place = tuple[str, int, str]

GRADED_AT_ONCE = 64  # problems
SHOWN_CHARACTERS = 200  # of an answer, in scores.jsonl


@dataclass(frozen=True)
class Task:
    """One problem of an evaluation. place: the benchmark, where in it, and a hash of the prompt."""

    place: Place
    kind: str
    window: int
    question: Question

    @property
    def benchmark(self) -> str:
        return self.place[0]

    @property
    def problem(self) -> TokenizedProblem:
        return self.question.problem


def make_tasks(
    loaded: Sequence[LoadedBenchmark],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    positions: int,
    day: date | None = None,
) -> tuple[list[Task], dict[str, Counter[str]]]:
    """Every problem as it will be asked of a model with so many positions, and by benchmark what became of the rows.

    Raises ConfigError if prompt and completion do not fit the positions, DataError if a benchmark has no problem that
    fits, TemplateError if the tokenizer has no chat template.
    """
    check_template(tokenizer, config.template)
    tasks, counts = [], {}
    for benchmark in loaded:
        window = config.max_completion_length or benchmark.benchmark.window
        problems = [replace(problem, traces=()) for problem in benchmark.problems]
        places = {id(problem): place for place, problem in enumerate(problems)}
        try:
            kept, tokenized = tokenize_problems(
                problems,
                tokenizer,
                template=config.template,
                max_prompt_length=config.max_prompt_length,
                max_completion_length=window,
                template_kwargs=config.template_kwargs,
                day=day,
            )
        except DataError as error:
            raise DataError(f"{benchmark.name}: {error}") from None
        counts[benchmark.name] = Counter(
            {**benchmark.counts, "problems": tokenized["problems"], "long_prompts": tokenized["long_prompts"]}
        )
        room = positions - max(len(problem.prompt_ids) for problem in kept)
        if room < max(1, config.max_completion_length):
            raise ConfigError(
                f"{benchmark.name}: prompts of up to {positions - room} tokens and a window of {window} exceed the "
                f"{positions} positions of {config.model}: lower max_prompt_length or max_completion_length"
            )
        if room < window:
            log.warning("%s: a window of %d instead of %d, for the model's positions", benchmark.name, room, window)
            window = room
        if len(kept) < len(problems):
            log.warning("%s: %d of %d prompts left out", benchmark.name, len(problems) - len(kept), len(problems))
        samples = config.samples or benchmark.benchmark.samples
        for problem in kept:
            seed = hashlib.sha256(f"{benchmark.name}/{problem.prompt_text}".encode()).digest()
            index = PROMPT_INDEX_OFFSET + int.from_bytes(seed[:4]) % PROMPT_INDEX_OFFSET
            key = hashlib.sha256(problem.prompt_text.encode()).hexdigest()[:16]
            place = (benchmark.name, places[id(problem.problem)], key)
            tasks.append(Task(place, benchmark.benchmark.kind, window, Question(problem, samples, index)))
    return tasks, counts


class Evaluation:
    """One model on some benchmarks, in a directory of its own. Creating the object checks everything that can be
    checked without the model's weights, and touches nothing on disk.

    Raises ConfigError for a model that is not there, or whose positions do not hold prompt and completion; DataError
    for a benchmark of which no problem fits; TemplateError for a template that the tokenizer does not have.
    """

    def __init__(self, config: EvaluationConfig, loaded: Sequence[LoadedBenchmark], out_dir: str | Path) -> None:
        from ..model.loading import eos_ids, load_settings, load_tokenizer

        self.config = config
        self.grader = grader_name(config)
        self.source = resolve_model(config.model)
        self.tokenizer = load_tokenizer(self.source)
        positions = load_settings(self.source).max_position_embeddings
        self.ends = eos_ids(self.source, self.tokenizer, config.template)
        self.fingerprint = model_fingerprint(self.source)
        # Another way of sampling is another directory; other benchmarks or graders are not.
        facts = {name: value for name, value in config.to_dict().items() if name not in NOT_SAMPLING}
        facts["model"] = self.fingerprint
        if not config.template_kwargs:
            del facts["template_kwargs"]  # directories from before there was such a field keep their name
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
        self.path = Path(out_dir) / f"{_short_name(config.model)}-{digest}"
        self.day = RunDirectory(self.path).day()
        self.tasks, self.counts = make_tasks(loaded, self.tokenizer, config, positions, self.day)

    def run(self, ranks: Ranks | None = None) -> None:
        """Has every problem answered and graded that is not yet; the model is only loaded if there is one to answer.

        ranks: the processes that share the problems, each of which must call it; the first one grades. Raises RunError
        if others are at work in the directory, ConfigError for several processes with servers.
        """
        ranks = ranks or Ranks()
        if ranks.size > 1 and self.config.vllm_servers:
            raise ConfigError("vllm_servers are asked by one process: without --nproc")
        run = RunDirectory(self.path)
        with run.locked("evaluating") if ranks.first else nullcontext():
            self._start(run, ranks)
            self._answer(ranks)
            ranks.barrier()
            if ranks.first:
                self._join_answers()
                log.info("%s: graded, %s", self.path.name, dict(self.grade()))
        ranks.barrier()

    def _start(self, run: RunDirectory, ranks: Ranks) -> None:
        if ranks.first:
            write_json(self.path / "config.json", self.config.to_dict())
            run.add_to_manifest(
                **{**make_manifest(self.config.seed), "day": self.day.isoformat()},
                fingerprint=self.fingerprint,
                first_prompt=self.tasks[0].problem.prompt_text,
                benchmarks=self.counts,
                grader=grader_version(),
            )
            self._join_answers()  # of processes that were ended before they could
        ranks.barrier()

    def _answer(self, ranks: Ranks) -> None:
        """Has this process's part of what is missing answered."""
        from ..model.loading import pick_device

        answered = self.completions()
        missing = [task for task in self.tasks if task.place not in answered]
        log.info("%s: %d of %d problems to be answered", self.path.name, len(missing), len(self.tasks))
        ranks.barrier()  # all must have read the same before one writes
        missing = missing[ranks.rank :: ranks.size]
        if missing:
            window = max(len(task.problem.prompt_ids) + task.window for task in missing)
            config = self.config
            if ranks.size > 1 and pick_device(config.device).type == "cuda":
                config = replace(config, device=f"cuda:{ranks.local_rank}")
            sampler = make_sampler(self.source, self.tokenizer, config, window, self.ends)
            try:
                self.generate(sampler, missing, self._part(ranks.rank))
            finally:
                sampler.close()

    def _part(self, rank: int) -> Path:
        """Where a process writes its answers: the first one where they belong, another until all are done."""
        return self.path / (f"completions-{rank}.jsonl" if rank else "completions.jsonl")

    def _join_answers(self) -> None:
        for part in sorted(self.path.glob("completions-*.jsonl")):
            for line in read_lines(part):
                append_line(self.path / "completions.jsonl", line)
            part.unlink()

    def completions(self) -> dict[Place, list[Answer]]:
        """The answers to each of the problems that has all of them, in the window it is asked with."""
        tasks = {task.place: task for task in self.tasks}
        found = {}
        for line in read_lines(self.path / "completions.jsonl"):
            task = tasks.get(_place(line))
            if task and line["window"] == task.window and len(line["answers"]) == task.question.samples:
                found[task.place] = [Answer(**answer) for answer in line["answers"]]
        return found

    def scores(self) -> dict[Place, dict[str, Any]]:
        """The scores of each of the problems, by the present grader, of the present answers and ground truth."""
        completions = self.completions()
        tasks = {task.place: task for task in self.tasks if task.place in completions}
        found = {}
        for line in read_lines(self.path / "scores.jsonl"):
            task = tasks.get(_place(line))
            if task and line["of"] == self._of(task, completions[task.place]):
                found[task.place] = line
        return found

    def _of(self, task: Task, answers: Sequence[Answer]) -> str:
        """Names all that a problem's scores depend on."""
        facts = [
            self.grader,
            task.kind,
            task.problem.problem.answer,
            [dataclasses.asdict(answer) for answer in answers],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def generate(self, sampler: Sampler, tasks: Sequence[Task], file: Path) -> None:
        """Has the tasks answered; a problem is written down when its last completion is there. Shows its progress."""
        from tqdm.auto import tqdm

        config = self.config
        total = sum(task.question.samples for task in tasks)
        with tqdm(total=total, unit="answer", desc=f"asking {self.path.name}") as bar:
            for window in sorted({task.window for task in tasks}):
                asked = [task for task in tasks if task.window == window]
                answers: defaultdict[int, dict[int, Answer]] = defaultdict(dict)
                params = SamplingParams(window, config.temperature, config.top_p, config.seed)
                questions = [task.question for task in asked]
                for i, sample, answer in ask(sampler, self.tokenizer, questions, params, ends=self.ends):
                    bar.update()
                    answers[i][sample] = answer
                    task = asked[i]
                    if len(answers[i]) == task.question.samples:
                        row = answers.pop(i)
                        line = {
                            **_named(task.place),
                            "window": task.window,
                            "prompt": task.problem.prompt_text,
                            "answers": [dataclasses.asdict(row[sample]) for sample in sorted(row)],
                        }
                        append_line(file, line)

    def grade(self) -> Counter[str]:
        """Has both graders look at what they have not seen yet. Returns the verifier's counts. Shows its progress."""
        from tqdm.auto import tqdm

        completions, scores = self.completions(), self.scores()
        # Lines of problems that are to be graded again are dropped; those of others may be wanted another time.
        tasks = {task.place for task in self.tasks}
        kept = [line for line in read_lines(self.path / "scores.jsonl") if _place(line) not in tasks]
        replace_lines(self.path / "scores.jsonl", [*kept, *scores.values()])
        waiting = [task for task in self.tasks if task.place not in scores]
        reward = make_reward(self.config)
        try:
            with tqdm(total=len(waiting), unit="problem", desc=f"grading {self.path.name}") as bar:
                for batch in _batches(waiting):
                    judged = reward.batch()
                    for task in batch:
                        for answer in completions[task.place]:
                            judged.add(task.problem.problem, task.problem.prompt_text, answer.text)
                    results = iter(judged.finish())
                    for task in batch:
                        rows = completions[task.place]
                        line = self._score(task, rows, [next(results) for _ in rows])
                        append_line(self.path / "scores.jsonl", line)
                    bar.update(len(batch))
        finally:
            reward.close()
        return Counter(reward.counts)

    def _score(self, task: Task, answers: Sequence[Answer], scores: Sequence[float]) -> dict[str, Any]:
        problem = task.problem.problem
        think = self.config.think_format
        if think is None:
            think = opens_think(task.problem.prompt_text)
        given = [strict_answer(solution(answer.text, think) or "", task.kind) for answer in answers]
        line = {
            **_named(task.place),
            "of": self._of(task, answers),
            "answer": problem.answer,
            "scores": [0.0 if math.isnan(score) else score for score in scores],
            "unchecked": [isinstance(score, Unchecked) or math.isnan(score) for score in scores],
            "strict": [strict_right(problem.answer, answer, task.kind) for answer in given],
            "given": [answer[:SHOWN_CHARACTERS] for answer in given],
            **columns(answers),
        }
        if "order" in problem.columns:  # which of the data set's options each letter stood for
            meaning = dict(zip(string.ascii_uppercase, problem.columns["order"], strict=False))
            line["options"] = [meaning.get(answer) for answer in given]
        return line

    def results(self, column: str = "scores") -> dict[str, Result]:
        """The result of each benchmark by the first grader, or by the second (column "strict")."""
        lines: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for task, line in self._lines():
            lines[task.benchmark].append(line)
        return {name: count(part, column) for name, part in lines.items()}

    def _repr_html_(self) -> str:
        scored = len(self.scores())
        rows = {"model": self.config.model, "scored": f"{scored} of {len(self.tasks)} problems"}
        if scored == len(self.tasks):
            for name, result in self.results().items():
                rows[name] = f"avg@{result.samples} {100 * result.accuracy:.1f} %"
        names = ("config.json", "manifest.json", "completions.jsonl", "scores.jsonl")
        return display.folder(self.path, rows, names)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per completion: both graders' opinions and what was answered."""
        for task, line in self._lines():
            for sample in range(len(line["scores"])):
                yield {
                    **_named(task.place),
                    "sample": sample,
                    "right": line["scores"][sample] > 0.5,
                    **{
                        name: line[name][sample]
                        for name in ("strict", "given", "tokens", "truncated", "think", "unchecked")
                    },
                    "answer": line["answer"],
                }

    def _lines(self) -> list[tuple[Task, dict[str, Any]]]:
        scores = self.scores()
        missing = sum(task.place not in scores for task in self.tasks)
        if missing:
            raise RunError(f"{self.path} is not complete: {missing} of {len(self.tasks)} problems have no scores")
        return [(task, scores[task.place]) for task in self.tasks]


def _batches(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Some problems at a time, of one benchmark: a user's reward function gets the columns that all its rows have."""
    for _, group in itertools.groupby(tasks, key=lambda task: task.benchmark):
        members = list(group)
        for start in range(0, len(members), GRADED_AT_ONCE):
            yield members[start : start + GRADED_AT_ONCE]


def _short_name(model: str) -> str:
    """The last part of a model's name or path; of a checkpoint called `final`, its run's."""
    parts = [part for part in model.split("/") if part] or ["model"]
    return parts[-2] if parts[-1] == "final" and len(parts) > 1 else parts[-1]


def _named(place: Place) -> dict[str, Any]:
    return dict(zip(("benchmark", "problem", "key"), place, strict=True))


def _place(line: dict[str, Any]) -> Place:
    return line["benchmark"], line["problem"], line["key"]


def evaluate_models(
    models: str | Sequence[str] | Mapping[str, str | Mapping[str, Any]],
    loaded: Sequence[LoadedBenchmark],
    out_dir: str | Path,
    ranks: Ranks | None = None,
    **settings: Any,
) -> dict[str, Evaluation]:
    """Evaluates models one after the other; all of them are checked before the first one starts.

    models: a folder, hub name or run directory, several of them, or {label: model} or {label: {field: value}} where a
    model needs other settings than the rest, such as its template. ranks: as in Evaluation.run. settings: fields of
    EvaluationConfig. Raises as Evaluation does.
    """
    models = [models] if isinstance(models, str) else models
    if not isinstance(models, Mapping):
        models = dict(zip(_labels(models), models, strict=True))
    evaluations = {}
    for label, model in models.items():
        values = {**settings, **(model if isinstance(model, Mapping) else {"model": model})}
        evaluations[str(label)] = Evaluation(EvaluationConfig(**values), loaded, out_dir)
    if not evaluations:
        raise ConfigError("no model to evaluate")
    for evaluation in evaluations.values():
        evaluation.run(ranks)
    return evaluations


def _labels(models: Sequence[str]) -> list[str]:
    """The last part of each name or path; of more parts where models would share one."""
    for parts in range(1, 10):
        labels = ["/".join(str(model).rstrip("/").split("/")[-parts:]) for model in models]
        if len(set(labels)) == len(models):
            return labels
    raise ConfigError(f"a model is named twice: {', '.join(map(str, models))}")
