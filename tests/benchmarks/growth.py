"""How the time of an update grows with the number of groups, the length of answers and of prompts, the size of groups,
and threads; beside the padded step of most code."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import numpy as np
import torch
from measure import in_turns
from parts import padded_step, update_step

from luffy.methods.rows import Row
from luffy.training.trainer import Trainer

USUAL = dict(groups=8, size=8, prompt=16, answer=48)
AXES = {
    "groups": (2, 4, 8, 16, 32),
    "answer": (12, 24, 48, 96, 192),
    "prompt": (8, 32, 128, 256),
    "size": (2, 4, 8, 16, 32),
}


def rows(groups: int, size: int, prompt: int, answer: int, vocabulary: int = 44) -> list[Row]:
    """Groups of random tokens; answers are between a half and one and a half times as long as said."""
    random = np.random.default_rng(0)
    made = []
    for group in range(groups):
        prompt_ids = random.integers(2, vocabulary, prompt).astype(np.int32)
        for index in range(size):
            length = int(random.integers(answer // 2, answer + answer // 2 + 1))
            token_ids = random.integers(2, vocabulary, length).astype(np.int32)
            logprobs = np.full(length, -3.0, np.float32)
            # one number for all groups, so that they are one mini-batch
            made.append(Row(group, 0, index, prompt_ids, token_ids, 0, logprobs, truncated=False))
    return made


def growth(trainer: Trainer, rounds: int = 3, threads: tuple[int, ...] = (1, 2)) -> Iterator[dict[str, object]]:
    """Seconds of an update, by axis, value and code. The axis "threads" is of the usual rows."""
    for axis, values in AXES.items():
        for value in values:
            yield from _measured(trainer, axis, value, rounds, **{**USUAL, axis: value})
    usual = torch.get_num_threads()
    for count in threads:
        torch.set_num_threads(count)
        yield from _measured(trainer, "threads", count, rounds, **USUAL)
    torch.set_num_threads(usual)


def _measured(trainer: Trainer, axis: str, value: int, rounds: int, **shape: int) -> Iterator[dict[str, object]]:
    made = rows(**shape)
    rates = in_turns(
        {
            "Trainer.update": lambda: float(bool(update_step(trainer, made))),
            "padded rows, all logits": lambda: float(padded_step(trainer, made) is None),
        },
        rounds,
    )
    for code, found in rates.items():
        yield {"axis": axis, "value": value, "code": code, "seconds": 1 / statistics.median(found)}
