"""The processes that train one model together, one per GPU: how they share work and agree on results.

Every rank runs the same trainer on the same data. A rank samples and verifies its share of the groups, then all know
all rows; a rank computes its share of the micro-batches, then all know all log-probs. So metrics, advantages and
random numbers do not depend on how many there are. Only the first writes to the run directory. A single process is a
group of one, for which everything here is the identity.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import Config
from ..errors import ConfigError
from . import alive

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)  # the first rank may evaluate, or write a large checkpoint, while the others wait


@dataclass(frozen=True)
class Ranks:
    """rank: this process among `size`; local_rank: among those of its machine, which is also its GPU's number. group:
    torch's group of them, None for all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """What every rank has given, in their order, on every rank."""
        if self.size == 1:
            return [value]
        gathered: list[T | None] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered  # type: ignore[return-value]

    def broadcast(self, value: T) -> T:
        """What the first rank has given."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def sum(self, values: Tensor) -> Tensor:
        """Adds up a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)

    def mine(self, index: int, together: int = 1) -> bool:
        """Whether a group, or an evaluation problem, is sampled and verified here. together: how many neighbouring
        ranks have one sampler, which the first of them leads."""
        return index % (self.size // together) * together == self.rank

    def neighbours(self, size: int) -> Ranks:
        """This rank among the `size` neighbours that it shares a sampler with. All ranks must call it. Raises
        ConfigError if the ranks of a machine do not divide into such groups."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        if self.size % size or here % size:
            raise ConfigError(f"vllm_tensor_parallel_size {size} does not divide the {here} ranks of a machine")
        groups = [
            dist.new_group(range(first, first + size), timeout=TIMEOUT, backend="gloo")
            for first in range(0, self.size, size)
        ]
        return Ranks(self.rank % size, size, self.local_rank, groups[self.rank // size])


def wait_alike() -> None:
    """Gives all groups of this process our time-out: DeepSpeed makes its own with torch's, of minutes, and waits in
    them while the first rank evaluates or writes."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(TIMEOUT, group)


def launched(backend: str = "gloo", timeout: timedelta = TIMEOUT) -> Ranks:
    """The ranks that a launcher (torchrun, deepspeed) has started, as its environment variables say; alone without."""
    place = os.environ.get
    ranks = Ranks(int(place("RANK", 0)), int(place("WORLD_SIZE", 1)), int(place("LOCAL_RANK", 0)))
    if backend == "nccl":
        torch.cuda.set_device(ranks.local_rank)
    if ranks.size > 1 and not dist.is_initialized():
        dist.init_process_group(backend, timeout=timeout)
        alive.watch(ranks.rank, ranks.size)
    return ranks


def join(config: Config) -> Ranks:
    """The ranks that train a configuration. Raises ConfigError if there are several and the engine trains in one
    process."""
    if config.engine.engine == "torch":
        if (size := int(os.environ.get("WORLD_SIZE", 1))) > 1:
            raise ConfigError(f"engine torch trains in one process, not in {size}: use engine deepspeed")
        return Ranks()
    backend = "nccl" if config.engine.device != "cpu" and torch.cuda.is_available() else "gloo"
    ranks = launched(backend)
    if not dist.is_initialized():  # DeepSpeed wants a group also of one
        dist.init_process_group(backend, timeout=TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)
    return ranks
