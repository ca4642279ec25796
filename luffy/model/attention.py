"""Attention of packed sequences, one by one: no masks, no padding, a shared prompt computed once.

A micro-batch is one row of tokens, in which several sequences may begin with the same tokens: the completions of one
prompt. All layers but attention look at each token by itself, so they see the row as it is. Attention needs whole
sequences: `Layout.expand` repeats the prompt's queries, keys and values in front of each of its completions, and
`Layout.keep` takes each token's result once. So a prompt of P tokens with G completions of n tokens costs the products
of P + G n tokens instead of G (P + n); a prompt token is the same before each completion, because it sees no further.

On CUDA in half precision the sequences go through torch's variable-length flash attention in one call. Everywhere else
they are batched by length, which is rounded up on the way: what a causal sequence has behind its end changes nothing
before it.

The attention is registered with transformers, so that a model of any architecture uses it, as `NAME`. Without a layout
it is transformers' own sdpa: the model can still be asked anything else.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "luffy_packed"
ROUNDED = 8  # lengths are rounded up to multiples of this where sequences are batched by length: fewer, larger calls


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a row of T tokens lie. E: the tokens of all sequences, each whole and rounded up.

    expand: (E,) int64, the tokens of one sequence after another. keep: (T,) int64, for each token of the row a place of
    it in `expand`. bounds: (S + 1,) int32, where each sequence begins in `expand`, and E. runs: (number of sequences,
    length) of neighbours of equal length. longest: in tokens.
    """

    expand: Tensor
    keep: Tensor
    bounds: Tensor
    runs: tuple[tuple[int, int], ...]
    longest: int

    @staticmethod
    def of(places: SequenceOf[np.ndarray], tokens: int) -> Layout:
        """From the places in the row, (L,) each, of the tokens of every sequence; `tokens`: of the whole row."""
        rounded = [-(-len(place) // ROUNDED) * ROUNDED for place in places]
        order = sorted(range(len(places)), key=rounded.__getitem__)
        # the filling is the sequence's last token again: something finite that nobody keeps
        expand = np.concatenate([np.pad(places[i], (0, rounded[i] - len(places[i])), "edge") for i in order])
        bounds = np.cumsum([0, *(rounded[i] for i in order)])
        keep = np.empty(tokens, np.int64)
        for i, start in zip(order, bounds.tolist(), strict=False):
            keep[places[i]] = np.arange(start, start + len(places[i]))
        runs = tuple((len(list(same)), length) for length, same in groupby(rounded[i] for i in order))
        return Layout(
            torch.from_numpy(expand),
            torch.from_numpy(keep),
            torch.from_numpy(bounds.astype(np.int32)),
            runs,
            max(rounded),
        )

    def to(self, device: torch.device | str) -> Layout:
        return Layout(self.expand.to(device), self.keep.to(device), self.bounds.to(device), self.runs, self.longest)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention inside each sequence of `layout`; attention_mask is not read then.

    query: (1, H, T, D); key, value: (1, K, T, D), where K divides H. Returns (1, T, H, D), and None for the weights.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    device = query.device.type
    # rotary embedding leaves queries and keys in float32 where autocast is on, values not
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    q, k, v = (states[0].transpose(0, 1).to(dtype).index_select(0, layout.expand) for states in (query, key, value))
    attend = _varlen if _flash_takes(q, v) else _by_length
    return attend(q, k, v, layout, scaling).index_select(0, layout.keep)[None], None


def _flash_takes(query: Tensor, value: Tensor) -> bool:
    """Whether the sequences can go through flash attention: on a GPU from 2020 on, in half precision, in heads of one
    size that is a multiple of eight and at most 256."""
    size = query.shape[-1]
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    return size == value.shape[-1] <= 256 and size % 8 == 0 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None) -> Tensor:
    """(E, H, D) in one call of flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    ends = layout.bounds, layout.bounds, layout.longest, layout.longest
    output = varlen_attn(query, key, value, *ends, scale=scaling, window_size=(-1, 0), enable_gqa=True)
    assert isinstance(output, Tensor)
    return output


def _by_length(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None) -> Tensor:
    """(E, H, D), a call for each run of sequences of equal length."""
    sizes = [count * length for count, length in layout.runs]
    outputs = []
    for (count, length), *parts in zip(layout.runs, *(x.split(sizes) for x in (query, key, value)), strict=True):
        q, k, v = (part.unflatten(0, (count, length)).transpose(1, 2) for part in parts)
        output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
