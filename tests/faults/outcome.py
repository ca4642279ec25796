"""What came of a fault that was tried."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """kind: the line of the table. fault: what was done. lost: what was lost by it; empty if the project survived."""

    kind: str
    fault: str
    lost: str = ""


def table(outcomes: Iterable[Outcome]) -> str:
    """Faults by kind: tried, survived, lost; what was lost below."""
    kinds: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        kinds[outcome.kind].append(outcome)
    lines = ["| fault | tried | survived | lost |", "|---|---|---|---|"]
    for kind, found in kinds.items():
        lost = sum(bool(outcome.lost) for outcome in found)
        lines.append(f"| {kind} | {len(found)} | {len(found) - lost} | {lost} |")
    details = [f"- {o.kind}, {o.fault}: {o.lost}" for found in kinds.values() for o in found if o.lost]
    return "\n".join([*lines, *(["", *details] if details else [])])
