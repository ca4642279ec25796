"""vLLM's weight transfer between processes without GPUs: the parts of its NCCL engine, over gloo.

vLLM has weight transfer engines for GPUs only, and a registry for others. The server loads this module by
`--worker-extension-cls luffy.sampling.gloo.Extension`, the trainer by importing it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer import base
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from . import meeting
from .vllm_worker import repack_head

NAME = "gloo"
TIMEOUT = timedelta(minutes=1)
TAG = 0


@dataclass
class Meeting(base.WeightTransferInitInfo):
    """Where trainer (rank 0) and workers find each other; the workers' ranks begin at rank_offset."""

    master_address: str
    master_port: int
    world_size: int
    rank_offset: int = 1


@dataclass
class TrainerMeeting(base.TrainerInitInfo):
    backend: ClassVar[str] = NAME

    master_address: str
    master_port: int
    world_size: int


def join(info: Meeting | TrainerMeeting, rank: int) -> Any:
    """The group of both sides, beside whatever groups either is in. The trainer's store listens at the address that is
    told to the workers alone; on one machine that is loopback, where the group's own connections are then too."""
    address = info.master_address
    store = meeting.store(address, info.master_port, info.world_size, leads=rank == 0, timeout=TIMEOUT)
    gloo: Any = dist.ProcessGroupGloo
    if not address.startswith("127."):  # at the interface of GLOO_SOCKET_IFNAME, or of the host's name
        return gloo(store, rank, info.world_size, TIMEOUT)
    options = gloo._Options()
    options._timeout, options._devices = TIMEOUT, [gloo.create_device(hostname=address)]
    return gloo(store, rank, info.world_size, options)


class GlooWorkerEngine(NCCLWeightTransferEngine):
    """The worker's side."""

    init_info_cls = Meeting  # type: ignore[assignment]
    group: Any = None

    def init_transfer_engine(self, init_info: Meeting) -> None:  # type: ignore[override]
        parallel = self.parallel_config
        place = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.group = join(init_info, init_info.rank_offset + place)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # (the inherited one waits for a GPU)

    def start_weight_update(self) -> None:
        """Nothing: the model is not touched before all weights are here; half-loaded it could not be loaded again."""

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        received = []
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.recv([weight], 0, TAG).wait()
            received.append((name, weight))
        super().start_weight_update()
        self.model.load_weights(received)

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        repack_head(self.model)

    def shutdown(self) -> None:
        self.group = None


class GlooTrainerEngine(NCCLTrainerWeightTransferEngine):
    """The trainer's side, in the one process that sends."""

    init_info_cls = TrainerMeeting  # type: ignore[assignment]
    group: Any = None

    @classmethod
    def trainer_init(  # type: ignore[override]
        cls, init_info: TrainerMeeting, *, client: base.VLLMWeightSyncClient, source: base.WeightSource | None = None
    ) -> GlooTrainerEngine:
        assert source is not None
        engine = cls(client=client, source=source)
        workers = Meeting(init_info.master_address, init_info.master_port, init_info.world_size)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.init_weight_transfer_engine, asdict(workers))
            engine.group = join(init_info, 0)
            waiting.result()
        return engine

    def _broadcast(self, source: base.WeightSource, meta: list[base.ParamMeta]) -> None:
        for _, tensor in self._checked_iter(source, meta):
            # not a broadcast, in which workers wait for each other and do not notice that the trainer is gone
            works = [self.group.send([tensor.contiguous()], rank, TAG) for rank in range(1, self.group.size())]
            for work in works:
                work.wait()

    def shutdown(self) -> None:
        self.group = None


class Extension:
    """Named so that vLLM's workers import this module."""


WeightTransferEngineFactory.register_engine(NAME, GlooWorkerEngine)
WeightTransferTrainerFactory.register_engine(NAME, GlooTrainerEngine)
