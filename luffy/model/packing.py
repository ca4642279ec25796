"""Packs sequences of unequal length, one behind another, into micro-batches without padding.

The loss lives on *tokens*: the completions of a mini-batch, concatenated in the order in which the sequences were
given, form one flat axis (N,), and each micro-batch knows which of those tokens it computes. So advantages, masks and
log-probs are flat (N,) tensors and nothing depends on how the micro-batches were filled.

Sequences with the same prompt that come into one micro-batch share it (attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .attention import Layout

ITEMS = 8  # each of several micro-batches is filled with about so many pieces, to come out about equally full


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
    sums = [0] * parts
    for index in sorted(range(len(weights)), key=lambda i: -weights[i]):
        part = sums.index(min(sums))
        dealt[part].append(index)
        sums[part] += weights[index]
    return dealt


def pack(
    sequences: SequenceOf[TokenSequence], *, micro_batch_tokens: int, part: int = 0, parts: int = 1
) -> list[MicroBatch]:
    """Packs sequences into micro-batches of at most `micro_batch_tokens` tokens (one sequence at least).

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
    total = sum(_tokens(sequences, [i]) for i in range(len(sequences)))
    count = -(-total // (micro_batch_tokens * parts)) * parts
    pieces = _pieces(sequences, total if count == 1 else total // (count * ITEMS))
    weights = [_tokens(sequences, piece) for piece in pieces]
    count = -(-sum(weights) // (micro_batch_tokens * parts)) * parts
    while True:
        bins = deal(weights, count)
        if all(len(bin_) < 2 or sum(weights[i] for i in bin_) <= micro_batch_tokens for bin_ in bins):
            break
        count += parts
    bins.sort(key=lambda bin_: -sum(weights[i] for i in bin_))
    rows = [[i for piece in bin_ for i in pieces[piece]] for bin_ in bins[part::parts]]
    return [_micro_batch(sequences, row, starts) if row else empty() for row in rows]


def empty() -> MicroBatch:
    """A micro-batch without completion tokens, whose loss and gradient are zero."""
    none = torch.zeros(0, dtype=torch.long)
    two = np.arange(2)
    return MicroBatch(torch.zeros(1, 2, dtype=torch.long), torch.arange(2)[None], Layout.of([two], 2), none, none, none)


def _pieces(sequences: SequenceOf[TokenSequence], most: int) -> list[list[int]]:
    """The sequences in runs of one prompt, of at most `most` tokens (one sequence at least)."""
    families: dict[bytes, list[int]] = {}
    for i, sequence in enumerate(sequences):
        families.setdefault(np.asarray(sequence.prompt_ids, np.int64).tobytes(), []).append(i)
    pieces = []
    for family in families.values():
        piece: list[int] = []
        for i in family:
            if piece and _tokens(sequences, [*piece, i]) > most:
                pieces.append(piece)
                piece = []
            piece.append(i)
        pieces.append(piece)
    return pieces


def _tokens(sequences: SequenceOf[TokenSequence], piece: SequenceOf[int]) -> int:
    """How many tokens completions of one prompt take up."""
    return len(sequences[piece[0]].prompt_ids) + sum(len(sequences[i].completion_ids) for i in piece)


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
