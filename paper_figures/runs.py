"""The measured side of the tables and figures: what came out of runs, as small CSV files.

    runs.csv         one row a run: its set (preset), the settings in which runs differ, scores, cost
    curves.csv       one row a run and step: the metrics that figures draw
    answers.csv      lengths of right and wrong answers of final models: counts by length               (Figure 10)
    temperatures.csv pass@8 of final models over the sampling temperature                              (Figure 12)
    cases.csv        one problem answered by several final models                                      (Figure 7)
    bases.csv        what the base models can do before training (luffy.study.premise)
    manifest.json    name, code and package versions and machine of every run

`python -m paper_figures.make_runs` makes the runs and adds them to the files; `python -m paper_figures.runs RUNS OUT`
writes files from run directories. The committed ones are in paper_figures/runs and are what figures are drawn from
unless told otherwise. A run that is trained again on another machine may differ in its last bits, and so in every later
number: what can be repeated is the distribution over seeds (make_runs --check).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from luffy import arena, make_config, results
from luffy.config import LATER, Config
from luffy.errors import ConfigError
from luffy.model import bases
from luffy.runs import RunDirectory
from luffy.study.experiments import Job

COMMITTED = Path(__file__).parent / "runs"
MAIN_SET = "full"  # runs that lie directly in a folder are taken for this set

# Settings in which the runs of our presets differ; a run of another tier has them as well.
SETTINGS = (
    "model", "steps", "difficulties", "gamma", "num_off_policy", "num_traces", "trace_errors", "verbosity",
    "learning_rate", "sft_learning_rate", "sft_loss_coef", "max_grad_norm",
)  # fmt: skip
KEYS = ("run", "set", *SETTINGS, "method", "seed")
METRICS = (
    "reward/on", "entropy/on", "entropy/answer", "length/on", "length/off", "truncated/on", "boxed/on", "pg_clipfrac",
    "off_policy_prob", "groups/off_policy_share", "grad_norm", "total/generated_tokens", "total/trained_tokens",
    "eval/id", "eval/ood", "time/step",
)  # fmt: skip


RESULTS = (
    "id", "ood", "pass@8", "id T=0.1", "ood T=0.1", "base id", "base ood", "entropy", "entropy_answer", "length",
    "boxed", "prompts", "generated_tokens", "trained_tokens", "demonstrations", "seconds",
)  # fmt: skip
VARIED = ("map", "gamma", "sensitivity")  # sets in which a method has runs with several settings
THIN = (*VARIED, *arena.WORLDS.values())  # sets of whose curves only the validations are kept
BASE_MODEL = "base"  # in extras, the method of models before training
EXTRAS = ("answers", "temperatures", "cases", "bases")
# What rows of an extra belong to: those of an owner are replaced together.
OWNERS = {"answers": ["method", "seed"], "temperatures": ["method", "seed"], "bases": ["model"]}


class NoDataError(RuntimeError):
    """A figure's data does not exist in these runs; the message says which command makes it."""


@dataclass(frozen=True)
class Runs:
    """What the files above hold, as data frames. source: where they come from, for captions."""

    runs: pd.DataFrame
    curves: pd.DataFrame
    source: str
    extras: dict[str, pd.DataFrame] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)

    def of(self, run_set: str = MAIN_SET, **settings: Any) -> pd.DataFrame:
        """The runs of a set with these settings, e.g. method="luffy". Raises NoDataError if there are none."""
        chosen = self.runs[self.runs["set"] == run_set]
        for name, value in settings.items():
            chosen = chosen[chosen[name] == value]
        if chosen.empty:
            raise NoDataError(
                f"no runs of preset {run_set}: papermill notebooks/ablation.ipynb out.ipynb -p preset {run_set}"
            )
        return chosen

    def curves_of(self, chosen: pd.DataFrame) -> pd.DataFrame:
        """The curves of some rows of `runs`, with their method, seed and set."""
        return self.curves.merge(chosen[["run", "set", "method", "seed"]], on="run")

    def on_bases(self) -> dict[str, pd.DataFrame]:
        """The runs of the main set and of the map by the recipe of their base model, weakest first: those that differ
        in nothing else. A recipe's models differ in their seed."""
        chosen = self.runs[self.runs["set"].isin([MAIN_SET, "map"])]
        names = chosen["model"].map(recipe)
        return {name: chosen[names == name] for name in sorted(set(names), key=lambda name: (own_share(name), name))}

    def bases_in_training(self) -> pd.DataFrame:
        """What the base models do before training at the temperature of training: rows of bases.csv, with `recipe`. No
        rows if it was not measured."""
        table = self.extras.get("bases", pd.DataFrame(columns=["model", "temperature"]))
        chosen = table[np.isclose(table["temperature"].astype(float), 1.0)]
        return chosen.assign(recipe=chosen["model"].map(recipe))

    def extra(self, name: str) -> pd.DataFrame:
        """One of EXTRAS. Raises NoDataError if they were not made."""
        if name not in self.extras:
            raise NoDataError(f"no {name}.csv in {self.source}: python -m paper_figures.make_runs")
        return self.extras[name]


