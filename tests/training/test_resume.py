"""Determinism, and resuming after real kills: the same metrics and weights to the bit."""

import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import assert_same_run, comparable, ended, forked

from luffy import RunError, Trainer, make_config, resume, runs, train
from luffy.runs import RunDirectory, damage


@pytest.fixture(scope="module")
def luffy_run(tmp_path_factory, short_run):
    return train(make_config("luffy", **short_run), tmp_path_factory.mktemp("runs") / "luffy")


def test_same_configuration_same_bits(luffy_run, tmp_path):
    assert_same_run(train(luffy_run.config(), tmp_path / "again"), luffy_run)


def test_seed_changes_the_run(luffy_run, tmp_path):
    other = train(luffy_run.config().replace(seed=1), tmp_path / "other")
    assert comparable(other.metrics())[1:] != comparable(luffy_run.metrics())[1:]


def test_killed_at_random_moments_equals_uninterrupted(tmp_path, short_run):
    """kill -9, several times, at moments that differ between runs of this test."""
    config = make_config("luffy", **{**short_run, "steps": 14})
    reference = train(config, tmp_path / "whole")
    run = RunDirectory(tmp_path / "killed")
    run.start(config, {})
    seed, killed = random.randrange(10**6), 0
    rng = random.Random(seed)
    for _ in range(3):
        pid = forked(lambda: resume(run.path))
        known, deadline = len(run.metrics()), time.monotonic() + 60
        while len(run.metrics()) <= known and time.monotonic() < deadline and not run.is_complete:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        os.kill(pid, signal.SIGKILL)
        killed += ended(pid) == -signal.SIGKILL
    resume(run.path)
    print(f"delays from seed {seed}, {killed} kills")
    assert killed >= 1
    assert_same_run(run, reference)


def test_killed_as_a_user_would(tmp_path, short_run):
    """The command line, killed in its first steps and started again."""
    config = make_config("luffy", **{**short_run, "steps": 8})
    run = RunDirectory(tmp_path / "killed")
    run.start(config, {})
    command = [sys.executable, "-m", "luffy.cli", "resume", str(run.path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(run.metrics()) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert_same_run(resume(run.path), train(config, tmp_path / "whole"))


def test_killed_during_a_checkpoint(tmp_path, luffy_run, monkeypatch):
    """A process that dies after writing half of a checkpoint leaves one that is not taken for whole."""
    run = RunDirectory(tmp_path / "half")
    run.start(luffy_run.config(), {})
    write = runs.write_json

    def dying(path, value):
        if path.name == "checkpoint.json" and value["step"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, value)

    monkeypatch.setattr(runs, "write_json", dying)
    assert ended(forked(lambda: resume(run.path))) == -signal.SIGKILL
    monkeypatch.undo()
    assert (run.path / "checkpoints" / ".writing-step-000004").is_dir()
    assert run.latest_checkpoint()[0] == 2
    assert_same_run(resume(run.path), luffy_run)


def test_damaged_checkpoints_do_not_push_out_good_ones(tmp_path, luffy_run):
    """Both checkpoints damaged: the run starts over, and what it saves then is kept and used."""
    directory = tmp_path / "run"
    shutil.copytree(luffy_run.path, directory, symlinks=True)
    (directory / "evaluation.json").unlink()
    for checkpoint in (directory / "checkpoints").iterdir():
        (checkpoint / "optimizer.pt").write_bytes(b"")
    run = RunDirectory(directory)
    one = Trainer(run.config(), run)
    assert one.start_step == 0
    run.save_checkpoint(2, one.save, keep=1)
    one.close()
    assert run.latest_checkpoint()[0] == 2
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize("harm", ["cut", "flip", "missing", "list"])
def test_damaged_checkpoint_is_passed_over(tmp_path, luffy_run, harm, caplog):
    directory = tmp_path / "run"
    shutil.copytree(luffy_run.path, directory, symlinks=True)
    (directory / "evaluation.json").unlink()
    newest = directory / "checkpoints" / "step-000004"
    file = newest / "model.safetensors"
    if harm == "cut":
        os.truncate(file, 1000)
    elif harm == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif harm == "missing":
        (newest / "optimizer.pt").unlink()
    else:
        (newest / "checkpoint.json").write_text('{"step": 4')
    assert damage(newest) is not None
    run = resume(directory)
    assert "is damaged" in caplog.text and "the one before it" in caplog.text
    assert_same_run(run, luffy_run)


def test_a_checkpoint_of_another_configuration_is_not_taken_up(tmp_path, luffy_run, short_run):
    """Its files are whole, and of the same data."""
    other = train(make_config("on_policy", **short_run), tmp_path / "other")
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(luffy_run.path, run.path, symlinks=True)
    (run.path / "evaluation.json").unlink()
    newest = run.path / "checkpoints" / "step-000004"
    shutil.rmtree(newest)
    shutil.copytree(other.path / "checkpoints" / "step-000004", newest)
    with pytest.raises(RunError, match=r"is of another configuration .*method"):
        resume(run.path)


def test_a_damaged_first_stage_is_not_trained_on(tmp_path, short_run):
    run = train(make_config("sft_rl", **short_run), tmp_path / "run")
    for name in ("evaluation.json", "checkpoints", "final", "metrics.jsonl"):
        path = run.path / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    file = run.path / "first_stage" / "final" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(RunError, match=r"final is not as it was written: model\.safetensors has changed"):
        resume(run.path)
    assert not (run.path / "checkpoints").exists()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "manifest.json", "evaluation.json"])
