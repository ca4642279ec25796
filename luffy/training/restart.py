"""A sampler that has the current weights while it is used, and is started again once in a run if it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import SamplerError
from ..sampling.protocol import Sampler
from ..sampling.ranks import Ranks
from ..sampling.tensor_parallel import TensorParallelSampler
from .clock import Clock

log = logging.getLogger(__name__)

T = TypeVar("T")


class Restarting:
    """sampler: this rank's; weights: the policy's; together: how many neighbouring ranks have one sampler. All ranks
    must use theirs together."""

    def __init__(
        self,
        sampler: Sampler,
        weights: Callable[[], Iterator[tuple[str, Tensor]]],
        ranks: Ranks,
        clock: Clock,
        *,
        together: int = 1,
    ) -> None:
        self.sampler = sampler
        self.weights = weights
        self.ranks = ranks
        self.clock = clock
        self.together = together
        self.restarted = False

    def use(self, work: Callable[[Sampler], T], nothing: Callable[[], T]) -> T:
        """What `work` returns, given the sampler with the current weights; what `nothing` returns where another rank
        leads. If a rank's sampler fails, it is restarted, once in a run, and the work of all ranks done again. Raises
        SamplerError."""
        while True:
            self.clock.failed = ""  # what failed before is done again
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what the update has left in torch's cache is the sampler's now
            # No rank may ask before all weights are there: a server's come from the first rank.
            _, failures = self._attempt(self._load)
            if not failures:
                result, failures = self._attempt(lambda: self._work(work, nothing))
            if not failures:
                return result
            message = "\n".join(dict.fromkeys(failures.values()))
            if self.restarted:
                raise SamplerError(f"the sampler has failed a second time: {message}")
            log.warning("%s", message)
            self.restarted = True
            if self.ranks.rank // self.together in {rank // self.together for rank in failures}:
                self.sampler.restart()

    def _load(self) -> None:
        with self.clock.phase("load_weights"):
            self.sampler.load_weights(self.weights())

    def _work(self, work: Callable[[Sampler], T], nothing: Callable[[], T]) -> T:
        sampler = self.sampler
        if not isinstance(sampler, TensorParallelSampler):
            result = work(sampler)
        elif sampler.leads:
            try:
                result = work(sampler)
            finally:
                sampler.release()
        else:
            sampler.follow()
            result = nothing()
        sampler.sleep()
        return result

    def _attempt(self, action: Callable[[], Any]) -> tuple[Any, dict[int, str]]:
        """What the action returns, and the failures of all ranks' samplers in it, by rank."""
        result, failure = None, None
        try:
            result = action()
        except SamplerError as error:
            failure = str(error)
        gathered = self.ranks.gather(failure)
        return result, {rank: message for rank, message in enumerate(gathered) if message}

    def close(self) -> None:
        self.sampler.close()
