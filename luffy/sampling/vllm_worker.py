"""The process in which vLLM generates: the trainer's child on the same device.

Trainer and worker talk over one connection. What the trainer sends is a tuple of a word and its arguments:

    sample    requests and sampling parameters   ->  "rollouts" as they finish, "alive" while tokens come, "done"
    weights   then names, shapes and data types; ->  "ok" for each part, "loaded" with the worker's count of loads
              the numbers are in a staging buffer (staging.py)
    sleep                                        ->  "ok": the device's memory is free until the next weights

and what goes wrong comes back as "error" with the worker's traceback. Messages are pickles: the connection is an
inherited file descriptor, which nobody else has. With tensor parallelism the children of several trainers are one
engine: each gets the same messages, and whole weights of which vLLM keeps its slice.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import meeting
from .staging import Staging

if TYPE_CHECKING:
    from vllm import LLM

HEARTBEAT_S = 5.0
PR_SET_PDEATHSIG = 1  # of prctl(2)


@dataclass(frozen=True)
class VLLMOptions:
    """model: Hugging Face folder or hub name; eos_ids: what ends a completion; max_model_len: prompt and completion.

    dtype: "float32" or "bfloat16". device: "cpu" or "cuda". gpu: which one. gpu_memory: share of the GPU's memory for
    weights and cache. cache_mb: size of the key-value cache, 0: what gpu_memory leaves (on a CPU 512). max_rows:
    completions at once. tensor_parallel_size: children that are one engine; tensor_parallel_rank: this one's place.
    """

    model: str
    eos_ids: tuple[int, ...]
    max_model_len: int
    dtype: str = "bfloat16"
    device: str = "cuda"
    gpu: int = 0
    gpu_memory: float = 0.4
    cache_mb: int = 0
    max_rows: int = 512
    tensor_parallel_size: int = 1
    tensor_parallel_rank: int = 0


def send(connection: Connection, *message: Any) -> None:
    connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> tuple[Any, ...]:
    return pickle.loads(connection.recv_bytes())


def start_engine(options: VLLMOptions) -> LLM:
    """vLLM in this process, its weights still those of the model's files."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    on_cpu = options.device == "cpu"
    if options.tensor_parallel_size > 1:
        join_group("gloo" if on_cpu else "nccl")
    if on_cpu and options.tensor_parallel_size > 1:
        name_shared_memory()
    cache_mb = options.cache_mb or (512 if on_cpu else 0)
    more: dict[str, Any] = {"kv_cache_memory_bytes": cache_mb << 20} if cache_mb else {}
    return LLM(
        model=options.model,
        dtype=options.dtype,
        skip_tokenizer_init=True,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_rows,
        gpu_memory_utilization=options.gpu_memory,
        enable_prefix_caching=True,  # the rows of a group share their prompt
        enable_sleep_mode=not on_cpu,
        enforce_eager=on_cpu,
        logprobs_mode="processed_logprobs",  # of the distribution that is sampled from: after temperature and top_p
        tensor_parallel_size=options.tensor_parallel_size,
        distributed_executor_backend="external_launcher" if options.tensor_parallel_size > 1 else "uni",
        disable_log_stats=True,
        **more,
    )


