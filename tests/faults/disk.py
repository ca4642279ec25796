"""Disks that are full or read-only while a training writes, and files that are damaged afterwards."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from helpers import assert_same_run, ended, forked
from kills import config_of, refused
from outcome import Outcome

from luffy import resume, train
from luffy.runs import RunDirectory


def _judge(run: RunDirectory, whole: RunDirectory, code: int) -> str:
    """What was lost, once there is room again."""
    try:
        assert code == 0, "the training did not end in one clear error"
        resume(run.path)
        assert_same_run(run, whole)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def too_large(folder: Path, count: int, seed: int = 0) -> Iterator[Outcome]:
    """No file may grow beyond a limit, wherever that falls: in metrics, samples, weights, or the optimiser's state."""
    rng, whole = random.Random(seed), train(config_of("luffy"), folder / "whole")
    largest = max(path.stat().st_size for path in (whole.path / "checkpoints").rglob("*") if path.is_file())
    for i in range(count):
        limit = int(10 ** rng.uniform(2.5, 6.2)) if i % 2 else rng.randrange(1, largest)
        run = RunDirectory(folder / f"limited-{i}")
        run.start(config_of("luffy"), {})

        def work(run: RunDirectory = run, limit: int = limit) -> None:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (they may be files too)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            refused(run, "cannot write")

        lost = _judge(run, whole, ended(forked(work)))
        yield Outcome("a file that may not grow", f"limit of {limit} bytes", lost)
        shutil.rmtree(run.path)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[bool]:
    """A small file system in memory; whether this user may mount one."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def full(folder: Path, count: int, seed: int = 0) -> Iterator[Outcome]:
    """A file system with less room than the run needs; more is given afterwards. Nothing where none may be mounted."""
    rng, whole = random.Random(seed), train(config_of("luffy"), folder / "whole")
    for i in range(count):
        with mounted(folder / f"disk-{i}", f"size={(size := rng.randrange(200, 9000))}k") as allowed:
            if not allowed:
                return
            run = RunDirectory(folder / f"disk-{i}" / "run")
            code = ended(forked(lambda run=run: (run.start(config_of("luffy"), {}), refused(run, "cannot write"))))
            subprocess.run(["mount", "-o", "remount,size=100m", str(folder / f"disk-{i}")], check=True)
            if not (run.path / "config.json").exists():
                run.start(config_of("luffy"), {})
            yield Outcome("a full disk", f"{size} kB", _judge(run, whole, code))


def read_only(folder: Path, count: int) -> Iterator[Outcome]:
    """A run directory that cannot be written in. Nothing where none may be mounted."""
    whole = train(config_of("luffy"), folder / "whole")
    for i in range(count):
        with mounted(folder / f"disk-{i}", "size=100m") as allowed:
            if not allowed:
                return
            run = RunDirectory(folder / f"disk-{i}" / "run")
            run.start(config_of("luffy"), {})
            subprocess.run(["mount", "-o", "remount,ro", str(folder / f"disk-{i}")], check=True)
            code = ended(forked(lambda run=run: refused(run, "cannot write")))
            subprocess.run(["mount", "-o", "remount,rw", str(folder / f"disk-{i}")], check=True)
            yield Outcome("a read-only directory", f"start {i}", _judge(run, whole, code))


def harm(path: Path, rng: random.Random) -> str:
    """Damages a file in one of four ways; which."""
    way = rng.choice(("cut", "bit", "missing", "other"))
    data = bytearray(path.read_bytes())
    if way == "cut":
        os.truncate(path, rng.randrange(len(data)) if data else 0)
    elif way == "bit" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif way == "missing":
        path.unlink()
    else:
        path.write_bytes(rng.randbytes(len(data)))
    return way


def damaged(folder: Path, count: int, seed: int = 0) -> Iterator[Outcome]:
    """A file of the newest checkpoint is cut, has a flipped bit, is missing or another: the one before it is used."""
    rng, whole = random.Random(seed), train(config_of("luffy"), folder / "whole")
    for i in range(count):
        run = RunDirectory(folder / f"damaged-{i}")
        shutil.copytree(whole.path, run.path, symlinks=True)
        (run.path / "evaluation.json").unlink()
        newest = max((run.path / "checkpoints").iterdir())
        path = rng.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        fault = f"{path.name}, {harm(path, rng)}"
        yield Outcome("a damaged checkpoint", fault, _judge(run, whole, 0))
        shutil.rmtree(run.path)


def damaged_cache(folder: Path, count: int, seed: int = 0) -> Iterator[Outcome]:
    """A file of what is kept in the cache is damaged: what is in it is made again."""
    from luffy.data import hub

    rng = random.Random(seed)
    contents = {"config.json": b"{}" * 50, "model.safetensors": bytes(range(256)) * 40}

    def make(out: Path) -> None:
        for name, content in contents.items():
            (out / name).write_bytes(content)

    with mock.patch.dict(os.environ, LUFFY_CACHE=str(folder / "cache")):
        for i in range(count):
            made = hub.made_in_cache("models", "one", make)
            path = rng.choice(sorted(made.iterdir()))
            fault = f"{path.name}, {harm(path, rng)}"
            found = hub.made_in_cache("models", "one", make)
            whole = all((found / name).read_bytes() == content for name, content in contents.items())
            yield Outcome("a damaged cache", f"{i}: {fault}", "" if whole else "it was used as it was")
