"""Shared fixtures: the embedded model, and the values of a short run."""

from __future__ import annotations

import os
import sys

# One thread: two threads beside any busy process spin-wait, and the bits of a sum depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_methods_are_forgotten():
    """Methods that a test registers are removed after it, with the files that it imported for them. Otherwise the tests
    that the worker runs next would see them."""
    from luffy.methods import METHODS

    known, imported = set(METHODS), set(sys.modules)
    yield
    for name in set(METHODS) - known:
        module = METHODS.pop(name).__module__
        if module not in imported:
            del sys.modules[module]


@pytest.fixture(scope="session")
def tiny():
    """The embedded base model and its tokenizer. Tests must not change its weights."""
    from luffy.model.loading import load_model, load_tokenizer

    return load_model("tiny").eval(), load_tokenizer("tiny")


@pytest.fixture(scope="session")
def short_run() -> dict[str, object]:
    """Values that make a run take about a second."""
    return dict(
        steps=4, rollout_batch_size=4, mini_batch_size=2, num_generations=4, max_completion_length=48, num_problems=40,
        eval_steps=2, eval_problems=4, final_eval_problems=4, final_eval_samples=2, save_steps=2, sample_steps=2,
        verbosity=0.0,
    )  # fmt: skip
