"""What the trainer and the evaluation need of a generator of completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How completions are sampled.

    max_new_tokens: window of a completion in tokens. temperature 0 is greedy decoding (log-probs then at temperature
    1). top_p below 1 samples from the smallest set of tokens with at least that probability. seed, step: what the
    random numbers derive from, beside the request's indices.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    step: int = 0


@dataclass(frozen=True)
class SamplingRequest:
    """One completion to be sampled behind prompt_ids, (P,) int32. The two indices name it for the random numbers,
    nothing else. used: how many of the prompt's last tokens count towards the window: a prefix of the completion."""

    prompt_ids: np.ndarray
    prompt_index: int
    generation_index: int
    used: int = 0


@dataclass(frozen=True)
class Rollout:
    """A sampled completion: its tokens, (n,) int32 (the EOS included, if it came), and their log-probs under the
    sampler, (n,) float32.

    The log-probs are those of the distribution that was sampled from, i.e. after temperature and top_p.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    truncated: bool


class Sampler(Protocol):
    """Generates completions. A row's random numbers derive from (seed, step, prompt index, generation index) alone."""

    def sample(self, requests: Sequence[SamplingRequest], params: SamplingParams) -> Iterator[tuple[int, Rollout]]:
        """Yields (index into requests, rollout) as completions finish, each index once, in any order."""
        ...

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Takes the policy's weights, by their Hugging Face names, if it samples from a copy of them."""
        ...

    def sleep(self) -> None:
        """Frees the device, if it can, until the next load_weights."""
        ...

    def restart(self) -> None:
        """Starts again after a SamplerError. Raises SamplerError."""
        ...

    def close(self) -> None: ...