def join_group(backend: str) -> None:
    """This process's place in its tensor-parallel group, which vLLM then finds: its environment says where it is. What
    vLLM would make of the same variables is a store that listens on all interfaces."""
    place, port = os.environ, int(os.environ["MASTER_PORT"])
    rank, size = int(place["RANK"]), int(place["WORLD_SIZE"])
    store = meeting.store(place["MASTER_ADDR"], port, size, leads=rank == 0)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def name_shared_memory() -> None:
    """Shared memory of vLLM's CPU build has the same name for every group, so that two groups on a machine meet in it,
    and what a killed one leaves there stops the next. Here the group's port is in the name, and the name goes as soon
    as all members have opened it."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as Shared

    name, start = Shared.make_group_name, Shared._init_cpu_shm

    def started(shared: Shared) -> int:
        handle: int = start(shared)
        with suppress(FileNotFoundError):
            os.unlink(f"/dev/shm/{shared.group_name}_{shared.communicator.rank}")
        return handle

    Shared.make_group_name = staticmethod(lambda group: f"luffy-{os.environ['MASTER_PORT']}{name(group).strip('/')}")
    Shared._init_cpu_shm = started


class Worker:
    """One vLLM engine, or one of several that are one, that answers its trainer. staging: handle of the buffer."""

    def __init__(self, options: VLLMOptions, staging: bytes) -> None:
        self.options = options
        self.llm = start_engine(options)
        self.staging = Staging.opened(staging)
        self.loads = 0
        self.asleep = False

    def answer(self, connection: Connection) -> None:
        """Does what comes over the connection until it is closed."""
        while True:
            try:
                word, *arguments = receive(connection)
            except (EOFError, ConnectionResetError):
                return
            try:
                getattr(self, word)(connection, *arguments)
            except (BrokenPipeError, ConnectionResetError):
                return  # the trainer is gone
            except BaseException:
                with suppress(OSError):
                    send(connection, "error", traceback.format_exc())
                raise

    def sample(
        self, connection: Connection, prompts: list[tuple[list[int], int, int]], parameters: dict[str, Any]
    ) -> None:
        """prompts: token ids, seed and window of each completion; parameters: those of vLLM's SamplingParams."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        for i, (ids, seed, window) in enumerate(prompts):
            settings = SamplingParams(
                **parameters, seed=seed, max_tokens=window, logprobs=0, flat_logprobs=True, detokenize=False,
                ignore_eos=True, stop_token_ids=list(self.options.eos_ids), output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
            engine.add_request(str(i), {"prompt_token_ids": ids}, settings)
        spoken = time.monotonic()
        while engine.has_unfinished_requests():
            finished = []
            for output in engine.step():
                completion = output.outputs[0]
                logprobs = list(completion.logprobs.logprobs)
                row = int(output.request_id), list(completion.token_ids), logprobs, completion.finish_reason
                finished.append(row)
            if finished or time.monotonic() - spoken > HEARTBEAT_S:
                send(connection, *(("rollouts", finished) if finished else ("alive",)))
                spoken = time.monotonic()
        send(connection, "done", self.loads)

    def weights(self, connection: Connection) -> None:
        """Loads the weights that follow. In this order: room for weights, weights, room for the cache, and an empty
        cache, because what it holds of prompts was computed with the weights before."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])

        def incoming() -> Iterator[tuple[str, Tensor]]:
            while (message := receive(connection)) != (None,):
                name, shape, dtype = message
                whole = torch.empty(shape, dtype=dtype, device=self.options.device)
                for part in self.staging.parts(whole):
                    receive(connection)
                    self.staging.read(part)
                    send(connection, "ok")
                yield name, whole

        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": incoming()})
        if self.options.device == "cpu":
            self.llm.apply_model(repack_head)
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self.llm.reset_prefix_cache()
        self.loads += 1
        send(connection, "loaded", self.loads)

    def sleep(self, connection: Connection) -> None:
        if self.options.device != "cpu" and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True
        send(connection, "ok")


def repack_head(model: Any) -> None:
    """A head that shares the embedding's weight has a packed copy of it on a CPU, which reloading leaves as it was."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    if model.config.tie_word_embeddings:
        dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)


def main() -> None:
    """The trainer's child. Arguments: the connection's inherited file descriptor, and the trainer's process id."""
    if sys.platform == "linux":  # also while it starts, which takes minutes, it must not outlive its trainer
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[2]):  # the trainer ended during the imports above, before the signal was asked for
        sys.exit()
    connection = Connection(int(sys.argv[1]))
    options, staging = receive(connection)
    try:
        worker = Worker(options, staging)
    except BaseException:
        send(connection, "error", traceback.format_exc())
        raise
    send(connection, "ready")
    worker.answer(connection)


if __name__ == "__main__":
    main()