def _base(model: str) -> bases.Base | None:
    try:
        return bases.parse(model)
    except ConfigError:
        return None


def own_share(model: str) -> float:
    """The share of answers with own steps of a base model's recipe; -1 for another model."""
    base = _base(model)
    return base.own_share if base else -1.0


def base_seed(model: str, otherwise: int) -> int:
    """The seed of an embedded base model; of another model the given number."""
    base = _base(model)
    return base.seed if base else otherwise


def recipe(model: str) -> str:
    """The name of an embedded base model without its seed; another model's name as it is."""
    base = _base(model)
    return replace(base, seed=0).name if base else model


def load(path: str | Path | None = None) -> Runs:
    """The committed files, those in another folder, or the run directories in a folder (and its subfolders).

    Raises NoDataError if the folder holds neither.
    """
    folder = Path(path or COMMITTED)
    if (folder / "runs.csv").is_file():
        extras = {
            name: pd.read_csv(folder / f"{name}.csv", keep_default_na=name != "cases")
            for name in EXTRAS
            if (folder / f"{name}.csv").is_file()
        }
        manifest = json.loads((folder / "manifest.json").read_text())
        table, curves = pd.read_csv(folder / "runs.csv"), pd.read_csv(folder / "curves.csv")
        return Runs(
            _complete(table, RESULTS), _complete(curves, METRICS), str(path or "committed runs"), extras, manifest
        )
    return from_directories(folder)


def _complete(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The table with all these columns: what was not measured is NaN, and the panels that show it say so."""
    return table.reindex(columns=[*table.columns, *(name for name in columns if name not in table)])


def find(folder: Path) -> dict[str, list[Job]]:
    """The complete runs in a folder (set MAIN_SET) and in its subfolders (a set each), in the order of their names."""
    found: dict[str, list[Job]] = {}
    for path in sorted([*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]):
        run = RunDirectory(path.parent)
        if path.parent.name == "first_stage" or not run.is_complete:
            continue
        run_set = MAIN_SET if path.parent.parent == folder else path.parent.parent.name
        found.setdefault(run_set, []).append(Job(run.config(), path.parent))
    return found


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that runs are told apart by; one that a method does not have is at its default."""
    known = {**_defaults(), **config.to_dict()}
    return {name: known.get(name) for name in SETTINGS} | {
        "model": Path(config.model).name,
        "steps": config.max_steps,
        "difficulties": " ".join(map(str, config.world.difficulties)),
        "num_off_policy": config.method.traces_wanted(),
    }


@cache
def _defaults() -> dict[str, Any]:
    """Fields of all methods together at their defaults, LUFFY's over the others'."""
    return {
        name: value
        for method in ("rl_sft_loss", "sft", "luffy")
        for name, value in make_config(method).to_dict().items()
    }


@cache
def _unrecorded() -> dict[str, Any]:
    """The values that settings had before they were recorded: those of LATER, else the default."""
    return {name: value for name, value in {**settings_of(make_config()), **LATER}.items() if name in SETTINGS}


def from_directories(folder: Path) -> Runs:
    """What `load` returns, from run directories. Raises NoDataError if there is no complete run."""
    sets = find(folder)
    if not sets:
        raise NoDataError(f"no complete run in {folder}: papermill notebooks/ablation.ipynb out.ipynb")
    return from_jobs(sets, str(folder))


def from_jobs(sets: Mapping[str, Sequence[Job]], source: str) -> Runs:
    """What `load` returns, from the complete ones of some runs by set. Raises NoDataError for two of a kind."""
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    manifest: dict[str, Any] = {}
    for run_set, offered in sets.items():
        jobs = [job for job in offered if job.run.is_complete]
        for job, result in zip(jobs, results.per_run(jobs).to_dict("records"), strict=True):
            number = len(rows)
            result.pop("variant")
            rows.append({"run": number, "set": run_set, **result, **settings_of(job.config)})
            facts = json.loads((job.run_dir / "manifest.json").read_text())
            kept = {name: facts[name] for name in ("luffy", "packages", "machine")}
            manifest[str(number)] = {"run": f"{run_set}/{job.run_dir.name}", **kept}
            for row in job.rows():
                if run_set not in THIN or "eval/id" in row:
                    measured = {name: row[name] for name in METRICS if name in row}
                    curves.append({"run": number, "stage": row["stage"], "step": row["step"], **measured})
    table = _complete(
        pd.DataFrame(rows, columns=None if rows else ["run", "set", *SETTINGS, "method", "seed"]), RESULTS
    )
    frame = _complete(pd.DataFrame(curves, columns=None if curves else ["run", "stage", "step"]), METRICS)
    table = table[[*KEYS, *(name for name in table if name not in KEYS)]]
    check(table)
    return Runs(table, frame, source, {}, manifest)


def key(row: Mapping[Any, Any]) -> tuple[str, ...]:
    """What names a run, from a row of runs.csv or a mapping of as much: set, method, seed and settings. A setting that
    was not recorded yet had the value of LATER, or its default."""
    values = [row.get(name, _unrecorded().get(name)) for name in ("set", "method", "seed", *SETTINGS)]
    return tuple("" if value is None or value != value else _text(value) for value in values)


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str) else f"{float(value):.6g}"


