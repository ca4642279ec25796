"""Generated school problems in words, two or three operations, with written-out traces, for a small real model.

    Ravi has 6 bags with 5 marbles each. Ravi buys 15 more marbles. How many marbles does Ravi have now?
    -> 6 bags with 5 marbles each are 6 * 5 = 30 marbles. 30 + 15 = 45. The answer is \\boxed{45}.

The data set is called "school". Its rows are problems as any (data/problems.py): the splits "train" and
"complement" have two operations, "test" also three, as a benchmark of its own, `school_long`. Splits are disjoint by a
hash of the numbers and operations of a problem, whatever the words around them.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import Any

NAME = "school"
SIZES = {"train": 2000, "complement": 1000, "test": 400}
SPLITS = {"train": range(0, 7), "complement": range(7, 9), "test": range(9, 10)}  # of ten parts
LENGTHS = {2: "school", 3: "school_long"}

PEOPLE = ("Mia", "Tom", "Lena", "Omar", "Ana", "Ben", "Zoe", "Ravi")
THINGS = ("apples", "books", "coins", "stamps", "marbles", "pencils", "shells", "cards")
ASK = "Work it out step by step and put the final number in \\boxed{}."


def rows(split: str = "train") -> Iterator[dict[str, Any]]:
    """The rows of a split, the same at every call: problem, answer, traces, source. Raises KeyError for another
    split."""
    part, rng = SPLITS[split], random.Random(f"school/{split}")
    seen: set[Plan] = set()
    lengths = tuple(LENGTHS) if split == "test" else (2,)
    while len(seen) < SIZES[split]:
        plan = _plan(rng, lengths[len(seen) % len(lengths)])
        if plan in seen or zlib.crc32(repr(plan).encode()) % 10 not in part:
            continue
        seen.add(plan)
        yield _row(plan, rng)


SIGNS = {"buys": "+", "gives": "-", "doubles": "*"}


def _after(value: int, kind: str, number: int) -> int:
    """The value when an operation is done."""
    return {"+": value + number, "-": value - number, "*": value * number}[SIGNS[kind]]


Plan = tuple[tuple[str, int], ...]  # the first is how it begins, ("has", 12) or ("bags of 6", 4); then operations


def _plan(rng: random.Random, operations: int) -> Plan:
    """Numbers and operations whose values stay between 1 and 99; bags count for an operation."""
    while True:
        if rng.random() < 0.4:
            each, bags = rng.randint(2, 9), rng.randint(2, 6)
            plan, value, left = [(f"bags of {each}", bags)], each * bags, operations - 1
        else:
            value, left = rng.randint(5, 40), operations
            plan = [("has", value)]
        for _ in range(left):
            kind = rng.choice(("buys", "gives", "buys", "gives", "doubles"))
            number = 2 if kind == "doubles" else rng.randint(2, 20)
            value = _after(value, kind, number)
            plan.append((kind, number))
            if not 1 <= value <= 99:
                break
        else:
            return tuple(plan)


def _row(plan: Plan, rng: random.Random) -> dict[str, Any]:
    """A plan in words, with its solution."""
    (person, other), thing = rng.sample(PEOPLE, 2), rng.choice(THINGS)
    (begin, value), *operations = plan
    if begin == "has":
        told, solved = [f"{person} has {value} {thing}."], []
    else:
        each = int(begin.rpartition(" ")[2])
        told = [f"{person} has {value} bags with {each} {thing} each."]
        solved = [f"{value} bags with {each} {thing} each are {value} * {each} = {value * each} {thing}."]
        value *= each
    for place, (kind, number) in enumerate(operations):
        then = "Then " if place else ""
        before, value = value, _after(value, kind, number)
        told.append(
            {
                "buys": f"{then}{person} buys {number} more {thing}.",
                "gives": f"{then}{person} gives {number} {thing} to {other}.",
                "doubles": f"{then}{person} doubles the number of {thing}.",
            }[kind]
        )
        solved.append(f"{before} {SIGNS[kind]} {number} = {value}.")
    told.append(f"How many {thing} does {person} have now?")
    trace = " ".join([*solved, f"The answer is \\boxed{{{value}}}."])
    length = len(operations) + (begin != "has")
    return {"source": LENGTHS[length], "problem": f"{' '.join(told)} {ASK}", "answer": str(value), "traces": [trace]}
