"""How settings are declared: frozen dataclasses whose fields carry type, bounds and choices, checked by pydantic."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar, dataclass_transform

import tyro
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from .. import display
from ..errors import ConfigError

T = TypeVar("T")


def _number(value: Any) -> Any:
    """Refuses truth values, which pydantic would take for 0 and 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


LARGE = 1e9  # beyond it numbers only overflow: in float32, or as a time to wait for
MOST = 2**63 - 1  # of anything that is counted
_no_bool = BeforeValidator(_number)
Int = Annotated[int, _no_bool]
Float = Annotated[float, _no_bool, Field(ge=-LARGE, le=LARGE, allow_inf_nan=False)]
Positive = Annotated[float, _no_bool, Field(gt=0, le=LARGE, allow_inf_nan=False)]
NonNegative = Annotated[float, _no_bool, Field(ge=0, le=LARGE, allow_inf_nan=False)]
Share = Annotated[float, _no_bool, Field(ge=0, le=1, allow_inf_nan=False)]
Clip = Annotated[float, _no_bool, Field(ge=0, lt=1, allow_inf_nan=False)]
PositiveInt = Annotated[int, _no_bool, Field(gt=0, le=MOST)]
Count = Annotated[int, _no_bool, Field(ge=0, le=MOST)]  # 0 has a meaning of its own


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _mapping(value: Any) -> Any:
    """A mapping may come as JSON, from the command line; one that does not has to be written as such."""
    try:
        if isinstance(value, str):
            return json.loads(value, parse_constant=_no_constant)
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("must be a mapping, as JSON") from None
    return value


def _device(value: Any) -> Any:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", str(value), re.ASCII):
        raise ValueError("is auto, cpu, cuda or cuda:N")
    return value


def _reward(value: Any) -> Any:
    if value != "math_verify" and not re.fullmatch(r"[^\W\d][\w.-]*:[^\W\d]\w*", str(value)):
        raise ValueError('is "math_verify" or "module:function"')
    return value


def _name(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise ValueError("must be a name or a path")
    return value


def _servers(value: Any) -> Any:
    """host:port each, perhaps as a URL, and no server twice."""
    known = set()
    for address in value if isinstance(value, (list, tuple)) else ():
        match = re.fullmatch(r"(?:https?://)?([\w.-]+):(\d{1,5})((?:/\S*)?)", str(address), re.ASCII)
        if not match or not 0 < int(match[2]) < 1 << 16:
            raise ValueError("must be addresses host:port")
        known.add((match[1], int(match[2]), match[3].rstrip("/")))
    if isinstance(value, (list, tuple)) and len(known) < len(value):
        raise ValueError("must be different addresses")
    return value


_json = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="JSON",
    instance_from_str=lambda texts: json.loads(texts[0]),
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [json.dumps(value)],
)
JsonMapping = Annotated[dict[str, Any], BeforeValidator(_mapping), _json]
Device = Annotated[str, BeforeValidator(_device)]
RewardName = Annotated[str, BeforeValidator(_reward)]
Name = Annotated[str, AfterValidator(_name)]
Servers = Annotated[tuple[str, ...], BeforeValidator(_servers)]


@dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass whose values are brought into their declared types; what does not fit raises
    ConfigError, in one line."""
    made: Any = dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True, extra="forbid"))(cls)
    init = made.__init__

    @functools.wraps(init)
    def __init__(self: Any, *values: Any, **named: Any) -> None:  # noqa: N807
        try:
            init(self, *values, **named)
        except ValidationError as error:
            raise ConfigError(_one_line(error, made)) from None

    made.__init__ = __init__
    made._repr_html_ = display.settings
    return made


def _one_line(error: ValidationError, cls: Any) -> str:
    """The first thing that is wrong, with the field's name and value."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown_field(name, cls.__dataclass_fields__)
    message = str(first["msg"]).removeprefix("Value error, ")
    if not name:
        return message
    message = message.removeprefix("Input ").replace("should be", "must be", 1)
    return f"{name} {message}, not {_shown(first['input'])}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a {type(value).__name__} too large to write"
    return text if len(text) <= 200 else f"{text[:200]}..."


def unknown_field(name: str, known: Iterable[str]) -> str:
    """The message for a field that does not exist: it names the nearest."""
    near = get_close_matches(name, list(known), n=1)
    return f"no field {name!r} in the configuration" + (f"; did you mean {near[0]}?" if near else "")
