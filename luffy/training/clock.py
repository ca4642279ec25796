"""Seconds per phase of a step, by name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """seconds: of the phases since the last `clear`; failed: the phase in which an exception was raised first."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failed = ""

    def clear(self) -> None:
        self.seconds.clear()
        self.failed = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what is done inside, also where it fails."""
        started = time.perf_counter()
        try:
            yield
        except BaseException:
            self.failed = self.failed or name
            raise
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def row(self) -> dict[str, float]:
        return {f"time/{name}": seconds for name, seconds in self.seconds.items()}
