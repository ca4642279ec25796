"""Makes all the runs that tables and figures are drawn from, and the files in paper_figures/runs.

`python -m paper_figures.make_runs` trains the sets below, seed by seed, measures the base models, evaluates
final models over temperatures, and adds all of it to the files; many hours on two cores. It can be stopped and started
again at any time, on another machine too: what the files hold already is not made again. `--collect-only` writes down
what is there so far. `--check 6` repeats six of the committed runs and compares.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from luffy import benchmarks, evaluate_models, experiments, presets, results
from luffy.evaluation.evaluate import Evaluation
from luffy.study import premise
from luffy.study.experiments import Job
from luffy.study.inference import within

from . import runs

log = logging.getLogger(__name__)

STAGES = (  # sets that are made side by side, one stage after the other
    ("full", "hard", "easy", "gamma", "plus", "map"),
    ("sensitivity",),  # has one seed only
    ("arena",),
    ("arena_corner", "arena_strong"),
)
SETS = tuple(name for stage in STAGES for name in stage)
PRESETS = {runs.MAIN_SET: ("full", "more_seeds")}  # of a set; of any other, the one of its name
EVALUATED = ("on_policy", "sft", "luffy")
TEMPERATURES = tuple(round(0.1 * i, 1) for i in range(1, 11))
LENGTHS_AT = 0.6  # temperature of figures 7 and 10
PROBLEMS, SAMPLES = 200, 8


def jobs(work: Path, sets: Sequence[str] = SETS) -> list[Job]:
    """Every run, seed by seed through the sets of a stage, so that what there is at any time is of all of them."""
    stages = {name: number for number, stage in enumerate(STAGES) for name in stage}
    found = [
        (name, job)
        for name in sets
        for preset in PRESETS.get(name, (name,))
        for job in experiments.preset_jobs(presets.load_preset(preset), work / name)
    ]
    return [job for name, job in sorted(found, key=lambda pair: (stages[pair[0]], pair[1].config.seed))]


def missing(wanted: Sequence[Job], known: runs.Runs | None) -> list[Job]:
    """The runs that the files do not hold. A run is told by its set, method, seed and settings (runs.SETTINGS): when
    another value of a preset changes, the files are to be deleted and made again."""
    made = {runs.key(row) for row in known.runs.to_dict("records")} if known else set()
    return [job for job in wanted if runs.key_of(job) not in made]


def bases(made: Sequence[Job], known: runs.Runs | None) -> pd.DataFrame:
    """What every base model of some runs can do before training, at both temperatures; those that are known as they
    are."""
    table = known.extras.get("bases", pd.DataFrame()) if known else pd.DataFrame()
    for job in made:
        model = job.config.model
        if len(table) and model in set(table["model"]):
            continue
        log.info("measuring %s", model)
        for temperature in premise.TEMPERATURES:
            values: dict[str, Any] = {"think_format": job.config.reward.think_format}
            rows = premise.measure(model, (3, 4, 5, 6, 7), temperature=temperature, **values)
            table = pd.concat([table, pd.DataFrame(rows)], ignore_index=True)
    return table


def evaluations(made: Sequence[Job], work: Path) -> dict[tuple[str, int, float], Evaluation]:
    """Final models of the main runs, and their base models, in distribution, by method, seed (of a base model its own)
    and temperature; of a method that has more seeds than all nine have, the first. What has been evaluated in the work
    folder is only read."""
    loaded = benchmarks.load(["chain"], limit=PROBLEMS)
    models: dict[str, Any] = {}
    keys: dict[str, tuple[str, int, float]] = {}
    window, asked = 0, set()
    seeds = presets.load_preset("full")["seeds"]
    for job in made:
        seed, window = job.config.seed, job.config.data.max_completion_length
        if runs.set_of(job) != runs.MAIN_SET or seed not in seeds:
            continue
        sources = [(job.config.method.name, seed, str(job.run_dir))] if job.config.method.name in EVALUATED else []
        if job.config.model not in asked:
            sources.append((runs.BASE_MODEL, runs.base_seed(job.config.model, seed), job.config.model))
            asked.add(job.config.model)
        for name, number, source in sources:
            for temperature in TEMPERATURES:
                label = f"{name}-seed{number} at {temperature}"
                models[label] = {"model": source, "temperature": temperature}
                keys[label] = name, number, temperature
    settings = {"samples": SAMPLES, "device": "cpu", "verifier_workers": 1, "boxed_format": True}
    settings["max_completion_length"] = window
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
    if there is none, the first of the hardest. Columns method, prompt, answer, text, tokens, right, chosen_of, which
    also counts the problems that LUFFY alone gets wrong."""
    chosen = {method: found[method, seed, LENGTHS_AT] for method in EVALUATED}
    problems = benchmarks.load(["chain"], limit=PROBLEMS)[0].problems
    hardest = max(problem.columns["difficulty"] for problem in problems)
    places = [i for i, problem in enumerate(problems) if problem.columns["difficulty"] == hardest]
    first = {
        method: {row["problem"]: row for row in evaluation.rows() if row["sample"] == 0}
        for method, evaluation in chosen.items()
    }

    def alone(right: bool) -> list[int]:
        """The problems at which LUFFY is right, or wrong, and all the others are not."""
        wanted = {method: (method == "luffy") == right for method in EVALUATED}
        return [i for i in places if all(first[method][i]["right"] == value for method, value in wanted.items())]

    place = (alone(True) or places)[0]
    counted = (
        f"Of {len(places)} problems of this difficulty LUFFY alone is right at {len(alone(True))}, "
        f"alone wrong at {len(alone(False))}"
    )
    rows = []
    for method in EVALUATED:
        row = first[method][place]
        text = chosen[method].completions()[row["benchmark"], row["problem"], row["key"]][0].text
        facts = {"prompt": problems[place].prompt[0]["content"], "answer": row["answer"], "text": text}
        facts |= {"tokens": row["tokens"], "right": row["right"]}
        rows.append({"method": method, **facts, "chosen_of": counted})
    return pd.DataFrame(rows)


