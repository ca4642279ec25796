"""The Sampler protocol on vLLM, in a process of its own that can be killed.

The process is a child on the trainer's device, which sleeps while the policy is updated, or a server elsewhere. Its
weights are the trainer's: `load_weights` sends them, from memory to memory, and every answer says how many loads it
was made with, so that a sampler that has missed one is an error. All completions of a step go in one call, and vLLM
batches them as they come and go; each has its own seed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge  # type: ignore[attr-defined]
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from ..errors import SamplerError
from .protocol import Rollout, SamplingParams, SamplingRequest
from .vllm_worker import JOIN_TIMEOUT, VLLMOptions, WeightGroup, pack_tensor, receive, send, set_timeout

log = logging.getLogger(__name__)

START_TIMEOUT_S = 1800.0  # a large model on a slow disk
CONNECT_TIMEOUT_S = 60.0


class VLLMSampler:
    """Samples with vLLM. Options as in VLLMOptions; timeout_s: how long the process may say nothing while it works.

    address: "host:port" of a server started with `luffy serve`, whose key is in LUFFY_SERVE_KEY; None: a child.
    Raises SamplerError if it cannot be had.
    """

    def __init__(self, options: VLLMOptions, *, timeout_s: float = 600.0, address: str | None = None) -> None:
        self.options = options
        self.timeout_s = timeout_s
        self.address = address
        self.child: subprocess.Popen[bytes] | None = None
        self.group: WeightGroup | None = None
        self.start()

    def start(self) -> None:
        """Starts the child, or connects to the server; whatever was there before is ended."""
        self.close()
        if self.address is not None:
            self.connection = _connect(self.address, self.timeout_s)
        else:
            ours, theirs = socket.socketpair()
            set_timeout(ours, socket.SO_SNDTIMEO, self.timeout_s)
            self.connection = Connection(ours.detach())
            with theirs:
                self.child = subprocess.Popen(
                    [sys.executable, "-m", "luffy.sampling.vllm_worker", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=_child_environment(self.options.gpu if self.options.device == "cuda" else None),
                )
            self._send(self.options)
        (served,) = self._expect("ready", timeout_s=START_TIMEOUT_S)
        self.loads = served["loads"]
        for name in ("eos_ids", "max_model_len", "dtype", "device"):
            wanted = getattr(self.options, name)
            if served[name] != wanted:
                self.close()
                raise SamplerError(f"the server at {self.address} has {name} {served[name]}, not {wanted}")
        if self.address is not None:
            self._send("join")
            try:
                store = dist.TCPStore(self.address.rpartition(":")[0], served["store"], timeout=JOIN_TIMEOUT)
                self.group = WeightGroup(store, 0, self.options.device)
            except RuntimeError as error:
                raise SamplerError(f"no way for weights to the server at {self.address}: {error}") from error

    def restart(self) -> None:
        """A new process in the place of one that failed; it has no weights of the policy yet."""
        log.warning("the sampler's process is started again")
        self.start()

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Sends the policy's weights. Raises SamplerError."""
        try:
            self._send("weights")
            for name, tensor in weights:
                if self.group is None:
                    self._send(name, pack_tensor(tensor))
                else:
                    self._send(name, tuple(tensor.shape), tensor.dtype)
                    self.group.send(tensor.contiguous())
                self._expect("ok")  # the tensor does not outlive the next one
            self._send(None)
            (loads,) = self._expect("loaded")
        except RuntimeError as error:  # a SamplerError, or the group's, whose other end is gone
            for _ in weights:  # other ranks may be waiting for this one to go through them
                pass
            raise SamplerError(str(error)) from error
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
        """Ends the child, or the connection."""
        if hasattr(self, "connection"):
            self.connection.close()
        if self.child is not None:
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
        if self.child is None:
            return f"the server at {self.address} has closed the connection"
        try:
            return f"exit code {self.child.wait(timeout=10)}"
        except subprocess.TimeoutExpired:
            return "it has closed the connection"


def request_seed(params: SamplingParams, request: SamplingRequest) -> int:
    """The seed of one completion, from what names it alone."""
    key = f"{params.seed}/{params.step}/{request.prompt_index}/{request.generation_index}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1


def _connect(address: str, timeout_s: float) -> Connection:
    """Raises SamplerError if there is no server, it is busy with another trainer, or the key is another."""
    host, _, port = address.rpartition(":")
    key = os.environ.get("LUFFY_SERVE_KEY", "").encode()
    try:
        opened = socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S)
        opened.settimeout(None)
        set_timeout(opened, socket.SO_SNDTIMEO, timeout_s)
        connection = Connection(opened.detach())
        if not connection.poll(CONNECT_TIMEOUT_S):
            raise TimeoutError("it is busy with another trainer")
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
    except (OSError, ValueError, EOFError, AuthenticationError) as error:
        raise SamplerError(f"no vLLM server at {address}: {error or type(error).__name__}") from error
    return connection


def _child_environment(gpu: int | None) -> dict[str, str]:
    """This process's environment without its place among the ranks, which vLLM would take for its own, and with one of
    the GPUs that this process sees."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    environment |= {"TQDM_DISABLE": "1"}
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    return environment
