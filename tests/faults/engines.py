"""vLLM's processes, killed alone or with their trainer at random moments: the numbers of a training that was left
alone, at once or after one clear error and a resume. (vLLM batches rows as they come, so the last bits differ.)
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from helpers import children, ended, forked
from kills import killed, leftovers, timed
from network import faults
from outcome import Outcome
from vllm_runs import SMALL, START_S, comparable, serving, workers

from luffy import make_config, resume
from luffy.errors import SamplerError
from luffy.runs import RunDirectory
from luffy.sampling.tensor_parallel import free_port


def vllm_kills(folder: Path, count: int, seed: int = 0) -> Iterator[Outcome]:
    """vLLM's process alone and the trainer alone, in turn."""
    config = make_config("luffy", **SMALL)
    whole, seconds = timed(config, folder / "whole")
    for i, moment in enumerate(_moments(count, seconds, seed)):
        run = RunDirectory(folder / f"run-{i}")
        run.start(config, {})
        alone = i % 2 == 0

        def fault(run: RunDirectory = run, moment: float = moment, alone: bool = alone) -> None:
            if not alone:
                killed(run, after_s=moment)
                return
            pid = forked(lambda: _ends_clearly(run))
            _kill_workers(lambda: workers(pid), moment)
            assert ended(pid) == 0, "it did not end in one clear error"

        name = "vLLM's process" if alone else "a training with vLLM"
        yield Outcome(f"kill -9 of {name}", f"after {moment:.1f} s", _lost(fault, run, whole))


def server_kills(folder: Path, count: int, seed: int = 0) -> Iterator[Outcome]:
    """A trainer whose completions come from two servers, which go on; then a server, which is started again."""
    with serving(folder, free_port(), free_port()) as addresses:
        config = make_config("luffy", **SMALL, vllm_servers=addresses)
        whole, seconds = timed(config, folder / "whole")
        for i, moment in enumerate(_moments(count, seconds, seed)):
            run = RunDirectory(folder / f"run-{i}")
            run.start(config, {})
            lost = _lost(lambda run=run, moment=moment: killed(run, after_s=moment), run, whole)
            yield Outcome("kill -9 of a training with servers", f"after {moment:.1f} s", lost)
    [moment], port = _moments(1, seconds, seed), free_port()
    run = RunDirectory(folder / "served")
    with serving(folder, port) as [address]:
        run.start(make_config("luffy", **SMALL, vllm_servers=[address]), {})
        pid = forked(lambda: _ends_clearly(run))
        time.sleep(moment)
    code = ended(pid)
    with serving(folder, port):
        lost = "" if code == 0 else "it did not end in one clear error"
        lost = lost or _lost(lambda: None, run, whole)
    yield Outcome("kill -9 of a server", f"after {moment:.1f} s", lost)


def slice_kills(folder: Path, count: int, seed: int = 0) -> Iterator[Outcome]:
    """One of two processes of vLLM that hold half of a model each; ranks of DeepSpeed with sharded weights."""
    values = {**SMALL, "vllm_tensor_parallel_size": 2, "engine": "deepspeed", "zero_stage": 3}
    whole, seconds = timed(make_config("luffy", **SMALL), folder / "whole")
    for i, moment in enumerate(_moments(count, seconds, seed)):
        run = RunDirectory(folder / f"run-{i}")
        run.start(make_config("luffy", **values), {})
        command = [sys.executable, "-m", "luffy.cli", "resume", str(run.path), "--nproc", "2"]

        def fault(command: list[str] = command, moment: float = moment) -> None:
            training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _kill_workers(lambda: [w for rank in children(training.pid) for w in workers(rank)][:1], moment)
            training.wait()
            subprocess.run(command, check=True, capture_output=True)

        lost = _lost(fault, run, whole)
        yield Outcome("kill -9 of a slice of vLLM", f"after {moment:.1f} s", lost)


def network(folder: Path) -> Iterator[Outcome]:
    """A network between a trainer and its server."""
    with serving(folder, free_port()) as [address]:
        yield from faults(address)


def _moments(count: int, seconds: float, seed: int) -> list[float]:
    """In the first four fifths of a training's seconds, so that it has not ended."""
    rng = random.Random(seed)
    return [rng.uniform(0.0, 0.8 * seconds) for _ in range(count)]


def _ends_clearly(run: RunDirectory) -> None:
    try:
        resume(run.path)
    except SamplerError as error:
        assert len(str(error)) < 5000, error


def _lost(fault: Callable[[], object], run: RunDirectory, whole: RunDirectory) -> str:
    """What is lost by a fault, once the run is resumed."""
    try:
        fault()
        if not run.is_complete:
            resume(run.path)
        assert comparable(run) == comparable(whole), "other numbers"
        assert not leftovers(run.path), f"left behind: {leftovers(run.path)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _kill_workers(find: Callable[[], list[int]], moment: float) -> None:
    """Kills the processes of vLLM that `find` finds, so many seconds after they have started."""
    deadline = time.monotonic() + START_S
    while not find():
        assert time.monotonic() < deadline, "vLLM does not start"
        time.sleep(0.1)
    time.sleep(moment)
    found = find()
    assert found, "vLLM has ended before it was killed"
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
