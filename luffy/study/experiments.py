"""Many runs at once: methods x seeds as child processes, resumable, and what came out of them as tables.

Each run is a child process of its own that outlives the notebook which started it. Calling `run` again picks up what
is finished, watches what is running, and resumes what was interrupted. A run's directory carries a hash of its
configuration, so other parameters are other runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import methods
from ..config import Config, fitting, make_config
from ..errors import RunError
from ..methods import PAPER_METHODS
from ..runs import RunDirectory, make_manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One run of a set: its configuration, where it lives, and which variant of a preset it belongs to."""

    config: Config
    run_dir: Path
    variant: str = ""

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.run_dir)

    @cached_property
    def stages(self) -> list[tuple[Config, Path]]:
        return self.run.stages(self.config)

    @property
    def total_steps(self) -> int:
        return sum(config.max_steps for config, _ in self.stages)

    @property
    def work(self) -> tuple[float, int]:
        """What orders jobs by how long they take: the rows of all steps, then the traces of a group, from which a
        policy learns to write more."""
        stages = [config for config, _ in self.stages]
        rows = sum(
            config.max_steps
            * config.sampling.rollout_batch_size
            * (config.method.sampled_rows(config.sampling.num_generations) + config.method.traces_wanted())
            for config in stages
        )
        return rows, max(config.method.traces_wanted() for config in stages)

    def rows(self) -> list[dict[str, Any]]:
        """The metrics of all stages in order, their steps counted on; "stage" says which."""
        rows: list[dict[str, Any]] = []
        offset = 0
        for stage, (config, path) in enumerate(self.stages):
            rows += [{**row, "step": row["step"] + offset, "stage": stage} for row in RunDirectory(path).metrics()]
            offset += config.max_steps
        return rows

    def last_row(self) -> dict[str, Any]:
        """The newest row, as in `rows`."""
        offset = 0
        last: dict[str, Any] = {}
        for config, path in self.stages:
            row = RunDirectory(path).last_row()
            last = {**row, "step": row["step"] + offset} if row else last
            offset += config.max_steps
        return last


@dataclass(frozen=True)
class Status:
    """How a job stands: "waiting", "running", "complete" or "failed", and its last metrics row."""

    job: Job
    state: str
    step: int
    last: dict[str, Any]


class RunsFailedError(RuntimeError):
    """Some runs ended without being complete; the message holds the ends of their logs."""


def make_jobs(names: Iterable[str], seeds: Iterable[int], runs_dir: str | Path, **values: Any) -> list[Job]:
    """Every method with every seed, seed by seed, each with those of the `values` that it has a field for.

    Raises ConfigError before anything starts if a value is impossible, or no method has such a field.
    """
    return [
        make_job(make_config(method, **{**fitting(values, methods.get(method)), "seed": seed}), runs_dir)
        for seed in seeds
        for method in names
    ]


def preset_jobs(preset: dict[str, Any], runs_dir: str | Path) -> list[Job]:
    """The runs of a preset (presets.py), seed by seed within each variant. Raises ConfigError as make_jobs."""
    jobs = []
    tuned = preset.get("tuned") or {}
    for variant in preset.get("variants") or [{}]:
        values = {**preset, **variant}
        chosen, seeds = values.pop("methods", None) or PAPER_METHODS, values.pop("seeds", None) or [0]
        models = values.pop("models", None) or [values.get("model", Config.model)]
        for name in ("variants", "tuned"):
            values.pop(name, None)
        shown = {**variant, "models": models[0]} if "models" in variant else variant
        label = ", ".join(f"{field}={value}" for field, value in shown.items() if field not in ("methods", "seeds"))
        own = {name: value for name, value in variant.items() if name in values}
        for seed in seeds:
            for method in chosen:
                given = {**values, "model": models[seed % len(models)], **tuned.get(method, {}), **own}
                jobs += [replace(job, variant=label) for job in make_jobs([method], [seed], runs_dir, **given)]
    return jobs


