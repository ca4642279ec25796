"""The pilots by which the default world and its hyper-parameters were fixed, and those of the arena.

`python -m paper_figures.pilots` measures base models of several recipes (premise.csv), also behind beginnings of traces
(prefixes.csv), trains the presets pilot_stability, tuning and arena_tuning (stability.csv, tuning.csv,
arena_tuning.csv), and writes the tables into paper_figures/pilots; or those of `--tables`. PILOTS.md there says what
followed from them. It can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from luffy import experiments, presets, results
from luffy.config import WorldOptions
from luffy.study import premise
from luffy.study.experiments import Job

from . import make_runs

FOLDER = Path(__file__).parent / "pilots"
MEASURED = ("premise", "prefixes")
SETS = {"stability": "pilot_stability", "tuning": "tuning", "arena_tuning": "arena_tuning"}
BASES = tuple(f"tiny:own_share={share},seed=3" for share in (0, 0.1, 0.3, 0.4, 0.5))
DIFFICULTIES = (3, 4, 5, 6, 7)
IN_ARENA = tuple(f"tiny:own_share={share},seed=3" for share in (0, 0.4, 0.8))


def trials(jobs: Sequence[Job]) -> pd.DataFrame:
    """A row per complete run: what was changed, scores in percent, the largest fall of the five-step mean of the reward
    in the second half and between two validations (points), median and greatest norm of the gradient, entropy."""
    scores = results.per_run(jobs)
    rows = []
    for job, score in zip([job for job in jobs if job.run.is_complete], scores.to_dict("records"), strict=True):
        facts = json.loads((job.run_dir / "manifest.json").read_text())
        row = {"changed": job.variant, "method": job.config.method.name, "seed": job.config.seed}
        rows.append(
            {
                **row,
                "id": 100 * score["id"],
                "ood": 100 * score["ood"],
                **falls(job.rows()),
                "code": facts["luffy"],
                "gpu": facts["machine"]["gpu"],
            }
        )
    return pd.DataFrame(rows)


def added(path: Path, new: pd.DataFrame) -> pd.DataFrame:
    """The trials that a file holds, and new ones, which take the place of those that they repeat: the run directories
    of the others may be on another machine."""
    if not path.is_file() or new.empty:
        return pd.read_csv(path) if path.is_file() else new
    return pd.concat([pd.read_csv(path), new]).drop_duplicates(["changed", "method", "seed"], keep="last")


def falls(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How unsteady a run was, from its metrics; of its last stage."""
    last = [row for row in rows if row["stage"] == rows[-1]["stage"] and "time/step" in row]
    rewards = np.convolve([row["reward/on"] for row in last], np.ones(5) / 5, mode="valid")[len(last) // 2 :]
    validations = [row["eval/id"] for row in last if "eval/id" in row]
    norms = [row["grad_norm"] for row in last]
    return {
        "fall of reward": 100 * float(np.max(np.maximum.accumulate(rewards) - rewards)),
        "fall of validation": 100 * float(np.max(-np.diff(validations), initial=0)),
        "grad_norm median": float(np.median(norms)),
        "grad_norm max": max(norms),
        "entropy": float(np.mean([row["entropy/on"] for row in last[-10:]])),
    }


def measured(name: str) -> list[dict[str, Any]]:
    """The rows of one of the MEASURED tables."""
    if name == "premise":
        return [
            row
            for model in BASES
            for temperature in premise.TEMPERATURES
            for row in premise.measure(model, DIFFICULTIES, temperature=temperature)
        ]
    asked: dict[str, Any] = dict(problems=50, samples=8, temperature=premise.TEMPERATURES[0], think_format=True)
    asked["verbosity"] = WorldOptions.verbosity
    return [row for model in IN_ARENA for row in premise.by_prefix(model, DIFFICULTIES, **asked)]


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = (*MEASURED, *SETS)
    parser.add_argument("--tables", nargs="+", choices=every, default=every)
    parser.add_argument("--work", type=Path, default=Path("runs/pilots"), help="where the runs live")
    parser.add_argument("--parallel", type=int, help="runs at once; one per core or GPU unless said otherwise")
    parser.add_argument("--collect-only", action="store_true", help="train nothing: write down what is there")
    known = parser.parse_args(arguments)
    FOLDER.mkdir(exist_ok=True)
    if not known.collect_only:
        for name in (name for name in MEASURED if name in known.tables):
            pd.DataFrame(measured(name)).to_csv(FOLDER / f"{name}.csv", index=False, float_format="%.4f")
    jobs = {
        name: experiments.preset_jobs(presets.load_preset(preset), known.work / preset)
        for name, preset in SETS.items()
        if name in known.tables
    }
    if not known.collect_only:
        make_runs.train([job for found in jobs.values() for job in found], known.parallel)
    for name, found in jobs.items():
        if len(table := added(FOLDER / f"{name}.csv", trials(found))):
            table.to_csv(FOLDER / f"{name}.csv", index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
