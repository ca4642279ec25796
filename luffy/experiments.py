"""Many runs at once: methods x seeds as child processes, resumable, and what came out of them as tables.

Each run is a child process of its own that outlives the notebook which started it. Calling `run` again picks up what
is finished, watches what is running, and goes on with what was interrupted. A run's directory carries a hash of its
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from . import stats
from .config import Config, read_file
from .methods import METHODS, get, make_config, stages
from .runs import RunDirectory, make_manifest

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Job:
    """One run to be had: its configuration, where it lives, and which variant of a preset it belongs to."""

    config: Config
    run_dir: Path
    variant: str = ""

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.run_dir)

    @property
    def total_steps(self) -> int:
        return sum(config.steps for config, _ in stages(self.config, self.run_dir))

    def rows(self) -> list[dict[str, Any]]:
        """The metrics of all stages in order, their steps counted on; "stage" says which."""
        rows: list[dict[str, Any]] = []
        offset = 0
        for stage, (config, path) in enumerate(stages(self.config, self.run_dir)):
            rows += [{**row, "step": row["step"] + offset, "stage": stage} for row in RunDirectory(path).metrics()]
            offset += config.steps
        return rows

    def last_row(self) -> dict[str, Any]:
        """The newest row, as in `rows`."""
        offset = 0
        last: dict[str, Any] = {}
        for config, path in stages(self.config, self.run_dir):
            row = RunDirectory(path).last_row()
            last = {**row, "step": row["step"] + offset} if row else last
            offset += config.steps
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


def load_preset(path: str | Path) -> dict[str, Any]:
    """The values of a preset: "smoke", "default", "full", another of luffy/presets, or a YAML file of one's own.

    A preset has the lists `methods` (default: all nine) and `seeds`, and may have `variants`: a list of mappings, each
    of which is run in turn with its values over the others. `base` names a preset whose values these go over.
    Everything else is fields of the configuration.
    """
    named = PRESETS / f"ablation_{path}.yaml"
    values = read_file(named if named.is_file() else path)
    base = values.pop("base", None)
    return {**(load_preset(base) if base else {}), **values}


def default_runs_dir(name: str) -> Path:
    """runs/`name` in the project's root: the current folder or, for a notebook in notebooks/, the one above."""
    here = Path.cwd()
    return (here.parent if here.name == "notebooks" else here) / "runs" / name


def as_value(parameter: Any) -> Any:
    """A notebook parameter that may have come as text, because `papermill -p` hands over lists so: "[0, 1, 2]"."""
    return yaml.safe_load(parameter) if isinstance(parameter, str) else parameter


def make_jobs(methods: Iterable[str], seeds: Iterable[int], runs_dir: str | Path, **values: Any) -> list[Job]:
    """Every method with every seed, seed by seed, with `values` where the method itself does not fix the field.

    Raises ConfigError before anything starts if a value is impossible.
    """
    return [
        make_job(make_config(method, **{**values, "seed": seed, **get(method).fixed}), runs_dir)
        for seed in seeds
        for method in methods
    ]


def preset_jobs(preset: dict[str, Any], runs_dir: str | Path) -> list[Job]:
    """The runs of a preset (see `load_preset`), seed by seed within each variant. Raises ConfigError as make_jobs."""
    values = {name: value for name, value in preset.items() if name not in ("methods", "seeds", "variants")}
    methods, seeds = preset.get("methods") or [*METHODS], preset.get("seeds") or [0]
    jobs = []
    for variant in preset.get("variants") or [{}]:
        name = ", ".join(f"{field}={value}" for field, value in variant.items())
        jobs += [replace(job, variant=name) for job in make_jobs(methods, seeds, runs_dir, **{**values, **variant})]
    return jobs