def by_variant(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """The jobs of each variant, which is what tables and plots compare the methods within."""
    return {name: [job for job in jobs if job.variant == name] for name in dict.fromkeys(job.variant for job in jobs)}


def make_job(config: Config, runs_dir: str | Path) -> Job:
    """The run of a configuration in a folder: one that is there, also if it was begun when directories had other names,
    or a new one."""
    name = f"{config.method.name}-seed{config.seed}"
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
    usual = Path(runs_dir) / f"{name}-{digest}"
    others = [] if usual.exists() else sorted(Path(runs_dir).glob(f"{name}-*/config.json"))
    return Job(config, next((path.parent for path in others if _holds(path.parent, config)), usual))


def _holds(run_dir: Path, config: Config) -> bool:
    try:
        return RunDirectory(run_dir).config() == config
    except RunError:
        return False


def parallel_slots() -> list[dict[str, str]]:
    """The environment of each run that fits on this machine at once: one per GPU, else one per core."""
    import torch

    # One thread each: two torch threads beside another busy process wait for each other longer than they work.
    threads = {"OMP_NUM_THREADS": "1"}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        return [{**threads, "CUDA_VISIBLE_DEVICES": gpu} for gpu in visible.split(",")]
    return [threads] * len(os.sched_getaffinity(0))


def run(
    jobs: Sequence[Job], *, parallel: int | None = None, nproc: int = 1, poll_s: float = 1.0
) -> Iterator[list[Status]]:
    """Has all jobs run, as many at once as fit (or `parallel`), and yields their status about once in poll_s.

    nproc: processes (GPUs) of each run of engine deepspeed; with several, the runs go one after the other.

    Of one variant and seed the longest start first, so that no core is idle while the last one is running.
    Jobs that are complete are left alone, those that another process is training are watched. If the iteration is
    abandoned, what runs goes on running and nothing new is started. Raises RunsFailedError at the end if a run failed;
    the others have been completed then.
    """
    slots: list[dict[str, str]] = parallel_slots() if nproc == 1 else [{}]
    free = [slots[i % len(slots)] for i in range(parallel or len(slots))]
    limit = len(free)
    parts = list(dict.fromkeys((job.variant, job.config.seed) for job in jobs))
    longest_first = sorted(jobs, key=lambda job: job.work, reverse=True)
    queue = sorted(longest_first, key=lambda job: parts.index((job.variant, job.config.seed)))
    children: dict[Path, tuple[subprocess.Popen[bytes], dict[str, str]]] = {}
    failed: set[Path] = set()
    while True:
        statuses = []
        for job in jobs:
            if job.run_dir in children and children[job.run_dir][0].poll() is not None:
                child, slot = children.pop(job.run_dir)
                free.append(slot)
                # Where another process turned out to be training already, it is watched instead.
                if child.returncode != 0 and not job.run.is_running and not job.run.is_complete:
                    failed.add(job.run_dir)
            statuses.append(_status(job, job.run_dir in children, failed))
        running = sum(status.state == "running" for status in statuses)
        waiting = {status.job.run_dir for status in statuses if status.state == "waiting"}
        for job in [job for job in queue if job.run_dir in waiting][: max(0, limit - running)]:
            slot = free.pop(0)
            children[job.run_dir] = _start(job, slot, nproc), slot
        yield statuses
        if all(status.state in ("complete", "failed") for status in statuses):
            break
        time.sleep(poll_s)
    if failed:
        raise RunsFailedError("\n\n".join(f"{path} failed:\n{_log_end(path)}" for path in sorted(failed)))


def _status(job: Job, is_child: bool, failed: set[Path]) -> Status:
    last = job.last_row()
    if job.run_dir in failed:
        state = "failed"
    elif is_child or job.run.is_running:
        state = "running"
    else:
        state = "complete" if job.run.is_complete else "waiting"
    return Status(job, state, last.get("step", 0), last)


def stop(jobs: Iterable[Job]) -> int:
    """Ends the runs that are training (SIGTERM) and returns how many there were; `run` resumes them."""
    pids = [pid for pid in (job.run.pid() for job in jobs) if pid is not None]
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    return len(pids)


def _start(job: Job, slot: dict[str, str], nproc: int = 1) -> subprocess.Popen[bytes]:
    if not (job.run_dir / "config.json").exists():
        job.run.start(job.config, make_manifest(job.config.seed))
    # A session of its own: an interrupt of the notebook, or its end, does not reach the run.
    with open(job.run_dir / "log.txt", "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "luffy.cli", "resume", str(job.run_dir), "--nproc", str(nproc)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot, "TQDM_DISABLE": "1"},
            start_new_session=True,
        )


def _log_end(run_dir: Path, lines: int = 15) -> str:
    try:
        return "\n".join((run_dir / "log.txt").read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return "(no log)"
