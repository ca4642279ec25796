"""Makes all the runs that tables and figures are drawn from, and the files in paper_figures/runs.

`python -m paper_figures.make_runs --work DIR --out paper_figures/runs` trains the presets full, hard, easy, gamma and
sensitivity, the main methods on a second base model, and evaluates final models over temperatures; hours on two cores.
It can be stopped and started again at any time: what is there is not made again.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from luffy import benchmarks, evaluate_models, experiments, presets
from luffy.evaluation.evaluate import Evaluation
from luffy.study.experiments import Job

from . import runs

log = logging.getLogger(__name__)

PRESETS = ("full", "hard", "easy", "gamma", "sensitivity")
SECOND_BASE = 1  # pre-training seed
MAIN_METHODS = ("on_policy", "mixed", "mixed_shaping", "luffy", "sft", "rl_sft_loss", "sft_rl")
EVALUATED = ("on_policy", "sft", "luffy")
TEMPERATURES = tuple(round(0.1 * i, 1) for i in range(1, 11))
LENGTHS_AT = 0.6  # temperature of figures 7 and 10
PROBLEMS, SAMPLES = 200, 8


def jobs(work: Path) -> list[Job]:
    """Every run, the sets one after the other."""
    found = [job for name in PRESETS for job in experiments.preset_jobs(presets.load_preset(name), work / name)]
    base = {**presets.load_preset("full"), "methods": MAIN_METHODS, "seeds": [0], "model": str(_second_base(work))}
    return found + experiments.preset_jobs(base, work / "base1")


def _second_base(work: Path) -> Path:
    return work.resolve() / "models" / f"tiny-{SECOND_BASE}"  # its path is part of a run's configuration


def pretrain(work: Path) -> None:
    """Pre-trains the second base model, if it is not there."""
    folder = _second_base(work)
    if not (folder / "model.safetensors").is_file():
        command = [sys.executable, "-m", "luffy.model.pretrain", "--seed", str(SECOND_BASE), "--out", str(folder)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def evaluations(work: Path) -> dict[tuple[str, int, float], Evaluation]:
    """The final models of some methods of the main runs, in distribution, by method, seed and temperature."""
    loaded = benchmarks.load(["chain"], limit=PROBLEMS)
    models, keys = {}, {}
    for job in runs.find(work).get(runs.MAIN_SET, ()):
        if job.config.method.name in EVALUATED:
            for temperature in TEMPERATURES:
                label = f"{job.run_dir.name} at {temperature}"
                models[label] = {"model": str(job.run_dir), "temperature": temperature}
                keys[label] = job.config.method.name, job.config.seed, temperature
    settings = {"samples": SAMPLES, "device": "cpu", "verifier_workers": 1}
    found = evaluate_models(models, loaded, work / "evaluations", **settings) if models else {}
    return {keys[label]: evaluation for label, evaluation in found.items()}


def temperatures(found: dict[tuple[str, int, float], Evaluation]) -> pd.DataFrame:
    """Columns method, seed, temperature, pass@1, pass@8 (percent)."""
    rows = []
    for (method, seed, temperature), evaluation in found.items():
        result = evaluation.results()["chain"]
        values = {f"pass@{k}": 100 * result.pass_at(k) for k in (1, SAMPLES)}
        rows.append({"method": method, "seed": seed, "temperature": temperature, **values})
    return pd.DataFrame(rows).sort_values(["method", "seed", "temperature"], ignore_index=True)


def answers(found: dict[tuple[str, int, float], Evaluation]) -> pd.DataFrame:
    """Columns method, seed, right, tokens, count: how many answers of that length."""
    counts: Counter[tuple[Any, ...]] = Counter()
    for (method, seed, temperature), evaluation in found.items():
        if temperature == LENGTHS_AT:
            counts.update((method, seed, row["right"], row["tokens"]) for row in evaluation.rows())
    rows = [(*key, count) for key, count in sorted(counts.items())]
    return pd.DataFrame(rows, columns=["method", "seed", "right", "tokens", "count"])


def cases(found: dict[tuple[str, int, float], Evaluation], seed: int = 0) -> pd.DataFrame:
    """The first of the hardest problems that LUFFY's first answer gets right and the others' wrong, with the answers;
    if there is none, the first of the hardest. Columns method, prompt, answer, text, tokens, right, chosen_of."""
    chosen = {method: found[method, seed, LENGTHS_AT] for method in EVALUATED}
    problems = benchmarks.load(["chain"], limit=PROBLEMS)[0].problems
    hardest = max(problem.columns["difficulty"] for problem in problems)
    places = [i for i, problem in enumerate(problems) if problem.columns["difficulty"] == hardest]
    first = {
        method: {row["problem"]: row for row in evaluation.rows() if row["sample"] == 0}
        for method, evaluation in chosen.items()
    }
    wanted = {method: method == "luffy" for method in EVALUATED}
    fitting = [i for i in places if all(first[method][i]["right"] == right for method, right in wanted.items())]
    place = (fitting or places)[0]
    rows = []
    for method in EVALUATED:
        row = first[method][place]
        text = chosen[method].completions()[row["benchmark"], row["problem"], row["key"]][0].text
        facts = {"prompt": problems[place].prompt[0]["content"], "answer": row["answer"], "text": text}
        facts |= {"tokens": row["tokens"], "right": row["right"]}
        rows.append({"method": method, **facts, "chosen_of": f"{len(fitting)} of {len(places)} problems are like it"})
    return pd.DataFrame(rows)


def collect(work: Path, out: Path, *, add: bool = False) -> None:
    """Writes the files of runs.py from what is in the work folder; add: beside the runs that they have already."""
    found = evaluations(work)
    complete = {method for method, seed, _ in found if seed == 0} == set(EVALUATED)
    made = {"temperatures": temperatures, "answers": answers, "cases": cases}
    extras = {name: make(found) for name, make in made.items()} if complete else {}
    made_now = replace(runs.from_directories(work), extras=extras)
    runs.write(runs.merge(runs.load(out), made_now) if add else made_now, out)


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/published"), help="where runs and evaluations live")
    parser.add_argument("--out", type=Path, default=runs.COMMITTED)
    parser.add_argument("--parallel", type=int, help="runs at once; one per core or GPU unless said otherwise")
    parser.add_argument("--add", action="store_true", help="keep the runs in OUT that WORK does not have")
    parser.add_argument("--collect-only", action="store_true", help="train nothing: write the files from what is there")
    known = parser.parse_args(arguments)
    if not known.collect_only:
        pretrain(known.work)
        wanted = jobs(known.work)
        last = -1
        for statuses in experiments.run(wanted, parallel=known.parallel, poll_s=10):
            done = sum(status.state == "complete" for status in statuses)
            if done != last:
                log.info("%d of %d runs are complete", done, len(wanted))
                last = done
    collect(known.work, known.out, add=known.add)


if __name__ == "__main__":
    main()
