"""A sampler that drives a transformers model with its own key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import SamplerError
from ..model.logprobs import Head
from .decoder import make_decoder
from .protocol import Rollout, SamplingParams, SamplingRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


KEPT = 0.8  # of a batch's rows; if fewer are still running, the others are dropped


class TransformersSampler:
    """Samples from a Hugging Face causal language model on the device where it is.

    The batch shares one prefill per distinct prompt, and rows that have finished are dropped. `max_rows` bounds how
    many completions are in the cache at once. The model, one that `prepare` (model/logprobs.py) has accepted, is used
    in the weights it has at the time of the call; copied: it is not the policy itself, and `load_weights` fills it.
    Raises ValueError for another.
    """

    def __init__(
        self, model: PreTrainedModel, *, eos_ids: Sequence[int], pad_id: int, max_rows: int = 512, copied: bool = False
    ) -> None:
        if not isinstance(model.get_output_embeddings(), Head):
            raise ValueError(f"this {type(model).__name__} is not prepared for sampling: see model.logprobs.prepare")
        self.model = model
        self.eos_ids = frozenset(eos_ids)
        self.pad_id = pad_id
        self.max_rows = max_rows
        self.copied = copied

    def sample(self, requests: Sequence[SamplingRequest], params: SamplingParams) -> Iterator[tuple[int, Rollout]]:
        # Rows of one prompt stay together, so that they share a prefill; similar lengths mean little padding.
        prompts = [tuple(request.prompt_ids.tolist()) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (len(prompts[i]), prompts[i]))
        for start in range(0, len(order), self.max_rows):
            indices = order[start : start + self.max_rows]
            chosen = [requests[i] for i in indices]
            for row, rollout in self._sample_batch(chosen, [prompts[i] for i in indices], params):
                yield indices[row], rollout

    @torch.no_grad()
    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        if self.copied:
            own = dict(self.model.named_parameters())
            for name, tensor in weights:
                own[name].copy_(tensor)

    def sleep(self) -> None:
        pass

    def restart(self) -> None:
        raise SamplerError("a sampler in the trainer's own process cannot be restarted")

    def close(self) -> None:
        pass

    @torch.no_grad()
    def _sample_batch(
        self, requests: list[SamplingRequest], prompts: list[tuple[int, ...]], params: SamplingParams
    ) -> Iterator[tuple[int, Rollout]]:
        device = self.model.device
        limits = [params.max_new_tokens - request.used for request in requests]
        longest = max(limits)
        uniforms = torch.from_numpy(np.stack([_uniforms(request, params, longest) for request in requests])).to(device)
        hidden, layers, visible, positions = self._prefill(prompts)
        decoder = make_decoder(self.model, layers, visible, longest)
        del layers  # the decoder has copies with room for more
        tokens = torch.empty(len(requests), longest, dtype=torch.long, device=device)
        logprobs = torch.empty(len(requests), longest, device=device)
        rows = list(range(len(requests)))  # the request of each of the decoder's rows
        at = torch.arange(len(requests), device=device)  # the same on the device
        running = [True] * len(rows)  # which of them have not ended
        for t in range(longest):
            logits = self.model.get_output_embeddings()(hidden).float()
            picked, logp = _pick(logits, uniforms[at, t], params.temperature, params.top_p)
            tokens[at, t], logprobs[at, t] = picked, logp
            for place, (row, token) in enumerate(zip(rows, picked.tolist(), strict=True)):
                if running[place] and (token in self.eos_ids or limits[row] == t + 1):
                    running[place] = False
                    ids = tokens[row, : t + 1].cpu().numpy().astype(np.int32)
                    yield row, Rollout(ids, logprobs[row, : t + 1].cpu().numpy(), token not in self.eos_ids)
            if not any(running):
                return
            # Dropping costs a copy of the cache, a finished row costs its share of every step that follows.
            if sum(running) <= KEPT * len(rows):
                left = [place for place, on in enumerate(running) if on]
                chosen = torch.tensor(left, device=device)
                decoder.keep(chosen)
                positions, picked, at = positions[chosen], picked[chosen], at[chosen]
                rows, running = [rows[place] for place in left], [True] * len(left)
            positions = positions + 1
            hidden = decoder.step(picked, positions)

    def _prefill(self, requests: list[tuple[int, ...]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor, Tensor]:
        """Runs each distinct prompt once. Returns, a row per request: last hidden state, keys and values of each layer,
        which of these places a row sees, and the position of its last token."""
        device = self.model.device
        prompts = list(dict.fromkeys(requests))
        places = {prompt: i for i, prompt in enumerate(prompts)}
        source = torch.tensor([places[prompt] for prompt in requests], device=device)
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        padding = torch.tensor([width - len(p) for p in prompts], device=device)
        real = torch.arange(width, device=device)[None] >= padding[:, None]
        positions = (torch.arange(width, device=device)[None] - padding[:, None]).clamp(min=0)
        output = self.model.base_model(
            input_ids=ids, attention_mask=real.long(), position_ids=positions, use_cache=True
        )
        layers = [(layer.keys[source], layer.values[source]) for layer in output.past_key_values.layers]
        return output.last_hidden_state[source, -1], layers, real[source], positions[source, -1]


def _uniforms(request: SamplingRequest, params: SamplingParams, count: int) -> np.ndarray:
    """The random numbers of a row."""
    key = [params.seed, params.step, request.prompt_index, request.generation_index]
    return np.random.default_rng(key).random(count)


def _pick(logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the distribution function at `uniform` (rows,), and its log-prob."""
    if temperature == 0:
        logps = logits.log_softmax(-1)
        picked = logits.argmax(-1, keepdim=True)
    else:
        logits = logits / temperature
        if top_p < 1:
            ranked, tokens = logits.sort(-1, descending=True)
            probs = ranked.double().softmax(-1)
            outside = probs.cumsum(-1) - probs >= top_p  # the tokens before it are enough
            logits = logits.masked_fill(outside.gather(-1, tokens.argsort(-1)), float("-inf"))
        logps = logits.log_softmax(-1)
        # summed in float64: in float32 the running sum over a large vocabulary loses its rare tokens
        cumulative = logps.exp().cumsum(-1, dtype=torch.float64)
        picked = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
        picked = picked.clamp_(max=logits.shape[-1] - 1)
    return picked.squeeze(-1), logps.gather(-1, picked).squeeze(-1)
