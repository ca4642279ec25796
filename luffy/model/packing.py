"""Packs sequences of unequal length into rows without padding between them.

Several sequences stand one after another in a row and their position ids restart at zero, which is how
transformers tells them apart (only with `attention_mask=None` and `use_cache=False`; otherwise they silently see
each other). The loss lives on *tokens*: the completions of a mini-batch, concatenated in the order in which the
sequences were given, form one flat axis (N,), and each micro-batch knows which of those tokens it computes. So
advantages, masks and log-probs are flat (N,) tensors and nothing depends on how the rows were filled.

On a CPU the attention of a row costs its length squared, so short rows are fastest; on a GPU long ones are.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and one completion of it (rollout or demonstration), as token ids, (P,) and (n,) integers."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class MicroBatch:
    """R packed rows of L tokens, with M completion tokens among them.

    input_ids, position_ids: (R, L) int64.
    predictors: (M,) int64, index into the R*L flattened positions whose hidden state predicts a completion token.
    targets: (M,) int64, those completion tokens.
    token_index: (M,) int64, where each of them stands on the mini-batch's flat token axis.
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    token_index: Tensor

    def to(self, device: torch.device | str) -> MicroBatch:
        return MicroBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def fill_rows(lengths: SequenceOf[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: indices of `lengths` grouped into rows whose sums do not exceed `capacity`.

    Raises ValueError if a single length exceeds the capacity.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] > capacity:
            raise ValueError(f"sequence {index} has {lengths[index]} tokens, a row holds {capacity}")
        row = next((r for r, room in enumerate(free) if room >= lengths[index]), None)
        if row is None:
            rows.append([])
            free.append(capacity)
            row = len(rows) - 1
        rows[row].append(index)
        free[row] -= lengths[index]
    return rows


def deal(weights: SequenceOf[int], parts: int) -> list[list[int]]:
    """Deals items to `parts` so that the sums of their weights are about equal: the heaviest first, each to the part
    that has least. Returns the indices of each part's items, in the order in which they were dealt."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    for index in sorted(range(len(weights)), key=lambda i: -weights[i]):
        part = sums.index(min(sums))
        dealt[part].append(index)
        sums[part] += weights[index]
    return dealt


def pack(
    sequences: SequenceOf[TokenSequence],
    *,
    row_tokens: int,
    micro_batch_tokens: int,
    pad_id: int = 0,
    part: int = 0,
    parts: int = 1,
) -> list[MicroBatch]:
    """Packs sequences into micro-batches of at most `micro_batch_tokens` tokens (one row at least).

    With several `parts` (ranks that compute the mini-batch together), the rows are dealt to them, balanced by tokens,
    and those of `part` are returned: as many micro-batches as for every other part, empty ones at the end, because
    in a sharded model all ranks must go forward and backward equally often.

    A row holds `row_tokens` tokens, or the longest sequence if that is longer. The end of a row that no sequence
    fills is padding, which is a sequence of its own and carries no loss. Raises ValueError on an empty prompt,
    which would leave the first completion token without a predictor.
    """
    if not sequences:
        return []
    lengths = [len(sequence) for sequence in sequences]
    if any(not len(sequence.prompt_ids) for sequence in sequences):
        raise ValueError("a sequence has an empty prompt: its first completion token has no predictor")
    starts = [0]
    for sequence in sequences:
        starts.append(starts[-1] + len(sequence.completion_ids))
    rows = fill_rows(lengths, max(row_tokens, max(lengths)))
    weights = [sum(lengths[i] for i in row) for row in rows]
    shares = []
    for dealt in deal(weights, parts):
        batches: list[list[list[int]]] = []
        width = 0
        for row in dealt:  # the longest first
            if not batches or width * (len(batches[-1]) + 1) > micro_batch_tokens:
                batches.append([])
                width = weights[row]
            batches[-1].append(rows[row])
        shares.append(batches)
    missing = max(map(len, shares)) - len(shares[part])
    return [_micro_batch(sequences, batch, starts, pad_id) for batch in shares[part]] + [empty(pad_id)] * missing


def empty(pad_id: int = 0) -> MicroBatch:
    """A micro-batch without completion tokens, whose loss and gradient are zero."""
    none = torch.zeros(0, dtype=torch.long)
    return MicroBatch(torch.tensor([[pad_id, pad_id]]), torch.tensor([[0, 1]]), none, none, none)


def _micro_batch(
    sequences: SequenceOf[TokenSequence], rows: list[list[int]], starts: list[int], pad_id: int
) -> MicroBatch:
    width = sum(len(sequences[i]) for i in rows[0])
    input_ids = np.full((len(rows), width), pad_id, np.int64)
    position_ids = np.empty((len(rows), width), np.int64)
    predictors: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    token_index: list[np.ndarray] = []
    for r, row in enumerate(rows):
        place = 0
        for i in row:
            prompt, completion = len(sequences[i].prompt_ids), len(sequences[i].completion_ids)
            end = place + prompt + completion
            input_ids[r, place : place + prompt] = sequences[i].prompt_ids
            input_ids[r, place + prompt : end] = sequences[i].completion_ids
            position_ids[r, place:end] = np.arange(prompt + completion)
            first = r * width + place + prompt - 1
            predictors.append(np.arange(first, first + completion))
            targets.append(input_ids[r, place + prompt : end])
            token_index.append(np.arange(starts[i], starts[i] + completion))
            place = end
        position_ids[r, place:] = np.arange(width - place)
    joined = (torch.from_numpy(np.concatenate(parts)) for parts in (predictors, targets, token_index))
    return MicroBatch(torch.from_numpy(input_ids), torch.from_numpy(position_ids), *joined)
