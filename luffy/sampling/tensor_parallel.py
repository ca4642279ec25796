"""One vLLM engine over the children of several ranks, for models that are larger than a GPU.

The ranks of a group, neighbours on one machine, each keep a child; the children run vLLM's external launcher: engines
that are given the same requests in the same order do the same, each on its slice of the model. The group's first rank
leads: it alone collects, verifies and keeps rows, and passes its requests on; the others follow. Each rank hands whole
weights to its own child.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from torch import Tensor

from ..errors import SamplerError
from .protocol import Rollout, SamplingParams, SamplingRequest
from .ranks import Ranks
from .vllm_sampler import VLLMOptions, VLLMSampler


class TensorParallelSampler:
    """A rank's part of the group. The leader's is used as any Sampler; a follower's `follow` answers all its calls of
    `sample` until the leader calls `release`."""

    def __init__(self, options: VLLMOptions, group: Ranks, *, timeout_s: float) -> None:
        self.group = group
        self.sampler = VLLMSampler(options, timeout_s=timeout_s, meet=lambda: group.broadcast(free_port()))
        self._find_children()

    def _find_children(self) -> None:
        """Descriptors of the group's children, which are one engine as long as all of them are there."""
        assert self.sampler.child is not None
        self.children = [os.pidfd_open(pid) for pid in self.group.gather(self.sampler.child.pid)]

    @contextmanager
    def _as_one(self) -> Iterator[None]:
        """When a child has failed, the others wait for it, without end, and their ranks for them: all are ended."""
        try:
            yield
        except SamplerError:
            for child in self.children:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(child, signal.SIGKILL)
            raise

    @property
    def leads(self) -> bool:
        return self.group.first

    def sample(self, requests: Sequence[SamplingRequest], params: SamplingParams) -> Iterator[tuple[int, Rollout]]:
        """As Sampler.sample; only the leader's."""
        if requests:
            self.group.broadcast((requests, params))
            with self._as_one():
                yield from self.sampler.sample(requests, params)

    def release(self) -> None:
        """The leader has no more requests: the followers may go on."""
        self.group.broadcast(None)

    def follow(self) -> None:
        """Has the own child take part in what the leader samples, and drops the rows: they are the leader's too.
        Raises SamplerError at the end, if the child has failed."""
        failure: SamplerError | None = None
        while (asked := self.group.broadcast(None)) is not None:
            try:
                if failure is None:
                    with self._as_one():
                        for _ in self.sampler.sample(*asked):
                            pass
            except SamplerError as error:
                failure = error
        if failure is not None:
            raise failure

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        with self._as_one():
            self.sampler.load_weights(weights)

    def sleep(self) -> None:
        with self._as_one():
            self.sampler.sleep()

    def restart(self) -> None:
        """All members of the group must call it."""
        self._forget_children()
        self.sampler.restart()
        self._find_children()

    def close(self) -> None:
        self._forget_children()
        self.sampler.close()

    def _forget_children(self) -> None:
        for child in self.children:
            os.close(child)
        self.children = []


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
