"""A sampler that has the current weights while it is used, and is started again once in a run if it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import SamplerError
from ..sampling.protocol import Sampler
from .clock import Clock
from .ranks import Ranks

log = logging.getLogger(__name__)

T = TypeVar("T")


class Restarting:
    """sampler: this rank's; weights: the policy's; all ranks must use theirs together."""

    def __init__(
        self, sampler: Sampler, weights: Callable[[], Iterator[tuple[str, Tensor]]], ranks: Ranks, clock: Clock
    ) -> None:
        self.sampler = sampler
        self.weights = weights
        self.ranks = ranks
        self.clock = clock
        self.restarted = False

    def use(self, work: Callable[[Sampler], T]) -> T:
        """What `work` returns, given the sampler with the current weights. If a rank's sampler fails, it is restarted,
        once in a run, and the work of all ranks done again. Raises SamplerError."""
        while True:
            result, failure = None, None
            self.clock.failed = ""  # what failed before is done again
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what the update has left in torch's cache is the sampler's now
            try:
                with self.clock.phase("load_weights"):
                    self.sampler.load_weights(self.weights())
                result = work(self.sampler)
                self.sampler.sleep()
            except SamplerError as error:
                failure = error
            failures = [message for message in self.ranks.gather(str(failure) if failure else None) if message]
            if not failures:
                return result  # type: ignore[return-value]
            if self.restarted:
                raise SamplerError(f"the sampler has failed a second time: {failures[0]}")
            log.warning("%s", failures[0])
            self.restarted = True
            if failure:
                self.sampler.restart()

    def close(self) -> None:
        self.sampler.close()