def test_damaged_files_of_a_run_are_one_error(tmp_path, luffy_run, name, text):
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    for file in ("config.json", "manifest.json", "evaluation.json"):
        shutil.copy(luffy_run.path / file, run.path / file)
    (run.path / name).write_bytes(text)
    read = {"config.json": run.config, "manifest.json": run.day, "evaluation.json": run.evaluation}[name]
    with pytest.raises(RunError, match=rf"{name} is damaged"):
        read()


def test_a_configuration_that_is_refused_now_is_not_called_damaged(tmp_path, luffy_run):
    values = json.loads((luffy_run.path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "adam_beta2": 1.0}))
    with pytest.raises(RunError, match="cannot be resumed: adam_beta2 must"):
        RunDirectory(tmp_path).config()


def test_leftovers_of_other_machines_go_when_they_are_old(tmp_path):
    """And nothing else that ends in .tmp."""
    old, new = ".config.json.elsewhere.7.tmp", ".config.json.else.where.8.tmp"
    names = (old, new, f".a.json.{platform.node()}.{os.getpid()}.tmp", ".x.tmp")
    for name in names:
        (tmp_path / name).write_text("")
    for name in (old, ".x.tmp"):
        os.utime(tmp_path / name, (0, 0))
    with RunDirectory(tmp_path).locked():
        assert sorted(path.name for path in tmp_path.glob(".*.tmp")) == sorted(set(names) - {old})


def test_missing_metrics_rows_are_not_papered_over(tmp_path, luffy_run):
    directory = tmp_path / "run"
    shutil.copytree(luffy_run.path, directory, symlinks=True)
    (directory / "evaluation.json").unlink()
    rows = (directory / "metrics.jsonl").read_text().splitlines()
    (directory / "metrics.jsonl").write_text("\n".join([*rows[:2], "{", *rows[3:]]) + "\n")
    with pytest.raises(RunError, match="lacks rows"):
        resume(directory)
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 5


def test_half_written_metrics_row_is_dropped(tmp_path, luffy_run):
    directory = tmp_path / "run"
    shutil.copytree(luffy_run.path, directory, symlinks=True)
    (directory / "evaluation.json").unlink()
    shutil.rmtree(directory / "checkpoints" / "step-000004")
    with open(directory / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 5, "rew')
    assert_same_run(resume(directory), luffy_run)


def test_sft_rl_killed_in_its_first_stage_resumes(tmp_path, short_run, monkeypatch):
    """Started by train(), not prepared by anybody: the directory must be resumable from its first moment."""
    config = make_config("sft_rl", **short_run)
    monkeypatch.setattr(Trainer, "train_step", lambda self, step, keeper: os.kill(os.getpid(), signal.SIGKILL))
    assert ended(forked(lambda: train(config, tmp_path / "killed"))) == -signal.SIGKILL
    monkeypatch.undo()
    assert resume(tmp_path / "killed").is_complete


def test_sft_rl_resumes_in_its_second_stage(tmp_path, short_run):
    config = make_config("sft_rl", **short_run)
    whole = train(config, tmp_path / "whole")
    directory = tmp_path / "cut"
    shutil.copytree(whole.path, directory, symlinks=True)
    (directory / "evaluation.json").unlink()
    shutil.rmtree(directory / "checkpoints" / "step-000004")
    assert_same_run(resume(directory), whole)
