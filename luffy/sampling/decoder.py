"""One new token a row: the part of a transformer's forward pass that sampling spends its time in.

For models built like Llama a step goes over the model's own modules with fewer and larger kernels: one product for
queries, keys and values, one for both halves of the MLP, residuals added inside products, one copy into the cache. All
other architectures take transformers' forward pass, with the same cache. Both compute what the model says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention
from transformers.cache_utils import Cache, DynamicLayer

from ..model.adapters import merged
from ..model.logprobs import rope_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIKE_LLAMA = frozenset({"llama", "mistral", "qwen2", "qwen3"})  # model types whose layers are what FusedDecoder does
TABLES = frozenset({"default", "linear", "llama3", "yarn"})  # rotary embeddings that depend on the position alone


class Decoder(Protocol):
    """The rows of a batch that is being sampled, and what their next tokens see."""

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(R, d): the last hidden states behind one more token a row, (R,) int64 at positions (R,) int64."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but those at these places, (R',) int64."""
        ...


def make_decoder(model: PreTrainedModel, layers: list[tuple[Tensor, Tensor]], visible: Tensor, room: int) -> Decoder:
    """layers: the keys and values, (R, K, W, D), of each layer's first W places; visible: (R, W) bool, which of those a
    row sees. room: how many tokens are still to come."""
    visible = torch.cat([visible, visible.new_ones(len(visible), room)], 1)
    if model.config.model_type in LIKE_LLAMA and rope_type(model) in TABLES:
        return FusedDecoder(model, layers, visible)
    return ModelDecoder(model, layers, visible)


def _roomy(states: Tensor, width: int) -> Tensor:
    """(R, K, W, D) states at the beginning of (R, K, width, D)."""
    rows, heads, filled, dim = states.shape
    wide = states.new_empty(rows, heads, width, dim)
    wide[:, :, :filled] = states
    return wide


class FusedDecoder:
    """Over the modules of a model like Llama. Its products are of copies of the weights, made at the start."""

    def __init__(self, model: PreTrainedModel, layers: list[tuple[Tensor, Tensor]], visible: Tensor) -> None:
        trunk: Any = model.base_model
        self.trunk = trunk
        self.heads, self.kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        self.length = layers[0][0].shape[2]
        mask = torch.zeros(visible.shape, dtype=model.dtype, device=model.device).masked_fill_(~visible, -torch.inf)
        self.mask = mask[:, None].expand(-1, self.kv_heads, -1).contiguous()  # (R, K, W), added to scores
        width = mask.shape[1]
        self.caches = [torch.stack([_roomy(states, width) for states in pair]) for pair in layers]  # (2, R, K, W, D)
        # what rotates queries and keys at every position: the halves of the sine's table with their signs
        cos, sin = trunk.rotary_emb(mask, torch.arange(width, device=model.device)[None])
        first, second = sin[0].chunk(2, -1)
        self.cos, self.sin = cos[0, :, None], torch.cat([-first, second], -1)[:, None]  # (W, 1, D)
        self.joined, self.outputs = [], []
        for layer in trunk.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
            self.joined.append((qkv, _joined(mlp.gate_proj, mlp.up_proj)))
            self.outputs.append((merged(attention.o_proj), merged(mlp.down_proj)))  # (no copies without adapters)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        trunk, rotated = self.trunk, self.heads + self.kv_heads
        hidden = trunk.embed_tokens(tokens)
        cos, sin = self.cos[positions], self.sin[positions]
        dim = cos.shape[-1]
        mask = self.mask.flatten(0, 1)[:, None, : self.length + 1]
        parts = zip(trunk.layers, self.caches, self.joined, self.outputs, strict=True)
        for layer, cache, (qkv, gates), (out, down) in parts:
            attention, mlp = layer.self_attn, layer.mlp
            states = linear(_norm(layer.input_layernorm, hidden), *qkv).unflatten(1, (-1, dim))
            turning = states[:, :rotated]
            if hasattr(attention, "q_norm"):
                queries, keys = turning[:, : self.heads], turning[:, self.heads :]
                turning = torch.cat([_norm(attention.q_norm, queries), _norm(attention.k_norm, keys)], 1)
            torch.addcmul(turning * cos, turning.roll(dim // 2, -1), sin, out=states[:, :rotated])
            cache[:, :, :, self.length] = states[:, self.heads :].unflatten(1, (2, -1)).transpose(0, 1)
            keys, values = cache.flatten(1, 2)[:, :, : self.length + 1]
            # query heads that share a key are the rows of one product
            queries = states[:, : self.heads].unflatten(1, (self.kv_heads, -1)).flatten(0, 1)
            seen = _attend(queries, keys, values, mask, attention.scaling)
            hidden = _add(hidden, out, attention.o_proj.bias, seen.view(len(hidden), -1))
            gate, up = linear(_norm(layer.post_attention_layernorm, hidden), *gates).chunk(2, -1)
            hidden = _add(hidden, down, mlp.down_proj.bias, mlp.act_fn(gate).mul_(up))
        self.length += 1
        return _norm(trunk.norm, hidden)

    def keep(self, rows: Tensor) -> None:
        for layer, cache in enumerate(self.caches):  # one by one: never all of them twice
            self.caches[layer] = cache.index_select(1, rows)
        self.mask = self.mask.index_select(0, rows)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """(R K, G, D): two batched products, faster on a CPU than sdpa, which in half precision keeps scores in float32."""
    if queries.dtype != torch.float32:
        return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
    scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=scaling)
    return torch.bmm(scores.softmax(-1), values)


def _norm(layer: Any, states: Tensor) -> Tensor:
    """The layer's root-mean-square norm in one call."""
    return rms_norm(states, layer.weight.shape, layer.weight, layer.variance_epsilon)


def _joined(*layers: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the linear layer that has the outputs of these one behind another."""
    biased = layers[0].bias is not None
    return torch.cat([merged(layer) for layer in layers]), torch.cat([la.bias for la in layers]) if biased else None


def _add(hidden: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor) -> Tensor:
    """hidden + the output of a linear layer."""
    if bias is not None:
        hidden = hidden + bias
    return torch.addmm(hidden, states, weight.T)


class _RoomyLayer(DynamicLayer):
    """A cache layer that writes into room allocated beforehand, where the stock one concatenates at every token."""

    def __init__(self, keys: Tensor, values: Tensor, width: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.length = keys.shape[2]
        self.key_room, self.value_room = _roomy(keys, width), _roomy(values, width)
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


class ModelDecoder:
    """By the model's own forward pass."""

    def __init__(self, model: PreTrainedModel, layers: list[tuple[Tensor, Tensor]], visible: Tensor) -> None:
        self.model, self.visible = model, visible
        self.layers = [_RoomyLayer(keys, values, visible.shape[1]) for keys, values in layers]
        self.cache = Cache(layers=list(self.layers))

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        output = self.model.base_model(
            input_ids=tokens[:, None],
            attention_mask=self.visible[:, None, None, : self.layers[0].length + 1],
            position_ids=positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]  # type: ignore[no-any-return]

    def keep(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.keep(rows)
        self.visible = self.visible[rows]
