"""How speeds are compared: in turns, in one run, on one thread, and as ratios.

A machine's speed drifts from minute to minute by more than most changes gain, so candidates take turns and each round
gives a ratio of its own; what is reported is the median over rounds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

ROUNDS = 7


@dataclass(frozen=True)
class Line:
    """A row of the table: what was measured, how much of which unit, and how it compares with `to`."""

    part: str
    name: str
    value: float
    unit: str
    ratio: float | None = None
    to: str = ""

    def __str__(self) -> str:
        digits = 0 if self.value >= 100 else 1
        compared = f"{self.ratio:.2f} x {self.to}" if self.ratio is not None else ""
        return f"{self.name:<50}{self.value:>14,.{digits}f} {self.unit:<10}{compared}".rstrip()


def in_turns(candidates: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Work per second of each candidate in each round, after one call of each to warm up. A candidate returns how much
    work it has done; the order of a round is that of the one before, turned by one."""
    for work in candidates.values():
        work()
    names, rates = list(candidates), {name: [0.0] * rounds for name in candidates}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            synchronize()
            started = time.perf_counter()
            done = candidates[name]()
            synchronize()
            rates[name][number] = done / (time.perf_counter() - started)
    return rates


def synchronize() -> None:
    """Waits for a GPU, which works on after a call has returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compared(part: str, rates: Mapping[str, list[float]], unit: str, to: str) -> list[Line]:
    """A line for each candidate, with the median of its rounds' ratios to the candidate `to`."""
    return [
        Line(
            part,
            name,
            statistics.median(found),
            unit,
            *((statistics.median(a / b for a, b in zip(found, rates[to], strict=True)), to) if name != to else ()),
        )
        for name, found in rates.items()
    ]


def peak_mb(work: Callable[[], object]) -> float:
    """How many MB of memory the process takes at most while it does the work, beyond what it had; in a child process,
    so that each peak is its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        before = _peak_mb()
        work()
        os.write(writer, str(_peak_mb() - before).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        used = float(answer.read())
    os.waitpid(child, 0)
    return used


def _peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
