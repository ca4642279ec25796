"""The Sampler protocol on vLLM, in a child process on the trainer's device, which can be killed.

The child sleeps while the policy is updated. Its weights are the trainer's: `load_weights` sends them, from memory to
memory, and every answer says how many loads it was made with, so that a sampler that has missed one is an error. All
completions of a step go in one call, and vLLM batches them as they come and go; each has its own seed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SamplerError
from . import meeting
from .protocol import Rollout, SamplingParams, SamplingRequest
from .staging import Staging
from .vllm_worker import VLLMOptions, receive, send

log = logging.getLogger(__name__)

START_TIMEOUT_S = 1800.0  # a large model on a slow disk
# What a launcher says about this process among the ranks, which vLLM would take for its own place.
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class VLLMSampler:
    """Samples with vLLM. Options as in VLLMOptions; timeout_s: how long the process may say nothing while it works.

    meet: with tensor parallelism, a port at which the children of a group find each other, the same for all its
    members; called at every start, by all of them together. Raises SamplerError if vLLM does not start.
    """

    def __init__(self, options: VLLMOptions, *, timeout_s: float = 600.0, meet: Callable[[], int] = lambda: 0) -> None:
        self.options = options
        self.timeout_s = timeout_s
        self.meet = meet
        self.child: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Starts the child; one that was there before is ended."""
        self.close()
        port = self.meet()
        gpu = self.options.gpu if self.options.device == "cuda" else None
        ours, theirs = socket.socketpair()
        set_timeout(ours, self.timeout_s)
        self.connection = Connection(ours.detach())
        self.staging = Staging(torch.device("cpu" if gpu is None else f"cuda:{gpu}"))
        with theirs:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "luffy.sampling.vllm_worker", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=child_environment(self.options, port),
            )
        self._send(self.options, self.staging.handle)
        self._expect("ready", timeout_s=START_TIMEOUT_S)
        self.loads = 0

    def restart(self) -> None:
        """A new process in the place of one that failed; it has no weights of the policy yet."""
        log.warning("the sampler's process is started again")
        self.start()

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Sends the policy's weights. Raises SamplerError."""
        try:
            self._send("weights")
            for name, tensor in weights:
                self._send(name, tuple(tensor.shape), tensor.dtype)
                for part in self.staging.parts(tensor.contiguous()):
                    self.staging.write(part)
                    self._send("written")
                    self._expect("ok")
            self._send(None)
            (loads,) = self._expect("loaded")
        except SamplerError:
            for _ in weights:  # other ranks may be waiting for this one to go through them
                pass
            raise
        self.loads += 1
        if loads != self.loads:
            raise SamplerError(f"the sampler has loaded weights {loads} times, not {self.loads}")

    def sleep(self) -> None:
        """Frees the device for the update; the next load_weights wakes it."""
        self._send("sleep")
        self._expect("ok")

    def sample(self, requests: Sequence[SamplingRequest], params: SamplingParams) -> Iterator[tuple[int, Rollout]]:
        """As Sampler.sample. Raises SamplerError."""
        if not requests:
            return
        prompts = [
            (request.prompt_ids.tolist(), request_seed(params, request), params.max_new_tokens - request.used)
            for request in requests
        ]
        self._send("sample", prompts, {"temperature": params.temperature, "top_p": params.top_p, "n": 1})
        missing = set(range(len(requests)))
        while True:
            word, *content = self._receive(self.timeout_s)
            if word == "done":
                if missing:
                    raise SamplerError(f"the sampler left out {len(missing)} of {len(requests)} completions")
                if content[0] != self.loads:
                    raise SamplerError(f"the sampler answered with weights {content[0]}, not {self.loads}")
                return
            for i, ids, logprobs, reason in content[0] if word == "rollouts" else ():
                if i not in missing or reason not in ("stop", "length") or not ids:
                    raise SamplerError(f"completion {i} came twice, unasked for or unfinished ({reason})")
                missing.remove(i)
                tokens, known = np.asarray(ids, np.int32), np.asarray(logprobs, np.float32)
                yield i, Rollout(tokens, known, truncated=reason == "length")

    def close(self) -> None:
        """Ends the child."""
        if self.child is not None:
            self.connection.close()
            self.staging.close()
            self.child.kill()
            self.child.wait()
            self.child = None

    def _send(self, *message: Any) -> None:
        try:
            send(self.connection, *message)
        except OSError as error:
            raise SamplerError(f"the sampler's process is gone: {self._end()}") from error

    def _expect(self, word: str, *, timeout_s: float | None = None) -> list[Any]:
        got, *content = self._receive(timeout_s or self.timeout_s)
        if got != word:
            raise SamplerError(f"the sampler's process answered {got!r} where {word!r} was due")
        return content

    def _receive(self, timeout_s: float) -> tuple[Any, ...]:
        deadline = time.monotonic() + timeout_s
        try:
            while not self.connection.poll(min(1.0, timeout_s)):
                if time.monotonic() > deadline:
                    raise SamplerError(f"the sampler's process has said nothing for {timeout_s:.0f} s")
            message = receive(self.connection)
        except (EOFError, OSError) as error:
            raise SamplerError(f"the sampler's process is gone: {self._end()}") from error
        if message[0] == "error":
            raise SamplerError(f"the sampler's process failed:\n{message[1]}")
        return message

    def _end(self) -> str:
        assert self.child is not None
        try:
            return f"exit code {self.child.wait(timeout=10)}"
        except subprocess.TimeoutExpired:
            return "it has closed the connection"


def request_seed(params: SamplingParams, request: SamplingRequest) -> int:
    """The seed of one completion, from what names it alone."""
    key = f"{params.seed}/{params.step}/{request.prompt_index}/{request.generation_index}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1


def child_environment(options: VLLMOptions, port: int = 0) -> dict[str, str]:
    """This process's environment for its child, with the GPUs of the child's tensor-parallel group and its place there
    instead of this process's among the ranks. It has a compile cache of its own, which several children would otherwise
    write at the same time."""
    size, place = options.tensor_parallel_size, options.tensor_parallel_rank
    environment = meeting.LOOPBACK | {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHERS and not name.startswith("TORCHELASTIC_")
    }
    cache = Path(os.environ.get("VLLM_CACHE_ROOT", "~/.cache/vllm")).expanduser()
    environment |= {"TQDM_DISABLE": "1", "VLLM_CACHE_ROOT": str(cache / f"rank{os.environ.get('LOCAL_RANK', 0)}")}
    if options.device == "cuda":
        first = options.gpu - place
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        numbers = visible.split(",") if visible else [str(i) for i in range(first + size)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(numbers[first : first + size])
    if size > 1:
        environment |= {"RANK": str(place), "LOCAL_RANK": str(place), "WORLD_SIZE": str(size)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return environment


def set_timeout(opened: socket.socket, seconds: float) -> None:
    """Has writing to a socket fail after so many seconds. Python's own time-outs would make the descriptor
    non-blocking, which a Connection does not understand."""
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), 0))
