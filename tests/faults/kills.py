"""Trainings that are killed at random instants, and resumed: the same metrics, weights and evaluation as of one that
was left alone, no process that stays behind, no half-written file after the next start.

A training is a fork of this process, whose libraries are imported; it kills itself with SIGKILL, either when so much
time has passed, or at its nth change of the file system: opening a file to write, renaming, removing, making a folder.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from helpers import assert_same_run, children, ended, forked
from outcome import Outcome

from luffy import Config, RunError, make_config, resume, train
from luffy.runs import RunDirectory

SMALL = dict(
    steps=6, rollout_batch_size=4, mini_batch_size=2, num_generations=4, max_completion_length=32, num_problems=24,
    eval_steps=3, eval_problems=2, final_eval_problems=2, final_eval_samples=1, save_steps=1, save_total_limit=2,
    sample_steps=2, verbosity=0.0, verifier_workers=1,
)  # fmt: skip
# methods with a memory, with two stages, with adapters
KINDS = {
    "luffy": {}, "relift": dict(method="relift"), "exgrpo": dict(method="exgrpo"),
    "sft_rl": dict(method="sft_rl", first_stage_steps=3), "adapters": dict(lora_r=2),
}  # fmt: skip
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "shutil.rmtree")


def config_of(kind: str, **values: object):
    settings = {**SMALL, **KINDS[kind], **values}
    return make_config(settings.pop("method", "luffy"), **settings)


def timed(config: Config, path: Path) -> tuple[RunDirectory, float]:
    """A training that is left alone, and its seconds."""
    started = time.monotonic()
    return train(config, path), time.monotonic() - started


def dies(after_s: float | None = None, at_change: int | None = None) -> None:
    """Arranges for this process to be killed."""
    if after_s is not None:
        timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
        return
    left = at_change

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event not in CHANGES or (event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR))):
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def killed(run: RunDirectory, **when: float) -> bool:
    """Resumes a run in a process that is killed; whether it was before it was done."""

    def work() -> None:
        os.setsid()  # what it starts is known by its session
        dies(**when)
        resume(run.path)

    pid = forked(work)
    died = ended(pid) == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while (left := _session(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if left:
        raise AssertionError(f"processes {left} stay behind")
    return died


def _session(leader: int) -> list[int]:
    """The processes of a session that are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def leftovers(folder: Path) -> list[str]:
    return [
        str(path.relative_to(folder))
        for path in folder.rglob(".*")
        if path.name.startswith((".writing-", ".final")) or path.suffix == ".tmp"
    ]


def kills(folder: Path, count: int, kinds: Sequence[str] = tuple(KINDS), seed: int = 0) -> Iterator[Outcome]:
    """`count` kills of these kinds of runs, in turn by time and by change of the file system."""
    rng = random.Random(seed)
    wholes, seconds, number, done = {}, {}, 0, 0
    while done < count:
        kind = kinds[number % len(kinds)]
        if kind not in wholes:
            wholes[kind], seconds[kind] = timed(config_of(kind), folder / f"{kind}-whole")
        run = RunDirectory(folder / f"{kind}-{number}")
        run.start(config_of(kind), {})
        tried = []
        try:
            while done < count and len(tried) < 6 and not run.is_complete:
                by_time = (done + number) % 2 == 0
                when = dict(after_s=rng.uniform(0.0, seconds[kind])) if by_time else dict(at_change=rng.randint(1, 40))
                if killed(run, **when):
                    tried.append(", ".join(f"{name} {value:.4g}" for name, value in when.items()))
                    done += 1
            resume(run.path)
            assert_same_run(run, wholes[kind])
            left = leftovers(run.path)
            assert not left, f"left behind: {left}"
            lost = ""
        except Exception as error:
            lost = f"{type(error).__name__}: {error}"
        for when in tried:
            yield Outcome(f"kill -9 of a training, {kind}", f"run {number}, {when}", lost)
        number += 1


def second_start(folder: Path) -> Iterator[Outcome]:
    """Further processes that start in a directory in which one is training, which goes on as if there were none."""
    config = config_of("luffy", steps=40)
    whole, _ = timed(config, folder / "once")
    run = RunDirectory(folder / "twice")
    run.start(config, {})
    training = forked(lambda: resume(run.path))
    for _ in range(3):
        before = last = run.last_row().get("step", 0)
        deadline = time.monotonic() + 60
        while last == before and not run.is_complete and time.monotonic() < deadline:  # in the midst of its work
            time.sleep(0.01)
            last = run.last_row().get("step", 0)
        code = ended(forked(lambda: refused(run, "another process is training")))
        lost = "" if code == 0 and not run.is_complete else "it was let in, or came too late"
        yield Outcome("second start in a directory in use", f"at step {last}", lost)
    try:
        assert ended(training) == 0, "it did not end"
        assert_same_run(run, whole)
        lost = ""
    except Exception as error:
        lost = f"{type(error).__name__}: {error}"
    yield Outcome("a training beside which others are started", "three", lost)


def refused(run: RunDirectory, words: str) -> None:
    """A training that is to end in one clear error with these words, unless nothing kept it from its end."""
    try:
        resume(run.path)
    except RunError as error:
        message = str(error)
        assert words in message and "\n" not in message and len(message) < 400, message
        return
    assert run.is_complete, "it did not notice"


def verifier_kills(folder: Path, count: int, seed: int = 0) -> Iterator[Outcome]:
    """A child alone is killed: the verifier's process, at a random moment of every other step of a training, which is
    to end as if nothing had happened. (A check that loses two processes is given up, so no step gets two kills.)"""
    rng = random.Random(seed)
    config = config_of("luffy", steps=4 * count)
    whole, seconds = timed(config, folder / "verifier-whole")
    run = RunDirectory(folder / "verifier-killed")
    run.start(config, {})
    pid, tried, next_step = forked(lambda: resume(run.path)), 0, 1
    while tried < count and not run.is_complete and Path(f"/proc/{pid}/cmdline").read_bytes():
        if run.last_row().get("step", 0) < next_step:
            time.sleep(0.01)
            continue
        time.sleep(rng.uniform(0.0, seconds / config.max_steps))
        for child in children(pid):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
                tried, next_step = tried + 1, run.last_row()["step"] + 2
    code = ended(pid)
    try:
        assert code == 0, f"the training ended with {code}"
        assert_same_run(run, whole)
        lost = ""
    except AssertionError as error:
        lost = str(error) or "metrics or weights differ"
    for i in range(tried):
        yield Outcome("kill -9 of the verifier's process", f"kill {i}", lost)
