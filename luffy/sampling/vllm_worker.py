"""The process in which vLLM generates: the trainer's child on the same device, or a server on another.

Trainer and worker talk over one connection. What the trainer sends is a tuple of a word and its arguments:

    sample    requests and sampling parameters   ->  "rollouts" as they finish, "alive" while tokens come, "done"
    weights   then tensors, each answered "ok"   ->  "loaded" with the worker's count of loads
    sleep                                        ->  "ok": the device's memory is free until the next weights
    join      (servers only)                     ->  nothing: both go into the group that weights are sent through

and what goes wrong comes back as "error" with the worker's traceback. Messages are pickles, so a connection is only
made with one's own child or, over the network, with whoever knows the key. A weight goes to a child as a handle to the
trainer's GPU memory (on a CPU as a copy), to a server through a process group of its own: NCCL, or gloo on CPUs.

`luffy serve --model M --address HOST:PORT` starts a server (see `serve`).
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge  # type: ignore[attr-defined]
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from vllm import LLM

HEARTBEAT_S = 5.0
JOIN_TIMEOUT = timedelta(minutes=5)
CHALLENGE_S = 5.0


@dataclass(frozen=True)
class VLLMOptions:
    """model: Hugging Face folder or hub name; eos_ids: what ends a completion; max_model_len: prompt and completion.

    dtype: "float32" or "bfloat16". device: "cpu" or "cuda". gpu: which one, of a child. gpu_memory: share of the GPU's
    memory for weights and cache. cache_mb: size of the key-value cache, 0: what gpu_memory leaves (on a CPU 512).
    max_rows: completions at once.
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


def send(connection: Connection, *message: Any) -> None:
    connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> tuple[Any, ...]:
    return pickle.loads(connection.recv_bytes())


def pack_tensor(tensor: Tensor) -> bytes:
    """A weight as a message to a process on the same device."""
    if tensor.is_cuda:
        return bytes(ForkingPickler.dumps(torch.multiprocessing.reductions.reduce_tensor(tensor)))
    return pickle.dumps(tensor.clone())  # of a view, its whole storage would be pickled


def unpack_tensor(data: bytes) -> Tensor:
    value = pickle.loads(data)
    if isinstance(value, Tensor):
        return value
    rebuild, arguments = value
    # The sender's number of the GPU (the seventh argument), where this process sees one GPU only.
    return rebuild(*arguments[:6], torch.cuda.current_device(), *arguments[7:])


class WeightGroup:
    """A trainer (rank 0) and a server (rank 1) between which tensors go, beside whatever groups either is in."""

    def __init__(self, store: dist.Store, rank: int, device: str) -> None:
        if device == "cuda":
            self.group: Any = dist.ProcessGroupNCCL(store, rank, 2, dist.ProcessGroupNCCL.Options())
        else:
            self.group = dist.ProcessGroupGloo(store, rank, 2, JOIN_TIMEOUT)

    def send(self, tensor: Tensor) -> Tensor:
        """Fills the server's tensor with the trainer's."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self.group.broadcast([tensor], options).wait()
        return tensor


def start_engine(options: VLLMOptions) -> LLM:
    """vLLM in this process, its weights still those of the model's files."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    on_cpu = options.device == "cpu"
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
        distributed_executor_backend="uni",
        disable_log_stats=True,
        **more,
    )


