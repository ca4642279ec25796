"""What share of its trace a row begins with: the strategies of the reference implementation, as a pure function."""

from __future__ import annotations

import numpy as np

WINDOWS = 10  # into which the linear strategies divide the steps over which they move


def prefix_shares(
    strategy: str, *, rows: int, low: float, high: float, done: float, shared: bool, rng: np.random.Generator
) -> list[float]:
    """A share per row.

    strategy: "random", uniform between low and high; "fixed", at even distances from low to high (a single row has
        high); "linear" or "reverse_linear", which fall or rise: a shared share is high x (1 - done), or high x done;
        otherwise each row has a uniform one up to high x the part of ten windows that is left, or reached.
    done: how much of the steps is over, 0 to 1. shared: one share for all rows.
    """
    if strategy == "fixed":
        shares = [high] if rows == 1 else [low + (high - low) * row / (rows - 1) for row in range(rows)]
    elif strategy == "random":
        shares = rng.uniform(low, high, rows).tolist()
    elif shared:
        shares = [high * ((1.0 - done) if strategy == "linear" else done)] * rows
    else:
        window = min(int(done * WINDOWS), WINDOWS - 1)
        left = WINDOWS - window if strategy == "linear" else window + 1
        shares = rng.uniform(0.0, high * left / WINDOWS, rows).tolist()
    return [shares[0]] * rows if shared and rows else shares
