"""The seam between the trainer and the methods: what a method is, and where methods are found by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar, dataclass_transform

from ..errors import ConfigError
from ..objective import Ratios
from .fields import NonNegative, settings
from .rows import ROLLOUT, Batch, Draw, Memory, Now, Rounds, Signal


class RunConfig(Protocol):
    """What a method sees of the configuration that it is a part of (luffy/config.py)."""

    @property
    def data(self) -> Any: ...
    @property
    def sampling(self) -> Any: ...
    @property
    def max_steps(self) -> int: ...
    def replace(self, *, method: Any = None, **values: Any) -> Any: ...


@settings
class Method:
    """A method is a frozen dataclass that owns its parameters: its fields are flags and keys of configurations."""

    name: ClassVar[str] = ""
    label: ClassVar[str] = ""
    samples: ClassVar[bool] = True  # whether any of its rows is sampled
    scores_foreign: ClassVar[bool] = False  # whether `live` reads old log-probs of foreign tokens
    defaults: ClassVar[dict[str, Any]] = {}  # values of other fields of the configuration that it starts from

    entropy_coef: NonNegative = 1e-4
    """Weight of the token-mean entropy bonus (REFERENCE.md converts the reference's values)."""
    beta: NonNegative = 0.0
    """Weight of the token-mean KL divergence of the policy's own tokens to the reference model: that which the run
    starts from, unless the method has another."""

    @property
    def ratios(self) -> Ratios:
        """How the ratios of the policy term are shaped and bounded."""
        return Ratios()

    def rounds(self, draw: Draw) -> Rounds:
        """Yields how rows begin, round by round; what a `yield` gives back is the group so far, with rewards."""
        yield [ROLLOUT] * draw.size

    def signal(self, batch: Batch) -> Signal:
        """What every token of a step counts for."""
        raise NotImplementedError

    def live(self, signal: Signal, now: Now) -> Signal:
        """The signal again, where it follows the policy that is being updated. Called for every micro-batch, whose rows
        are whole, with what that policy says of its tokens. Denominators stay as they were."""
        return signal

    def remember(self, memory: Memory, batch: Batch) -> None:
        """Takes into the memory what later rounds will want of a step's rows."""

    def learning_rate(self, usual: float) -> float:
        """The peak learning rate."""
        return usual

    def traces_wanted(self) -> int:
        """How many rows of a group would begin in a trace, for metrics and estimates."""
        return 0

    def traces_needed(self) -> int:
        """How many different traces a problem must have for that."""
        return self.traces_wanted()

    def sampled_rows(self, size: int) -> float:
        """About how many rows of a group of that size are sampled, for estimates."""
        return size if self.samples else 0

    @property
    def rows_beside(self) -> int:
        """How many demonstrations are learned beside every group, for estimates."""
        return 0

    @property
    def needs_teacher(self) -> bool:
        """Whether it wants the teacher's log-probs of every trace."""
        return False

    def reference(self, model: str) -> str | None:
        """The model whose log-probs of the policy's own tokens are wanted, None if none are. model: the one that the
        run starts from."""
        return model if self.beta and self.samples else None

    def check(self, config: RunConfig) -> None:
        """Raises ConfigError if the rest of the configuration does not go with the method."""

    def stages(self, config: RunConfig) -> list[tuple[str, Any]]:
        """The stages of a run in order: the name of each one's directory, and its configuration. The last one's is the
        run's own directory, "". A model may be the name of an earlier stage's directory, for its final checkpoint."""
        return [("", config)]


METHODS: dict[str, type[Method]] = {}

M = TypeVar("M", bound=Method)


@dataclass_transform(frozen_default=True)
def register(name: str, label: str) -> Callable[[type[M]], type[M]]:
    """Decorator: makes a class a method of that name; label is how tables and figures write it.

    Raises ConfigError if another class has the name.
    """

    def add(cls: type[M]) -> type[M]:
        made = settings(cls)
        made.name, made.label = name, label
        known = METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (made.__module__, made.__qualname__):
            raise ConfigError(f"there is a method {name!r} already: {known.__module__}.{known.__qualname__}")
        METHODS[name] = made
        return made

    return add


def get(name: str) -> type[Method]:
    """The method of a name; "module:name" imports the module first, which registers it. Raises ConfigError."""
    module, colon, plain = name.rpartition(":")
    if colon and name not in METHODS:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"no method {name!r}: {error} (its folder must be the current one, or on PYTHONPATH)"
            ) from error
    if plain not in METHODS:
        raise ConfigError(f"no method {name!r}: there are {', '.join(METHODS)}; your own is module:name")
    if colon and METHODS[plain].__module__ != module:
        raise ConfigError(f"no method {name!r}: {plain} is {METHODS[plain].__module__}'s")
    return METHODS[plain]


def full_name(method: type[Method]) -> str:
    """What `get` finds a method by, also in another process: "module:name" for one that is not luffy's own."""
    ours = method.__module__.startswith("luffy.") or method.__module__ == "__main__"
    return method.name if ours else f"{method.__module__}:{method.name}"
