"""LUFFY: learning to reason under off-policy guidance (arXiv 2504.14945), as a small library.

The names below are all that notebooks use. They are imported when first asked for, so that `import luffy` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "group_advantages": "objective",
    "policy_loss": "objective",
    "Verifier": "verifier",
    "Config": "config",
    "make_config": "config",
    "ConfigError": "errors",
    "RunError": "errors",
    "METHODS": "methods",
    "read_values": "study.presets",
    "read_published": "evaluation.paper_numbers",
    "load_tokenizer": "model.loading",
    "Problem": "data.problems",
    "load_problems": "data.problems",
    "RunDirectory": "runs",
    "Trainer": "training.trainer",
    "train": "training.trainer",
    "resume": "training.trainer",
    "Evaluation": "evaluation.evaluate",
    "EvaluationConfig": "evaluation.options",
    "evaluate_models": "evaluation.evaluate",
}
_MODULES = {
    "arena": "study.arena",
    "benchmarks": "data.benchmarks",
    "experiments": "study.experiments",
    "explore": "study.explore",
    "methods": "methods",
    "openr1": "data.openr1",
    "plots": "study.plots",
    "presets": "study.presets",
    "results": "study.results",
    "shaping": "shaping",
    "tables": "evaluation.tables",
    "tinyworld": "data.tinyworld",
    "verifier": "verifier",
}

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{_MODULES[name]}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