class Worker:
    """One vLLM engine that answers one trainer at a time."""

    def __init__(self, options: VLLMOptions) -> None:
        self.options = options
        self.llm = start_engine(options)
        self.store: dist.TCPStore | None = None
        self.group: WeightGroup | None = None
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

        engine = self.llm.llm_engine
        for i, (ids, seed, window) in enumerate(prompts):
            settings = SamplingParams(
                **parameters, seed=seed, max_tokens=window, logprobs=0, flat_logprobs=True, detokenize=False,
                ignore_eos=True, stop_token_ids=list(self.options.eos_ids),
            )  # fmt: skip
            engine.add_request(str(i), {"prompt_token_ids": ids}, settings)
        spoken = time.monotonic()
        open_ids = {str(i) for i in range(len(prompts))}
        try:
            while engine.has_unfinished_requests():
                outputs = engine.step()
                finished = []
                for output in outputs:
                    if output.finished:
                        open_ids.discard(output.request_id)
                        completion = output.outputs[0]
                        logprobs = list(completion.logprobs.logprobs)
                        row = int(output.request_id), list(completion.token_ids), logprobs, completion.finish_reason
                        finished.append(row)
                if finished:
                    send(connection, "rollouts", finished)
                    spoken = time.monotonic()
                elif outputs and time.monotonic() - spoken > HEARTBEAT_S:
                    send(connection, "alive")
                    spoken = time.monotonic()
        finally:
            if open_ids:  # the next trainer must not get what this one has asked for
                engine.abort_request(sorted(open_ids))
        send(connection, "done", self.loads)

    def weights(self, connection: Connection) -> None:
        """Loads the weights that follow. In this order: room for weights, weights, room for the cache, and an empty
        cache, because what it holds of prompts was computed with the weights before."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])

        def incoming() -> Iterator[tuple[str, Tensor]]:
            while (name := (message := receive(connection))[0]) is not None:
                if self.group is None:
                    yield name, unpack_tensor(message[1])
                else:
                    shape, dtype = message[1:]
                    yield name, self.group.send(torch.empty(shape, dtype=dtype, device=self.options.device))
                send(connection, "ok")

        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": incoming()})
        if self.options.device == "cpu":
            self.llm.apply_model(_repack_head)
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self.llm.reset_prefix_cache()
        self.loads += 1
        send(connection, "loaded", self.loads)

    def join(self, connection: Connection) -> None:
        assert self.store is not None
        self.group = WeightGroup(self.store, 1, self.options.device)

    def sleep(self, connection: Connection) -> None:
        if self.options.device != "cpu" and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True
        send(connection, "ok")


def _repack_head(model: Any) -> None:
    """A head that shares the embedding's weight has a packed copy of it on a CPU, which reloading leaves as it was."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    if model.config.tie_word_embeddings:
        dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)


def serve(options: VLLMOptions, host: str, port: int, key: bytes) -> None:
    """Answers trainers that know the key, one after the other, until the process is ended or the engine fails."""
    worker = Worker(options)
    with socket.create_server((host, port)) as listener:
        print(f"vLLM with {options.model} at {host}:{listener.getsockname()[1]}", flush=True)
        while True:
            opened, _ = listener.accept()
            set_timeout(opened, socket.SO_RCVTIMEO, CHALLENGE_S)
            connection = Connection(os.dup(opened.fileno()))
            try:
                deliver_challenge(connection, key)
                answer_challenge(connection, key)
            except (AuthenticationError, EOFError, OSError) as error:
                print(f"a connection was refused: {error}", flush=True)
                connection.close()
                continue
            finally:
                set_timeout(opened, socket.SO_RCVTIMEO, 0)
                opened.close()
            with connection:
                worker.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
                send(connection, "ready", {**asdict(options), "store": worker.store.port, "loads": worker.loads})
                worker.answer(connection)


def main() -> None:
    """The trainer's child: the connection is an inherited file descriptor, and the options come over it."""
    connection = Connection(int(sys.argv[1]))
    (options,) = receive(connection)
    try:
        worker = Worker(options)
    except BaseException:
        send(connection, "error", traceback.format_exc())
        raise
    send(connection, "ready", {**asdict(options), "store": None, "loads": 0})
    worker.answer(connection)


def set_timeout(opened: socket.socket, what: int, seconds: float) -> None:
    """Has reading from a socket (SO_RCVTIMEO) or writing to it (SO_SNDTIMEO) fail after so many seconds; 0: never.

    Python's own time-outs would make the descriptor non-blocking, which a Connection does not understand.
    """
    opened.setsockopt(socket.SOL_SOCKET, what, struct.pack("ll", int(seconds), 0))


if __name__ == "__main__":
    main()
