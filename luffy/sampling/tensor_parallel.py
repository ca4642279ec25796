"""One vLLM engine over the children of several ranks, for models that are larger than a GPU.

The ranks of a group, neighbours on one machine, each keep a child; the children run vLLM's external launcher: engines
that are given the same requests in the same order do the same, each on its slice of the model. The group's first rank
leads: it alone collects, verifies and keeps rows, and passes its requests on; the others follow. Each rank hands whole
weights to its own child.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

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

    @property
    def leads(self) -> bool:
        return self.group.first

    def sample(self, requests: Sequence[SamplingRequest], params: SamplingParams) -> Iterator[tuple[int, Rollout]]:
        """As Sampler.sample; only the leader's."""
        if requests:
            self.group.broadcast((requests, params))
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
                    for _ in self.sampler.sample(*asked):
                        pass
            except SamplerError as error:
                failure = error
        if failure is not None:
            raise failure

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.sampler.load_weights(weights)

    def sleep(self) -> None:
        self.sampler.sleep()

    def restart(self) -> None:
        """All members of the group must call it."""
        self.sampler.restart()

    def close(self) -> None:
        self.sampler.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
