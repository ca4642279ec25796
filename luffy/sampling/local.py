"""A sampler that drives a transformers model with its own key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

from ..errors import ConfigError, SamplerError
from .protocol import Rollout, SamplingParams, SamplingRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _RoomyLayer(DynamicLayer):
    """A cache layer that writes into room allocated beforehand, where the stock one concatenates at every token."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        rows, heads, self.length, dim = keys.shape
        self.key_room = keys.new_empty(rows, heads, self.length + room, dim)
        self.value_room = values.new_empty(rows, heads, self.length + room, values.shape[-1])
        self.key_room[:, :, : self.length] = keys
        self.value_room[:, :, : self.length] = values
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        self.key_room[:, :, self.length : end] = key_states
        self.value_room[:, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = self.key_room[:, :, :end], self.value_room[:, :, :end]
        return self.keys, self.values

    def keep(self, rows: Tensor) -> None:
        self.key_room, self.value_room = self.key_room[rows], self.value_room[rows]


def _grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """sdpa for one new token a row, which does not copy a key head for every query head that shares it.

    transformers' own makes these copies wherever there is a mask. That suits CUDA, whose fast kernels take no grouped
    heads with a mask; on a CPU the copies cost several times the attention itself.
    """
    output = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("luffy_grouped", _grouped_attention)
AttentionMaskInterface.register("luffy_grouped", sdpa_mask)


@contextmanager
def _decoding(model: PreTrainedModel) -> Iterator[None]:
    """Around the forward pass of one new token a row."""
    usual = model.config._attn_implementation
    model.config._attn_implementation = "luffy_grouped" if model.device.type == "cpu" else usual
    try:
        yield
    finally:
        model.config._attn_implementation = usual


class TransformersSampler:
    """Samples from a Hugging Face causal language model on the device where it is.

    The batch shares one prefill per distinct prompt, and rows that have finished are dropped. `max_rows` bounds how
    many completions are in the cache at once. The model is used in the weights it has at the time of the call.
    Raises ConfigError for a model with sliding-window attention, whose mask this loop does not build.
    """

    def __init__(self, model: PreTrainedModel, *, eos_ids: Sequence[int], pad_id: int, max_rows: int = 512) -> None:
        config = model.config
        layer_types = getattr(config, "layer_types", None) or ["full_attention"]
        if set(layer_types) != {"full_attention"} or getattr(config, "sliding_window", None):
            raise ConfigError(
                f"{type(model).__name__} has sliding-window or other attention that is not full, which sampler "
                "transformers does not do"
            )
        self.model = model
        self.eos_ids = frozenset(eos_ids)
        self.pad_id = pad_id
        self.max_rows = max_rows

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
        own = dict(self.model.named_parameters())
        for name, tensor in weights:
            if own[name].data_ptr() != tensor.data_ptr():  # it may well be the policy's own model
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
        eos_ids = torch.tensor(sorted(self.eos_ids), device=device)
        limits = torch.tensor([params.max_new_tokens - request.used for request in requests], device=device)
        longest = int(limits.max())
        uniforms = torch.from_numpy(
            np.stack(
                [
                    np.random.default_rng([params.seed, params.step, r.prompt_index, r.generation_index]).random(
                        longest
                    )
                    for r in requests
                ]
            )
        ).to(device)
        hidden, layers, visible, positions = self._prefill(prompts, longest)
        cache = Cache(layers=list(layers))
        length = visible.shape[1] - longest
        tokens = torch.empty(len(requests), longest, dtype=torch.long, device=device)
        logprobs = torch.empty(len(requests), longest, device=device)
        rows = torch.arange(len(requests), device=device)  # which request each row of the cache belongs to
        running = torch.ones_like(rows, dtype=torch.bool)
        for t in range(longest):
            logits = self.model.get_output_embeddings()(hidden).float()
            picked, logp = _pick(logits, uniforms[rows, t], params.temperature, params.top_p)
            tokens[rows, t], logprobs[rows, t] = picked, logp
            ended = (torch.isin(picked, eos_ids) | (limits[rows] == t + 1)) & running
            running &= ~ended
            for row in rows[ended].tolist():
                ids = tokens[row, : t + 1].cpu().numpy().astype(np.int32)
                yield row, Rollout(ids, logprobs[row, : t + 1].cpu().numpy(), int(ids[-1]) not in self.eos_ids)
            alive = int(running.sum())
            if not alive:
                return
            # Dropping costs a copy of the cache, a finished row costs its share of every step that follows.
            if alive <= 0.8 * len(rows):
                for layer in layers:
                    layer.keep(running)
                visible, positions, picked, rows = visible[running], positions[running], picked[running], rows[running]
                running = running[running]
            length += 1
            positions = positions + 1
            with _decoding(self.model):
                hidden = self.model.base_model(
                    input_ids=picked[:, None],
                    attention_mask=visible[:, None, None, :length],
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state[:, -1]

    def _prefill(
        self, requests: list[tuple[int, ...]], max_new_tokens: int
    ) -> tuple[Tensor, list[_RoomyLayer], Tensor, Tensor]:
        """Runs each distinct prompt once. Returns, a row per request: last hidden state, cache layers, which cache
        entries a row sees (later ones are its own, hence visible), and the position of its last token."""
        device = self.model.device
        prompts = list(dict.fromkeys(requests))
        source = torch.tensor([prompts.index(prompt) for prompt in requests], device=device)
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        padding = torch.tensor([width - len(p) for p in prompts], device=device)
        real = torch.arange(width, device=device)[None] >= padding[:, None]
        positions = (torch.arange(width, device=device)[None] - padding[:, None]).clamp(min=0)
        output = self.model.base_model(
            input_ids=ids, attention_mask=real.long(), position_ids=positions, use_cache=True
        )
        layers = [
            _RoomyLayer(layer.keys[source], layer.values[source], max_new_tokens)
            for layer in output.past_key_values.layers
        ]
        visible = torch.cat([real, real.new_ones(len(prompts), max_new_tokens)], 1)[source]
        return output.last_hidden_state[source, -1], layers, visible, positions[source, -1:]


def _pick(logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the distribution function at `uniform` (rows,), and its log-prob."""
    if temperature == 0:
        picked = logits.argmax(-1)
    else:
        logits = logits / temperature
        if top_p < 1:
            ranked, tokens = logits.sort(-1, descending=True)
            probs = ranked.double().softmax(-1)
            outside = probs.cumsum(-1) - probs >= top_p  # the tokens before it are enough
            logits = logits.masked_fill(outside.gather(-1, tokens.argsort(-1)), float("-inf"))
        # float64: in float32 the running sum over a large vocabulary loses its rare tokens
        cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
        picked = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).squeeze(-1)
        picked = picked.clamp(max=logits.shape[-1] - 1)
    return picked, logits.log_softmax(-1).gather(-1, picked[:, None]).squeeze(-1)