def set_of(job: Job) -> str:
    """The set of a run that make_runs makes: the folder that its directory lies in."""
    return job.run_dir.parent.name


def key_of(job: Job) -> tuple[str, ...]:
    """The key of a run that make_runs makes."""
    return key(
        {"set": set_of(job), "method": job.config.method.name, "seed": job.config.seed, **settings_of(job.config)}
    )


def merge(known: Runs, new: Runs) -> Runs:
    """Both, where a new run takes the place of the known one with its key. Raises NoDataError for two of a kind."""
    made = {key(row) for row in new.runs.to_dict("records")}
    kept = [key(row) not in made for row in known.runs.to_dict("records")]
    old = known.runs[kept].copy()
    old = old.assign(**{name: value for name, value in _unrecorded().items() if name not in old})
    parts = [(known, old), (new, new.runs)]
    frames: list[dict[str, Any]] = []
    curves: list[pd.DataFrame] = []
    manifest: dict[str, Any] = {}
    for source, table in parts:
        for row in table.to_dict("records"):
            number = len(frames)
            frames.append({**row, "run": number})
            curves.append(source.curves[source.curves["run"] == row["run"]].assign(run=number))
            manifest[str(number)] = source.manifest[str(row["run"])]
    extras = {**known.extras, **new.extras}
    for name, columns in OWNERS.items():
        if name in known.extras and name in new.extras:
            first, second = known.extras[name], new.extras[name]
            again = set(second[columns].itertuples(index=False, name=None))
            stays = [owner not in again for owner in first[columns].itertuples(index=False, name=None)]
            extras[name] = pd.concat([first[stays], second], ignore_index=True)
    table = _complete(pd.DataFrame(frames), RESULTS)
    table = table[[*KEYS, *(name for name in table if name not in KEYS)]]
    check(table)
    return Runs(table, pd.concat(curves, ignore_index=True), known.source, extras, manifest)


def check(table: pd.DataFrame) -> None:
    """Raises NoDataError if a set has a method and seed twice: they would count as independent seeds."""
    for run_set, part in table.groupby("set"):
        keys = ["method", "seed", *(SETTINGS if run_set in VARIED else ())]
        twice = part[part.duplicated(keys, keep=False)]
        if len(twice):
            differing = [name for name in SETTINGS if twice[name].nunique() > 1] or ["nothing that is recorded"]
            raise NoDataError(
                f"several runs of {twice['method'].iloc[0]} with seed {twice['seed'].iloc[0]} in {run_set}; they "
                f"differ in {', '.join(differing)}: give each setting a folder of its own"
            )


def write(runs: Runs, folder: Path) -> None:
    """Writes the files, numbers to four significant digits in curves and six elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    runs.runs.to_csv(folder / "runs.csv", index=False, float_format="%.6g")
    runs.curves.to_csv(folder / "curves.csv", index=False, float_format="%.4g")
    for name, frame in runs.extras.items():
        frame.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    (folder / "manifest.json").write_text(json.dumps(runs.manifest, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the files that tables and figures are made of.")
    parser.add_argument("runs", type=Path, help="folder of run directories, or of sets of them")
    parser.add_argument("out", type=Path)
    known = parser.parse_args()
    write(from_directories(known.runs), known.out)


if __name__ == "__main__":
    main()
