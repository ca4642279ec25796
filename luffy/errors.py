"""The errors that end in one line for whoever uses the package; anything else is a fault of the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
    """A configuration with an unknown, ill-typed or impossible value; the message names the field."""


class DataError(ValueError):
    """Training or evaluation data that cannot be used."""


class TemplateError(ValueError):
    """A prompt template that does not exist or refuses a prompt."""


class RunError(RuntimeError):
    """A run directory that cannot be used as asked: taken, not a run, or of another configuration."""


class NonFiniteError(RunError):
    """The loss, the gradient, the policy's probabilities or its weights are NaN or infinite. What is on disk is from
    before.

    rows: what the step had of its batch by then.
    """

    rows: Sequence[Any] = ()


class SamplerError(RunError):
    """A sampler in a process of its own has failed, hangs, or has reported an error."""
