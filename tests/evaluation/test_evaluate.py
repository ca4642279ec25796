"""Evaluations on disk: kill and resume, re-grading, additions, bad input; real model, sampler and graders."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import date

import pytest
from helpers import ended, forked
from paths import SHARED_DATA

from luffy import benchmarks, tables
from luffy.cli import main
from luffy.errors import ConfigError, DataError, RunError, TemplateError
from luffy.evaluation import evaluate as eval_runs
from luffy.evaluation.evaluate import Evaluation, evaluate_models
from luffy.evaluation.options import EvaluationConfig
from luffy.model.loading import TINY_MODEL
from luffy.runs import RunDirectory, read_lines
from luffy.verifier import strict as grading


def settings(**values):
    """Of an evaluation of the model before its further training, which answers at once."""
    return EvaluationConfig(**{"model": "tiny", **values})


@pytest.fixture(scope="module")
def world():
    return benchmarks.load(["tinyworld"], limit=6)


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    evaluation = Evaluation(settings(), world, tmp_path_factory.mktemp("done"))
    evaluation.run()
    return evaluation


def copy_of(evaluation, world, tmp_path, **values):
    """The same evaluation in another place, with other settings."""
    shutil.copytree(evaluation.path, tmp_path / evaluation.path.name)
    return Evaluation(settings(**values), world, tmp_path)


def forbid_generation(monkeypatch):
    monkeypatch.setattr(eval_runs, "make_sampler", lambda *_: pytest.fail("nothing is to be generated"))


def test_what_is_written(done, world):
    lines = list(read_lines(done.path / "completions.jsonl"))
    assert len(lines) == 30 and all(len(line["answers"]) == 4 for line in lines)
    assert {line["prompt"] for line in lines} == {p.prompt[0]["content"] for e in world for p in e.problems}
    scores = done.scores()
    assert scores.keys() == done.completions().keys() == {task.place for task in done.tasks}
    results = done.results()
    assert list(results) == ["chain", "words", "flip", "prefix", "lines"]
    assert results["words"].samples == 4 and len(results["words"].right) == 6
    assert sum(sum(r.right) for r in results.values()) > 0
    for row in done.rows():
        assert row["right"] == row["strict"] == (row["given"] == row["answer"])  # two-digit numbers: no room to differ
    manifest = json.loads((done.path / "manifest.json").read_text())
    assert manifest["first_prompt"] == world[0].problems[0].prompt[0]["content"]
    assert manifest["benchmarks"]["chain"] == {"kept": 6, "problems": 6, "long_prompts": 0}
    assert manifest["grader"] == grading.grader_version()
    assert json.loads((done.path / "config.json").read_text())["temperature"] == 0.6


def test_a_finished_evaluation_is_left_alone(done, world, tmp_path, monkeypatch):
    forbid_generation(monkeypatch)
    again = copy_of(done, world, tmp_path)
    before = (again.path / "scores.jsonl").read_bytes()
    again.run()
    assert (again.path / "scores.jsonl").read_bytes() == before
    assert again.results() == done.results()


def test_damaged_lines_are_done_again(done, world, tmp_path, caplog):
    again = copy_of(done, world, tmp_path)
    path = again.path / "completions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:5], lines[5][:40] + b"\n", *lines[6:-1], lines[-1][:60]]))  # no line end
    again.run()
    assert "line 6 is damaged" in caplog.text
    assert again.completions() == done.completions() and again.results() == done.results()


def test_a_new_grader_grades_without_generating(done, world, tmp_path, monkeypatch):
    forbid_generation(monkeypatch)
    expected = done.results()
    monkeypatch.setattr("luffy.evaluation.options.grader_version", lambda: "another")
    again = copy_of(done, world, tmp_path)
    with pytest.raises(RunError, match="is not complete: 30 of 30 problems have no scores"):
        again.results()
    again.run()
    assert again.results() == expected and len(list(read_lines(again.path / "scores.jsonl"))) == 30


def first_letter(prompts, completions, answer, **columns):
    return [float(c.replace("\\boxed{", "")[:1] == a[:1]) for c, a in zip(completions, answer, strict=True)]


def test_other_completions_are_graded_again(done, world, tmp_path, monkeypatch):
    """Scores belong to the text they were given for, not to the place where it stands."""
    again = copy_of(done, world, tmp_path)
    lines = list(read_lines(again.path / "completions.jsonl"))
    for line in lines:
        line["answers"] = [{**answer, "text": "\\boxed{WRONG}"} for answer in line["answers"]]
    (again.path / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    forbid_generation(monkeypatch)
    again.run()
    assert {result.accuracy for result in again.results().values()} == {0.0}


def test_unchecked_answers_are_reported(done, world, tmp_path, monkeypatch):
    from luffy.evaluation.rewards import _MathBatch
    from luffy.verifier.pool import Unchecked

    forbid_generation(monkeypatch)
    monkeypatch.setattr(_MathBatch, "finish", lambda self: [Unchecked(0.0) for _ in self.verdicts])
    again = copy_of(done, world, tmp_path, verifier_timeout=4.0)  # what it depends on: another name of the grader
    again.run()
    counted = tables.summary({"tiny": again}, world).set_index("benchmark")["unchecked"]
    assert counted["chain"] == 24 and again.results()["chain"].accuracy == 0.0


def test_the_window_ends_with_the_models_positions(world, tmp_path, caplog):
    from dataclasses import replace

    long = [replace(entry, benchmark=replace(entry.benchmark, window=8192)) for entry in world[:1]]
    evaluation = Evaluation(settings(), long, tmp_path)
    longest = max(len(task.problem.prompt_ids) for task in evaluation.tasks)
    assert {task.window for task in evaluation.tasks} == {512 - longest}
    assert f"a window of {512 - longest} instead of 8192" in caplog.text


def test_ones_own_grader(done, world, tmp_path, monkeypatch):
    forbid_generation(monkeypatch)
    own = copy_of(done, world, tmp_path, reward=f"{__name__}:first_letter")
    own.run()
    assert own.results()["chain"].accuracy > done.results()["chain"].accuracy
    assert own.results("strict") == done.results("strict")
    assert len(tables.disagreements({"tiny": own})) > 0


def test_a_corrected_ground_truth_is_graded_again(done, tmp_path, monkeypatch):
    from dataclasses import replace

    forbid_generation(monkeypatch)
    shutil.copytree(done.path, tmp_path / done.path.name)
    loaded = benchmarks.load(["tinyworld"], limit=6)
    given = next(row for row in done.rows() if not row["right"] and row["benchmark"] == "chain")
    problems = list(loaded[0].problems)
    problems[given["problem"]] = replace(problems[given["problem"]], answer=given["given"])
    corrected = Evaluation(settings(), [replace(loaded[0], problems=tuple(problems)), *loaded[1:]], tmp_path)
    corrected.run()
    assert sum(corrected.results()["chain"].right) > sum(done.results()["chain"].right)
    assert corrected.results()["words"] == done.results()["words"]


def test_more_problems_and_benchmarks_join(done, tmp_path):
    """What a problem is answered does not depend on what else is asked, up to rounding in another batch."""
    small = Evaluation(settings(), benchmarks.load(["chain"], limit=3), tmp_path)
    small.run()
    first = small.completions()
    large = Evaluation(settings(), benchmarks.load(["tinyworld"], limit=6), tmp_path)
    assert large.path == small.path
    large.run()
    assert large.completions() == done.completions() and first.items() <= large.completions().items()


def test_another_way_of_sampling_is_another_directory(world, tmp_path):
    def path(**values):
        return Evaluation(settings(**values), world, tmp_path).path

    same = path()
    assert path(verifier_workers=1, device="cpu", sampler_rows=7, reward="math_verify", max_prompt_length=99) == same
    others = [
        path(**s) for s in (dict(temperature=1.0), dict(top_p=0.9), dict(samples=2), dict(seed=1), dict(template="no"))
    ]
    assert len({same, *others}) == 6


def test_kill_and_resume(tmp_path, capfd):
    """SIGKILL while completions are written; afterwards everything is there once and as if nothing had happened."""
    flags = "evaluate --model tiny --benchmarks tinyworld --limit 60 --samples 8 --sampler-rows 16 --out-dir"

    def evaluate(folder):
        main([*flags.split(), str(tmp_path / folder)])

    evaluate("whole")
    table = capfd.readouterr().out
    assert "| tiny " in table
    killed = forked(lambda: evaluate("killed"))
    deadline = time.monotonic() + 120
    written = []
    while not written and time.monotonic() < deadline:
        written = [p for p in (tmp_path / "killed").glob("*/completions.jsonl") if p.stat().st_size > 2000]
        time.sleep(0.002)
    os.kill(killed, signal.SIGKILL)
    assert ended(killed) == -signal.SIGKILL
    before = written[0].read_bytes()
    assert 0 < before.count(b"\n") < 300
    capfd.readouterr()
    evaluate("killed")
    assert capfd.readouterr().out == table
    assert written[0].read_bytes().startswith(before[: before.rfind(b"\n") + 1])  # nothing was generated twice
    expected = next((tmp_path / "whole").glob("*/completions.jsonl"))
    ours, theirs = (sorted(map(json.dumps, read_lines(path))) for path in (written[0], expected))
    assert ours == theirs and len(ours) == 300
    for name in ("table.md", "table.tex", "table.csv", "summary.csv", "pass.csv", "differences.csv"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_models_by_path_run_directory_and_label(world, tmp_path, short_run):
    from luffy import make_config, train

    run = train(make_config("luffy", **{**short_run, "final_eval_problems": 0}), tmp_path / "run")
    evaluations = evaluate_models(
        {"base": "tiny", "run": str(run.path), "bare": {"model": str(TINY_MODEL), "template": "no"}},
        world[:1], tmp_path / "out", samples=2, max_completion_length=32,
    )  # fmt: skip
    assert [e.path.name.rsplit("-", 1)[0] for e in evaluations.values()] == ["tiny", "run", "tiny"]
    assert len({evaluation.path for evaluation in evaluations.values()}) == 3
    assert evaluations["run"].source == str(run.path / "final")
    assert evaluations["run"].fingerprint != evaluations["base"].fingerprint == evaluations["bare"].fingerprint
    assert evaluations["base"].results() == evaluations["bare"].results()  # its chat template is the bare question
    (tmp_path / "half").mkdir()
    RunDirectory(tmp_path / "half").append_metrics({"step": 1})
    with pytest.raises(ConfigError, match="is not complete"):
        evaluate_models([str(tmp_path / "half")], world, tmp_path / "out")


def test_labels():
    assert eval_runs._labels(["a/b/", "tiny"]) == ["b", "tiny"]
    assert eval_runs._labels(["x/final", "y/final"]) == ["x/final", "y/final"]
    with pytest.raises(ConfigError, match="twice"):
        eval_runs._labels(["a", "a"])


def test_bad_input_is_one_error_before_anything_is_written(world, tmp_path):
    def fails(error, message, loaded=world, models=("tiny",), **settings):
        with pytest.raises(error, match=message):
            evaluate_models(list(models), loaded, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()

    fails(ConfigError, "no field 'temprature'.*did you mean temperature", temprature=1.0)
    fails(ConfigError, "top_p must be greater than 0", top_p=0.0)
    fails(ConfigError, "template must be 'chat'", template="qwem")
    fails(ConfigError, "samples must be greater than or equal to 0", samples=-1)
    fails(ConfigError, "no model './nowhere'", models=("tiny", "./nowhere"))
    fails(ConfigError, "no model to evaluate", models=())
    fails(ConfigError, "no reward function", reward="nothing:here")
    fails(ConfigError, "a window of 600 exceed the 512 positions of tiny", max_completion_length=600)
    fails(ConfigError, "device is auto, cpu", device="gpu")
    (tmp_path / "empty").mkdir()
    fails(ConfigError, "no model", models=(str(tmp_path / "empty"),))
    fails(DataError, "chain: no usable problem.*long_prompts.*max_prompt_length is 2", max_prompt_length=2)
    bare = tmp_path / "bare"
    shutil.copytree(TINY_MODEL, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    fails(TemplateError, "has no chat template: choose one by name", models=(str(bare),))


def test_damaged_weights(world, tmp_path, short_run):
    from luffy import make_config, train

    run = train(make_config("sft", **{**short_run, "final_eval_problems": 0}), tmp_path / "run")
    weights = run.path / "final" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"is damaged: model\.safetensors has changed"):
        Evaluation(settings(model=str(run.path)), world, tmp_path)
    with pytest.raises(ConfigError, match=r"final is damaged: model\.safetensors has changed"):
        Evaluation(settings(model=str(run.path / "final")), world, tmp_path)
    (run.path / "final" / "checkpoint.json").unlink()  # a model of somebody else
    folder = Evaluation(settings(model=str(run.path / "final")), world, tmp_path)
    with pytest.raises(ConfigError, match="cannot load the weights"):
        folder.run()
    import torch
    from safetensors.torch import load, save_file

    state = load(whole)
    state["model.norm.weight"] = torch.full_like(state["model.norm.weight"], float("nan"))
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="logits that are not numbers"):
        Evaluation(settings(model=str(run.path / "final")), world, tmp_path).run()


def test_long_prompts_are_counted(world, tmp_path, caplog):
    evaluation = Evaluation(settings(max_prompt_length=9, samples=1), world[:1], tmp_path)
    kept = evaluation.counts["chain"]["problems"]
    assert 0 < kept < 6 and evaluation.counts["chain"]["long_prompts"] == 6 - kept
    assert f"{6 - kept} of 6 prompts left out" in caplog.text
    indices = [task.place[1] for task in evaluation.tasks]
    assert len(indices) == kept and max(indices) > kept - 1  # places are those in the benchmark


def test_only_one_process_at_a_time(done, world, tmp_path):
    evaluation = copy_of(done, world, tmp_path)
    with RunDirectory(evaluation.path).locked(), pytest.raises(RunError, match="another process is evaluating"):
        evaluation.run()


def test_bfloat16_weights(world, tmp_path):
    evaluation = Evaluation(settings(precision="bfloat16", samples=1), world[1:2], tmp_path)
    evaluation.run()
    assert evaluation.results()["words"].boxed == 1.0


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real benchmark files are not here")
def test_fifty_real_problems_end_to_end(tmp_path):
    loaded = benchmarks.load([str(SHARED_DATA / f"valid.{name}.parquet") for name in ("all", "arc_c")], limit=8)
    assert sum(len(entry.problems) for entry in loaded) >= 50
    settings = dict(samples=2, max_prompt_length=400, max_completion_length=64)
    evaluations = evaluate_models(["tiny"], loaded, tmp_path, **settings)
    measured = tables.summary(evaluations, loaded)
    assert set(measured["benchmark"]) >= {"aime24", "aime25", "amc", "math500", "minerva", "olympiad", "arc_c", "id"}
    assert measured["accuracy"].max() < 50  # it has never seen such a problem


def test_the_next_day_asks_the_same_questions(tmp_path, monkeypatch):
    """A template that writes the date gets the day on which the evaluation was begun."""
    folder = tmp_path / "model"
    shutil.copytree(TINY_MODEL, folder)
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%d') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    loaded = benchmarks.load("chain", limit=4)

    class Day(date):
        number = 11

        @classmethod
        def today(cls):
            return cls(2026, 1, cls.number)

    monkeypatch.setattr("luffy.runs.date", Day)
    config, prompts = settings(model=str(folder), samples=1, max_completion_length=8), []
    for Day.number in (11, 12):
        evaluation = Evaluation(config, loaded, tmp_path / "out")
        evaluation.run()
        prompts.append([task.problem.prompt_text for task in evaluation.tasks])
    assert prompts[0] == prompts[1] and prompts[0][0].startswith("11")
    assert len((evaluation.path / "completions.jsonl").read_text().splitlines()) == 4
    other = Evaluation(dataclasses.replace(config, seed=1), loaded, tmp_path / "out")
    assert other.tasks[0].problem.prompt_text.startswith("12")


def test_completions_are_read_once_before_asking(tmp_path, monkeypatch):
    config = settings(samples=1, max_completion_length=8)
    evaluation = Evaluation(config, benchmarks.load("chain", limit=6), tmp_path)
    evaluation.run()
    reads = []
    inner = Evaluation.completions
    monkeypatch.setattr(Evaluation, "completions", lambda self: reads.append(1) or inner(self))
    evaluation.run()
    assert len(reads) <= 3  # for what is missing, and twice for grading


def test_several_processes_answer_as_one(tmp_path):
    """`--nproc` shares the problems; answers and tables are those of one process, also of what a process that was
    ended has left beside."""
    command = [sys.executable, "-m", "luffy.cli", "evaluate", "--model", "tiny", "--benchmarks", "tinyworld"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = {}
    for name, more in {"one": ["--limit=6"], "two": ["--limit=3"], "again": ["--limit=6", "--nproc=2"]}.items():
        folder = tmp_path / ("one" if name == "one" else "two")
        done = subprocess.run(
            [*command, *more, "--out-dir", str(folder)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        (directory,) = folder.glob("tiny-*")
        lines = [json.loads(line) for line in (directory / "completions.jsonl").read_text().splitlines()]
        found[name] = sorted(lines, key=lambda line: line["prompt"]), (folder / "table.csv").read_text()
        if name == "two":  # one answer is still in the file of a process that was ended
            (directory / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
            (directory / "completions-1.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert found["again"] == found["one"] and len(found["one"][0]) == 30
    assert not list((tmp_path / "two").glob("tiny-*/completions-*.jsonl"))
