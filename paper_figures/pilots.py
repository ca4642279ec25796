"""The pilots by which the default world and its hyper-parameters were fixed, before any published seed was run.

`python -m paper_figures.pilots` measures base models of several recipes (premise.csv), trains the presets
pilot_stability and tuning (stability.csv, tuning.csv), and writes the tables into paper_figures/pilots. PILOTS.md there
says what followed from them. It can be stopped and started again.
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
from luffy.study import premise
from luffy.study.experiments import Job

from . import make_runs

FOLDER = Path(__file__).parent / "pilots"
SETS = {"stability": "pilot_stability", "tuning": "tuning"}
BASES = tuple(f"tiny:own_share={share},seed=3" for share in (0, 0.1, 0.3, 0.4, 0.5))
DIFFICULTIES = (3, 4, 5, 6, 7)


def trials(jobs: Sequence[Job]) -> pd.DataFrame:
    """A row per complete run: what was changed, scores in percent, the largest fall of the five-step mean of the reward
    in the second half and between two validations (points), median and greatest norm of the gradient, entropy."""
    scores = results.per_run(jobs)
    rows = []
    for job, score in zip([job for job in jobs if job.run.is_complete], scores.to_dict("records"), strict=True):
        facts = json.loads((job.run_dir / "manifest.json").read_text())
        row = {"changed": job.variant, "method": job.config.method.name, "seed": job.config.seed}
        rows.append(
            {**row, "id": 100 * score["id"], "ood": 100 * score["ood"], **falls(job.rows()), "code": facts["luffy"]}
        )
    return pd.DataFrame(rows)


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


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/pilots"), help="where the runs live")
    parser.add_argument("--parallel", type=int, help="runs at once; one per core or GPU unless said otherwise")
    parser.add_argument("--collect-only", action="store_true", help="train nothing: write down what is there")
    known = parser.parse_args(arguments)
    FOLDER.mkdir(exist_ok=True)
    jobs = {
        name: experiments.preset_jobs(presets.load_preset(preset), known.work / preset) for name, preset in SETS.items()
    }
    if not known.collect_only:
        rows = [
            row
            for model in BASES
            for temperature in premise.TEMPERATURES
            for row in premise.measure(model, DIFFICULTIES, temperature=temperature)
        ]
        pd.DataFrame(rows).to_csv(FOLDER / "premise.csv", index=False, float_format="%.4f")
        make_runs.train([job for found in jobs.values() for job in found], known.parallel)
    for name, found in jobs.items():
        trials(found).to_csv(FOLDER / f"{name}.csv", index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
