"""Values that change over a run: a number, or a mapping that says how one becomes another."""

from __future__ import annotations

import json
import math
from dataclasses import field
from typing import Annotated, Any

import tyro
from pydantic import BeforeValidator

from ..errors import ConfigError
from .fields import LARGE

SHAPES = ("cosine", "linear", "step")
KEYS = {"start", "end", "steps", "warmup", "shape"}


def _scheduled(value: Any) -> Any:
    """Checks a number or a mapping, which may come as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("must be a number, or a mapping as JSON") from None
    if _finite(value):
        return float(value)
    if not isinstance(value, dict) or not {"start", "end", "steps"} <= set(value) <= KEYS:
        raise ValueError("must be a number or a mapping with start, end, steps, and perhaps warmup and shape")
    numbers = [value["start"], value["end"], value["steps"], value.get("warmup", 0)]
    if not all(map(_finite, numbers)):
        raise ValueError("must have numbers as start, end, steps and warmup")
    if value["steps"] < 0 or value.get("warmup", 0) < 0 or str(value.get("shape", "cosine")) not in SHAPES:
        raise ValueError(f"must have steps and warmup of at least 0, and a shape of {', '.join(SHAPES)}")
    return value


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGE <= value <= LARGE


Scheduled = Annotated[
    float | dict[str, Any],
    BeforeValidator(_scheduled),
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER|JSON",
        instance_from_str=lambda texts: _scheduled(texts[0]),
        is_instance=lambda value: isinstance(value, (int, float, dict)),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]


def scheduled(**values: Any) -> Any:
    """A field's default that is a mapping."""
    return field(default_factory=lambda: dict(values))


def at(schedule: float | dict[str, Any], step: int) -> float:
    """The value at a step (from 0): from 0 to `start` over `warmup` steps, from there to `end` over `steps` (by half a
    cosine, a line, or at once at their end), and `end` from then on."""
    if not isinstance(schedule, dict):
        return schedule
    start, end, warmup = schedule["start"], schedule["end"], schedule.get("warmup", 0)
    if step < warmup:
        return float(start * step / warmup)
    if step - warmup >= schedule["steps"]:
        return float(end)
    done = (step - warmup) / schedule["steps"]
    shapes = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "step": 1.0}
    left = shapes[schedule.get("shape", "cosine")]
    return float(end + (start - end) * left)


def check_share(schedule: float | dict[str, Any], said: str, most: float = 1.0) -> None:
    """Raises ConfigError, with what it is said to be, if it is ever below 0 or above `most`. A warm-up begins at 0."""
    values = [schedule["start"], schedule["end"]] if isinstance(schedule, dict) else [schedule]
    if not 0 <= min(values) <= max(values) <= most:
        raise ConfigError(f"{said}, not {schedule}")
