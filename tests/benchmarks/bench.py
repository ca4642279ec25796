"""Speed and memory, side by side in one run.

    python tests/benchmarks/bench.py                              # all parts
    python tests/benchmarks/bench.py sampler update               # some of: sampler update step head verifier
    python tests/benchmarks/bench.py --before OLD_CHECKOUT        # in turns with the bench.py of another version

On one thread (OMP_NUM_THREADS says otherwise). Only ratios within a run count; use an idle machine.
The comparison with TRL needs the extra `bench`. notebooks/benchmarks.ipynb draws what is measured here.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

import parts
from measure import ROUNDS, Line

PARTS = ("head", "sampler", "update", "step", "verifier")  # the head first: later the C library keeps freed memory


def measure(wanted: Sequence[str] = PARTS, rounds: int = ROUNDS) -> Iterator[Line]:
    """Lines as they are measured."""
    if "head" in wanted:
        yield from parts.head()
    if {"sampler", "update", "step"} & set(wanted):
        with tempfile.TemporaryDirectory() as folder, parts.make_trainer(Path(folder)) as trainer:
            if "sampler" in wanted:
                yield from parts.sampler(trainer, rounds)
            if "update" in wanted:
                yield from parts.update(trainer, rounds)
            if "step" in wanted:
                yield from _steps(trainer, Path(folder), rounds)
    if "verifier" in wanted:
        yield from parts.verifier()


def _steps(trainer: parts.Trainer, folder: Path, rounds: int) -> Iterator[Line]:
    """Whole steps and updates, before and after those of TRL in a process of its own."""
    rows = trainer.collect(0)
    tokens = sum(len(row.token_ids) for row in rows)
    seconds: list[float] = []
    updates: list[float] = []

    def ours() -> None:
        seconds.extend(parts.step(trainer, rounds))
        updates.extend(parts.in_turns({"": lambda: tokens * bool(parts.update_step(trainer, rows))}, rounds)[""])

    ours()
    theirs: tuple[list[float], list[float]] | None = None
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed (extra `bench`): no comparison", file=sys.stderr)
    else:
        command = [sys.executable, str(Path(__file__).with_name("trl_step.py")), trainer.config.model, str(folder)]
        done = subprocess.run([*command, str(rounds)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"TRL's step ended in an error:\n{done.stderr[-2000:]}")
        theirs = json.loads(done.stdout.splitlines()[-1])
        ours()
    step, update = 1000 * statistics.median(seconds), statistics.median(updates)
    name = "Trainer.train_step (sample, verify, update)"
    if theirs is None:
        yield Line("step", name, step, "ms")
        return
    their_update, their_step = statistics.median(theirs[0]), 1000 * statistics.median(theirs[1])
    yield Line("step", "TRL GRPOTrainer step", their_step, "ms")
    yield Line("step", name, step, "ms", their_step / step, "faster than TRL's")
    yield Line("step", "TRL GRPOTrainer update", their_update, "tokens/s")
    yield Line("step", "Trainer.update beside it", update, "tokens/s", update / their_update, "TRL's")


# --- beside another version ------------------------------------------------------------------------------------------

_PRINTED = re.compile(r"(\S.*?)\s{2,}([\d,]+(?:\.\d+)?) (tokens/s|checks/s|ms|MB)\b")


HERE = Path(__file__).resolve().parents[2]


def before_and_after(other: Path, wanted: Sequence[str], turns: int = 3, here: Path = HERE) -> Iterator[Line]:
    """What this checkout and another one print of the same parts, in turns; lines are matched by their names."""
    found: dict[str, dict[Path, list[float]]] = {}
    units: dict[str, str] = {}
    for turn in range(turns):
        for root in (other, here) if turn % 2 else (here, other):
            script = root / "tests" / "benchmarks" / "bench.py"
            env = {**os.environ, "PYTHONPATH": str(root)}
            done = subprocess.run(
                [sys.executable, str(script), *wanted], capture_output=True, text=True, env=env, cwd=root
            )
            if done.returncode:
                raise RuntimeError(f"{script} ended in an error:\n{done.stderr[-2000:]}")
            for text in done.stdout.splitlines():
                match = _PRINTED.match(text)
                if match:
                    name, number, units[match[1]] = match.groups()
                    found.setdefault(name, {}).setdefault(root, []).append(float(number.replace(",", "")))
    for name, values in found.items():
        if len(values) == 2:
            old, new = (statistics.median(values[root]) for root in (other, here))
            gain = old / new if units[name] in ("ms", "MB") else new / old
            yield Line("before and after", name, new, units[name], gain, f"better than {old:,.0f} {units[name]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--before", type=Path, help="a checkout of another version")
    known = parser.parse_args()
    if unknown := set(known.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    before = known.before and before_and_after(known.before.resolve(), known.parts)
    for line in before or measure(known.parts, known.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
