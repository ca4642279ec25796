"""Packs sequences of unequal length, one behind another, into micro-batches without padding.

The loss lives on *tokens*: the completions of a mini-batch, concatenated in the order in which the sequences were
given, form one flat axis (N,), and each micro-batch knows which of those tokens it computes. So advantages, masks and
log-probs are flat (N,) tensors and nothing depends on how the micro-batches were filled.

Sequences with the same prompt that come into one micro-batch share it (attention.py).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .attention import Layout

REPEATED = 4  # tokens in attention for each token of a micro-batch, at most
ITEMS = 8  # a micro-batch is filled with about so many pieces at least, to come out about as full as the others


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and one completion of it (rollout or demonstration), as token ids, (P,) and (n,) integers."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray


@dataclass(frozen=True)
class MicroBatch:
    """A row of T tokens, with M completion tokens to be computed among them.

    input_ids, position_ids: (1, T) int64. layout: which of them are a sequence.
    predictors: (M,) int64, index into the T positions whose hidden state predicts a completion token.
    targets: (M,) int64, those completion tokens.
    token_index: (M,) int64, where each of them stands on the mini-batch's flat token axis.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: Layout
    predictors: Tensor
    targets: Tensor
    token_index: Tensor

    def to(self, device: torch.device | str) -> MicroBatch:
        return MicroBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def deal(weights: SequenceOf[int], parts: int) -> list[list[int]]:
    """Deals items to `parts` so that the sums of their weights are about equal: the heaviest first, each to the part
    that has least. Returns the indices of each part's items, in the order in which they were dealt."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    sums = [(0, part) for part in range(parts)]  # a heap
    for index in sorted(range(len(weights)), key=lambda i: -weights[i]):
        least, part = sums[0]
        dealt[part].append(index)
        heapq.heapreplace(sums, (least + weights[index], part))
    return dealt


def pack(
    sequences: SequenceOf[TokenSequence], *, micro_batch_tokens: int, part: int = 0, parts: int = 1
) -> list[MicroBatch]:
    """Packs sequences into micro-batches of at most `micro_batch_tokens` tokens, and four times as many in attention,
    where a shared prompt is repeated (one sequence at least).

    With several `parts` (ranks that compute the mini-batch together) the number of micro-batches is a multiple of
    theirs, all about equally full, and those of `part` are returned: as many as for every other part, the fullest
    first, because the ranks of a sharded model go forward and backward together. With too few sequences some are empty.
    Raises ValueError on an empty prompt, which would leave the first completion token without a predictor.
    """
    if not sequences:
        return []
    if any(not len(sequence.prompt_ids) for sequence in sequences):
        raise ValueError("a sequence has an empty prompt: its first completion token has no predictor")
    starts = np.cumsum([0, *(len(sequence.completion_ids) for sequence in sequences)])
    families: dict[bytes, list[int]] = {}
    for i, sequence in enumerate(sequences):
        families.setdefault(np.asarray(sequence.prompt_ids, np.int64).tobytes(), []).append(i)
    total = sum(_size(sequences, family) for family in families.values())
    most = (micro_batch_tokens if parts == 1 else min(micro_batch_tokens, total // parts)) // ITEMS
    pieces = [piece for family in families.values() for piece in _split(sequences, family, most, micro_batch_tokens)]
    sizes = [_size(sequences, piece) for piece in pieces]
    count = -(-sum(sizes) // (micro_batch_tokens * parts)) * parts
    while True:
        bins = deal(sizes, count)
        if all(len(bin_) < 2 or sum(sizes[i] for i in bin_) <= micro_batch_tokens for bin_ in bins):
            break
        count += -(-count // (20 * parts)) * parts  # a twentieth more, and a multiple of the parts
    bins.sort(key=lambda bin_: -sum(sizes[i] for i in bin_))
    rows = [[i for piece in bin_ for i in pieces[piece]] for bin_ in bins[part::parts]]
    return [_micro_batch(sequences, row, starts) if row else empty() for row in rows]


def empty() -> MicroBatch:
    """A micro-batch without completion tokens, whose loss and gradient are zero."""
    none = torch.zeros(0, dtype=torch.long)
    two = np.arange(2)
    return MicroBatch(torch.zeros(1, 2, dtype=torch.long), torch.arange(2)[None], Layout.of([two], 2), none, none, none)


def _split(sequences: SequenceOf[TokenSequence], family: list[int], most: int, limit: int) -> Iterator[list[int]]:
    """The completions of one prompt in pieces of a size of at most `most` (one completion at least); where that would
    have a long prompt computed again for a few tokens, of at most four prompts or the limit."""
    most = min(limit, max(most, 4 * len(sequences[family[0]].prompt_ids)))
    piece: list[int] = []
    for i in family:
        if piece and _size(sequences, [*piece, i]) > most:
            yield piece
            piece = []
        piece.append(i)
    yield piece


def _size(sequences: SequenceOf[TokenSequence], piece: SequenceOf[int]) -> int:
    """How many tokens the completions of one prompt take up: their own and the prompt's once, or a quarter of those in
    attention, where each has the prompt in front of it."""
    prompt = len(sequences[piece[0]].prompt_ids)
    own = sum(len(sequences[i].completion_ids) for i in piece)
    return max(prompt + own, -(-(len(piece) * prompt + own) // REPEATED))


def _micro_batch(sequences: SequenceOf[TokenSequence], row: list[int], starts: np.ndarray) -> MicroBatch:
    prompts: dict[bytes, np.ndarray] = {}  # the places of those that are in the row already
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    places: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    token_index: list[np.ndarray] = []
    width = 0
    for i in row:
        prompt = np.asarray(sequences[i].prompt_ids, np.int64)
        completion = np.asarray(sequences[i].completion_ids, np.int64)
        behind = np.arange(len(prompt), len(prompt) + len(completion))
        shared = prompts.get(prompt.tobytes())
        if shared is None:
            shared = prompts[prompt.tobytes()] = np.arange(width, width + len(prompt))
            ids.append(prompt)
            positions.append(np.arange(len(prompt)))
            width += len(prompt)
        ids.append(completion)
        positions.append(behind)
        places.append(np.concatenate([shared, np.arange(width, width + len(completion))]))
        width += len(completion)
        targets.append(completion)
        token_index.append(np.arange(starts[i], starts[i] + len(completion)))
    predictors = [place[-len(target) - 1 : -1] for place, target in zip(places, targets, strict=True)]
    joined = [torch.from_numpy(np.concatenate(parts)) for parts in (ids, positions, predictors, targets, token_index)]
    input_ids, position_ids, *rest = joined
    return MicroBatch(input_ids[None], position_ids[None], Layout.of(places, width), *rest)
