"""A real language model on a laptop: SmolLM2-135M on generated school problems, under three methods.

`python -m paper_figures.smollm` makes the runs, hours on one thread each, resumable, and writes their curves to
paper_figures/smollm_curves.csv, which notebooks/train.ipynb shows. They are one seed each: an example, no evidence.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import pandas as pd

from luffy import experiments, make_config, results
from luffy.study.experiments import Job
from luffy.study.presets import read_values

from . import make_runs

FILE = Path(__file__).parent / "smollm_curves.csv"
METHODS = ("on_policy", "sft", "luffy")
COLUMNS = ["method", "seed", "step", "reward/on", "entropy/on", "length/on", "eval/id", "eval/ood", "off_policy_prob"]
COLUMNS += ["groups/off_policy_share", "time/step"]


def jobs(work: Path) -> list[Job]:
    return [experiments.make_job(make_config(method, **read_values("smollm", method)), work) for method in METHODS]


def curves() -> pd.DataFrame:
    """The committed curves: a line per method and step."""
    return pd.read_csv(FILE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/smollm"), help="where the runs live")
    parser.add_argument("--parallel", type=int, default=1, help="runs at once, 5 GB each")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    made = jobs(arguments.work)
    make_runs.train(made, arguments.parallel)
    found = results.curves(made)
    found[[name for name in COLUMNS if name in found]].to_csv(FILE, index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
