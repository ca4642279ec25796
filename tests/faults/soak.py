"""A long training of a very small run: memory, open files, threads and processes stay what they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from helpers import children
from jupyter_kernels import finished, followed, kernel
from kills import SMALL
from outcome import Outcome

from luffy import make_config
from luffy.runs import RunDirectory

GROWTH_MB = 8.0  # of memory between the second and the last quarter
ROW_MB = 0.03  # and of a kernel, which reads all rows of the metrics for each picture


def usage(pid: int) -> dict[str, float]:
    """Of a process: memory in MB, open files, threads, children."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return {
        "memory": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "children": len(children(pid)),
    }


@contextmanager
def training(run: RunDirectory, in_notebook: bool) -> Iterator[dict[str, int]]:
    """Trains in a process of its own, started by a notebook's kernel that follows it, or by this one. Yields the
    processes by name; at the end the training is complete."""
    if in_notebook:
        with kernel() as (pid, client):
            cell = followed(client, run)
            while run.pid() is None:
                time.sleep(0.02)
            yield {"training": run.pid(), "kernel": pid}
            finished(client, cell)
    else:
        command = [sys.executable, "-m", "luffy.cli", "resume", str(run.path)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        yield {"training": process.pid}
        assert process.wait() == 0
    assert run.is_complete


def measured(folder: Path, steps: int, in_notebook: bool, **values: object) -> dict[str, list[dict[str, float]]]:
    """What the processes of a training of so many steps use, and what it has started, about every hundredth of it."""
    settings = {**SMALL, "steps": steps, "save_steps": max(1, steps // 20), "eval_steps": max(1, steps // 10), **values}
    run = RunDirectory(folder / "run")
    run.start(make_config("luffy", **{**settings, "sample_steps": 0, "learning_rate": 1e-6}), {})
    found: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    known = 0
    with training(run, in_notebook) as processes, suppress(OSError, KeyError):  # one has ended in between
        while known < steps:
            if (step := run.last_row().get("step", 0)) >= known + max(1, steps // 100):
                known = step
                below = {f"child {i}": pid for i, pid in enumerate(children(processes["training"]))}
                for name, pid in {**processes, **below}.items():
                    found[name].append({"step": step, **usage(pid)})
            usage(processes["training"])  # (ends the loop with the training)
            time.sleep(0.05)
    (folder / "usage.json").write_text(json.dumps(found))
    return found


def soak(
    folder: Path, steps: int, kind: str = "soak", *, in_notebook: bool = False, **values: object
) -> Iterator[Outcome]:
    for process, found in measured(folder, steps, in_notebook, **values).items():
        quarters = [found[len(found) // 4 : len(found) // 2], found[3 * len(found) // 4 :]]
        memory = GROWTH_MB + (ROW_MB * steps / 2 if process == "kernel" else 0.0)
        for name, most in {"memory": memory, "files": 0.5, "threads": 0.5, "children": 0.5}.items():
            before, after = (float(np.median([row[name] for row in quarter])) for quarter in quarters)
            lost = "" if after - before <= most else f"{before:.1f} grew to {after:.1f}"
            yield Outcome(f"{kind}, {steps} steps", f"{process}: {name} {before:.1f} to {after:.1f}", lost)