def by_variant(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """The jobs of each variant, which is what tables and plots compare the methods within."""
    return {name: [job for job in jobs if job.variant == name] for name in dict.fromkeys(job.variant for job in jobs)}


def make_job(config: Config, runs_dir: str | Path) -> Job:
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
    return Job(config, Path(runs_dir) / f"{config.method}-seed{config.seed}-{digest}")


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

    Jobs that are complete are left alone, those that another process is training are watched. If the iteration is
    abandoned, what runs goes on running and nothing new is started. Raises RunsFailedError at the end if a run failed;
    the others have been completed then.
    """
    slots: list[dict[str, str]] = parallel_slots() if nproc == 1 else [{}]
    free = [slots[i % len(slots)] for i in range(parallel or len(slots))]
    limit = len(free)
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
        for status in [s for s in statuses if s.state == "waiting"][: max(0, limit - running)]:
            slot = free.pop(0)
            children[status.job.run_dir] = _start(status.job, slot, nproc), slot
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
    """Ends the runs that are going on (SIGTERM) and returns how many there were; they can be gone on with by `run`."""
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
            [sys.executable, "-m", "luffy", "resume", str(job.run_dir), "--nproc", str(nproc)],
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


# --- results ---------------------------------------------------------------------------------------------------------


def curves(jobs: Sequence[Job]) -> pd.DataFrame:
    """The metrics of all runs, one row per run and step, with columns method, variant, seed, stage, step and the
    metrics."""
    import pandas as pd

    rows = [
        {"method": job.config.method, "variant": job.variant, "seed": job.config.seed, **row}
        for job in jobs
        for row in job.rows()
    ]
    return pd.DataFrame(rows)


def results(jobs: Sequence[Job]) -> pd.DataFrame:
    """One row per complete run: accuracy in and out of distribution and by family, pass@k, behaviour and cost.

    entropy and length are means over the last fifth of the last stage's steps; tokens and seconds are sums over all
    stages. seconds is time in training steps, without evaluation and start.
    """
    import pandas as pd

    rows = []
    for job in jobs:
        if not job.run.is_complete:
            continue
        evaluation = job.run.evaluation()
        steps = [row for row in job.rows() if "time/step" in row]
        tail = [row for row in steps if row["stage"] == steps[-1]["stage"]]
        tail = tail[-max(1, len(tail) // 5) :]
        # totals count within a stage: the last row of each stage holds that stage's sum
        ends = [
            row
            for row, after in zip(steps, [*steps[1:], {"stage": None}], strict=True)
            if row["stage"] != after["stage"]
        ]
        in_distribution = [f for f in evaluation["families"] if f not in job.config.ood_sources]
        samples = job.config.final_eval_samples
        row: dict[str, Any] = {"method": job.config.method, "variant": job.variant, "seed": job.config.seed}
        row |= evaluation["averages"]
        if in_distribution:
            passes = [evaluation["families"][family]["pass_at"][str(samples)] for family in in_distribution]
            row[f"pass@{samples}"] = sum(passes) / len(passes)
        row |= {family: result["accuracy"] for family, result in evaluation["families"].items()}
        for name, key in {"entropy": "entropy/on", "length": "length/on"}.items():
            sampled = [r[key] for r in tail if r["groups/off_policy_share"] < 1]
            row[name] = sum(sampled) / len(sampled) if sampled else float("nan")
        row |= {
            "prompts": sum(end["total/prompts"] for end in ends),
            "generated_tokens": sum(end["total/generated_tokens"] for end in ends),
            "trained_tokens": sum(end["total/trained_tokens"] for end in ends),
            "seconds": sum(r["time/step"] for r in steps),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of its confidence interval by Student's t; the half-width of one value is NaN."""
    import numpy as np
    from scipy import stats

    data = np.asarray([value for value in values if not np.isnan(value)], dtype=float)
    if len(data) == 0:
        return float("nan"), float("nan")
    if len(data) == 1:
        return float(data[0]), float("nan")
    half = stats.t.ppf((1 + level) / 2, len(data) - 1) * data.std(ddof=1) / np.sqrt(len(data))
    return float(data.mean()), float(half)


def problem_interval(job: Job, families: Sequence[str]) -> stats.Interval:
    """Bootstrap interval, over evaluation problems, of the mean accuracy over families of one run's final evaluation.

    It says how far the evaluation of this one model can be trusted, not how another seed would turn out.
    """
    results = [job.run.evaluation()["families"][family] for family in families]
    return stats.bootstrap([[right / result["samples"] for right in result["right"]] for result in results])


PERCENT = ("id", "ood")
WHOLE = ("length", "prompts", "generated_tokens", "trained_tokens", "seconds")


def summary(jobs: Sequence[Job]) -> pd.DataFrame:
    """The ablation table: a row per method, mean +- half-width of the 95% interval over seeds, as text.

    Accuracies and pass@k are in percent. With a single seed there is no interval over seeds; `id` and `ood` then show
    the bootstrap interval over evaluation problems in brackets, which is a statement about one model only.
    """
    import pandas as pd

    table = results(jobs)
    if table.empty:
        return table
    shown = [c for c in ("id", "ood", *(c for c in table if c.startswith("pass@")), "entropy", *WHOLE) if c in table]
    by_key = {(job.config.method, job.config.seed): job for job in jobs}
    rows = []
    for method in [m for m in METHODS if m in set(table["method"])]:
        part = table[table["method"] == method]
        row: dict[str, Any] = {"method": METHODS[method].label, "seeds": len(part)}
        for column in shown:
            scale = 100 if column in PERCENT or column.startswith("pass@") else 1
            mean, half = (value * scale for value in interval(part[column].tolist()))
            digits = 0 if column in WHOLE else 1 if scale == 100 else 3
            if mean != mean:
                text = "–"
            elif half == half:
                text = f"{mean:,.{digits}f} ± {half:,.{digits}f}"
            else:
                text = f"{mean:,.{digits}f}"
                if column in PERCENT:
                    job = by_key[method, int(part["seed"].iloc[0])]
                    ood = set(job.config.ood_sources)
                    families = [f for f in job.run.evaluation()["families"] if (f in ood) == (column == "ood")]
                    bounds = problem_interval(job, families)
                    text += f" [{100 * bounds.low:.1f}, {100 * bounds.high:.1f}]"
            row[column] = text
        rows.append(row)
    return pd.DataFrame(rows).set_index("method")


def differences(jobs: Sequence[Job], method: str = "luffy", columns: Sequence[str] = PERCENT) -> pd.DataFrame:
    """How much better `method` is than each other method, in points of accuracy, seeds paired.

    Columns per measure: the mean difference, and low and high ends of its 95% interval over seeds (NaN with one seed).
    """
    import pandas as pd

    table = results(jobs)
    rows = []
    for other in [m for m in METHODS if m != method and m in set(table.get("method", ()))]:
        pair = [table[table["method"] == m].set_index("seed") for m in (method, other)]
        row: dict[str, Any] = {"against": METHODS[other].label}
        for column in [c for c in columns if c in table]:
            difference = (pair[0][column] - pair[1][column]).dropna() * 100
            mean, half = interval(difference.tolist())
            row |= {column: mean, f"{column} low": mean - half, f"{column} high": mean + half}
        rows.append(row)
    return pd.DataFrame(rows).set_index("against") if rows else pd.DataFrame()