def collect(wanted: Sequence[Job], work: Path, out: Path) -> runs.Runs | None:
    """Adds to the files what is complete of some runs, and writes them; returns what they hold, None if nothing."""
    known = runs.load(out) if (out / "runs.csv").is_file() else None
    made = [job for job in wanted if job.run.is_complete]
    if not made:
        return known
    sets: dict[str, list[Job]] = {}
    for job in made:
        sets.setdefault(runs.set_of(job), []).append(job)
    new = runs.from_jobs(sets, str(work))
    merged = runs.merge(known, new) if known else new
    runs.write(merged, out)  # what takes long comes after
    extras = {"bases": bases(made, known)}
    found = evaluations(made, work)
    if found:
        extras |= {"temperatures": temperatures(found), "answers": answers(found)}
    if all((method, 0, LENGTHS_AT) in found for method in EVALUATED):
        extras["cases"] = cases(found)
    merged = runs.merge(merged, replace(new, extras=extras))
    runs.write(merged, out)
    return merged


def train(wanted: Sequence[Job], parallel: int | None) -> None:
    """Runs them all, with a line of progress whenever one is complete."""
    last = -1
    for statuses in experiments.run(wanted, parallel=parallel, poll_s=10):
        done = sum(status.state == "complete" for status in statuses)
        if done != last:
            log.info("%d of %d runs are complete", done, len(wanted))
            last = done


def check(count: int, work: Path, known: runs.Runs, parallel: int | None) -> tuple[pd.DataFrame, float]:
    """Repeats that many of the committed main runs, methods and seeds in turn, and compares. Returns a row per run,
    and the chance that runs of the same distribution lie as far apart (chi-squared of the differences of scores, in
    units of the standard deviation over seeds)."""
    from scipy import stats

    main = known.of()
    offered: dict[str, list[Job]] = {}
    there = {runs.key(row): int(row["run"]) for row in main.to_dict("records")}
    for job in jobs(work, [runs.MAIN_SET]):
        if runs.key_of(job) in there:
            offered.setdefault(job.config.method.name, []).append(job)
    turns = list(offered.values())
    picked = (turns[i % len(turns)][i % len(turns[i % len(turns)])] for i in range(count))
    chosen = list({job.run_dir: job for job in picked}.values())
    train(chosen, parallel)
    deviation = within(main, "id")
    rows = []
    for job, again in zip(chosen, results.per_run(chosen).to_dict("records"), strict=True):
        before = main[main["run"] == there[runs.key_of(job)]].iloc[0]
        gap = again["id"] - before["id"]
        facts = {"method": job.config.method.name, "seed": job.config.seed, "committed": 100 * before["id"]}
        rows.append({**facts, "again": 100 * again["id"], "in deviations": gap / (math.sqrt(2) * deviation)})
    table = pd.DataFrame(rows)
    return table, float(stats.chi2.sf(np.square(table["in deviations"]).sum(), len(table)))


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/published"), help="where runs and evaluations live")
    parser.add_argument("--out", type=Path, default=runs.COMMITTED)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--parallel", type=int, help="runs at once; one per core or GPU unless said otherwise")
    parser.add_argument("--collect-only", action="store_true", help="train nothing: write the files from what is there")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="repeat N committed runs and compare")
    known = parser.parse_args(arguments)
    if known.check:
        table, p = check(known.check, known.work / "check", runs.load(known.out), known.parallel)
        print(table.round(2).to_string(index=False))
        sys.exit(f"not the distribution of the committed runs: p = {p:.2g}" if p < 0.001 else 0)
    there = runs.load(known.out) if (known.out / "runs.csv").is_file() else None
    wanted = jobs(known.work, known.sets)
    lacking = missing(wanted, there)
    log.info("%d of %d runs are missing", len(lacking), len(wanted))
    try:
        if not known.collect_only:
            train(lacking, known.parallel)
    finally:  # what is complete is written down however training ended
        collect(wanted, known.work, known.out)


if __name__ == "__main__":
    main()
