"""A long training of a very small run: memory, open files, threads and processes stay what they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from kills import SMALL, children
from outcome import Outcome

from luffy import make_config
from luffy.runs import RunDirectory

GROWTH_MB = 8.0  # of memory between the second and the last quarter


def usage(pid: int) -> dict[str, float]:
    """Of a process: memory in MB, open files, threads, children."""
    status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return {
        "memory": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "children": len(children(pid)),
    }


def measured(folder: Path, steps: int, **values: object) -> list[dict[str, float]]:
    """What a training of so many steps uses, about every hundredth of it."""
    settings = {**SMALL, "steps": steps, "save_steps": max(1, steps // 20), "eval_steps": max(1, steps // 10), **values}
    config = make_config("luffy", **{**settings, "sample_steps": 0, "learning_rate": 1e-6})
    run = RunDirectory(folder / "run")
    run.start(config, {})
    command = [sys.executable, "-m", "luffy.cli", "resume", str(run.path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found, known = [], 0
    while process.poll() is None:
        step = run.last_row().get("step", 0)
        if step >= known + max(1, steps // 100):
            known = step
            try:
                found.append({"step": step, **usage(process.pid)})
            except (OSError, KeyError):  # it has ended in between
                break
        time.sleep(0.05)
    assert process.wait() == 0 and run.is_complete
    (folder / "usage.json").write_text(json.dumps(found))
    return found


def soak(folder: Path, steps: int, kind: str = "soak", **values: object) -> Iterator[Outcome]:
    found = measured(folder, steps, **values)
    quarters = [found[len(found) // 4 : len(found) // 2], found[3 * len(found) // 4 :]]
    for name, most in {"memory": GROWTH_MB, "files": 0.5, "threads": 0.5, "children": 0.5}.items():
        before, after = (float(np.median([row[name] for row in quarter])) for quarter in quarters)
        lost = "" if after - before <= most else f"{before:.1f} grew to {after:.1f}"
        yield Outcome(f"{kind}, {steps} steps", f"{name} {before:.1f} to {after:.1f}", lost)
