"""LUFFY: learning to reason under off-policy guidance (arXiv 2504.14945), as a small library.

The names below are all that notebooks use. They are imported when first asked for, so that `import luffy` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "objective": ("group_advantages", "policy_loss"),
    "verifier": ("Verifier",),
    "config": ("Config", "ConfigError"),
    "engine": ("load_tokenizer",),
    "methods": ("METHODS", "make_config", "read_values"),
    "data": ("Problem", "load_problems"),
    "runs": ("RunDirectory", "RunError"),
    "trainer": ("Trainer", "train", "resume"),
    "eval_runs": ("Evaluation", "EvaluationConfig", "evaluate_models"),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}
_MODULES = ("benchmarks", "experiments", "explore", "openr1", "plots", "shaping", "tables", "tinyworld")

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
