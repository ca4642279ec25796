"""What one optimiser step learns from, and the terms of its loss.

Each term is a sum over tokens divided by its own denominator, which is taken over the whole mini-batch beforehand. So
the sum over micro-batches, and over ranks, is the mini-batch's loss, and no gradient depends on how that was cut:

    policy      -sum(weight x ratio x advantage) / rows x window, or another denominator (objective.policy_scale)
    likelihood  -sum(weight x log-prob) / tokens with a weight
    entropy     -coefficient x sum(entropy) / tokens
    KL          beta x sum(k3 estimate) / own tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..methods import Method
from ..methods.rows import Batch, Now, Row, Signal
from ..model.packing import MicroBatch, TokenSequence, empty
from ..objective import loss_metrics, policy_scale, token_losses
from .metrics import GAP_BOUND, Metrics

Pack = Callable[[Sequence[TokenSequence]], list[MicroBatch]]


@dataclass
class MiniBatch:
    """The rows that take part in one optimiser step: their tokens on one flat axis (N,), on the model's device.

    rows: the rows. signal: what every token counts for; scale: its factor in the policy term. micro_batches: this
    rank's share of the rows that have a gradient; watched: of those that are only measured. Both are packed once.
    sampler_logp: log-probs of those who wrote the tokens; old_logp: of own tokens under the policy that has sampled;
    reference_logp: under the method's reference model. Of foreign tokens the last is not read, old_logp only by a
    method that asks for it.
    """

    rows: list[Row]
    signal: Signal
    scale: Tensor
    micro_batches: list[MicroBatch]
    watched: list[MicroBatch]
    sampler_logp: Tensor
    old_logp: Tensor
    reference_logp: Tensor | None = None
    likelihood_tokens: int = field(init=False)
    tokens: int = field(init=False)
    own_tokens: int = field(init=False)
    own_rows: int = field(init=False)

    @property
    def apart(self) -> bool:
        """Whether its rows are learned from in a step of their own, after the usual ones."""
        return self.rows[0].apart

    def __post_init__(self) -> None:
        active = self.signal.active
        self.likelihood_tokens = int((self.signal.likelihood != 0).sum())
        self.tokens = max(1, int(active.sum()))
        self.own_tokens = max(1, int((active & ~self.signal.foreign).sum()))
        self.own_rows = max(1, sum(not row.off_policy for row in self.rows))


def has_gradient(signal: Signal, method: Method) -> Tensor:
    """(N,) bool: the tokens whose loss may have a gradient. In a group without spread that is nobody's, unless all
    tokens have an entropy bonus or a KL term, or the method looks again at what they count for."""
    if method.entropy_coef or method.beta or type(method).live is not Method.live:
        return signal.active
    return ((signal.policy != 0) & (signal.advantage != 0)) | (signal.likelihood != 0)


def mini_batches(
    batch: Batch, signal: Signal, groups: int, pack: Pack, method: Method, *, loss_type: str, window: int,
    device: torch.device,
) -> list[MiniBatch]:  # fmt: skip
    """A step's rows in mini-batches of so many groups, last those that are learned from apart. Rows none of whose
    tokens has a weight take no part.

    batch's rows are in the order of their groups. pack: sequences to this rank's micro-batches, on the device.
    """
    learning = set(signal.rows[has_gradient(signal, method)].unique().tolist())
    parts: dict[tuple[bool, int], list[int]] = {}
    for i in signal.rows[signal.active].unique().tolist():
        row = batch.rows[i]
        parts.setdefault((row.apart, 0 if row.apart else row.group // groups), []).append(i)
    made = []
    for _, chosen in sorted(parts.items()):
        at = torch.isin(signal.rows, torch.tensor(chosen))
        part = signal.at(at).to(device)
        logprobs = batch.logprobs[at].to(device)
        rows = [batch.rows[i] for i in chosen]
        learn = torch.tensor([i in learning for i in chosen])
        made.append(
            MiniBatch(
                rows,
                part,
                policy_scale(part.policy, part.rows - part.rows[0], loss_type=loss_type, window=window),
                # an optimiser step has one backward at least: momentum and weight decay go on without a gradient
                packed(rows, pack, learn) or [empty().to(device)],
                packed(rows, pack, ~learn),
                sampler_logp=logprobs,
                old_logp=logprobs.clone(),
            )
        )
    return made


def packed(rows: Sequence[Row], pack: Pack, chosen: Tensor) -> list[MicroBatch]:
    """Some of the rows, (B,) bool, as micro-batches whose token_index counts through the tokens of all."""
    lengths = torch.tensor([len(row.token_ids) for row in rows])
    places = chosen.repeat_interleave(lengths).nonzero().squeeze(-1)
    sequences = [
        TokenSequence(row.prompt_ids, row.token_ids) for row, taken in zip(rows, chosen.tolist(), strict=True) if taken
    ]
    return [
        replace(batch, token_index=places.to(batch.token_index.device)[batch.token_index]) for batch in pack(sequences)
    ]


def loss_terms(
    mini: MiniBatch,
    at: Tensor,
    logp: Tensor,
    entropy: Tensor,
    method: Method,
    metrics: Metrics,
    importance_cap: float | None = None,
) -> dict[str, Tensor]:
    """The terms of the loss that some tokens contribute, by name, and what is logged of them.

    at: (M,) int64, their places on the flat axis; logp, entropy: (M,) with gradient. importance_cap: own tokens are
    weighted with min(cap, old policy's probability / sampler's).
    """
    weighted = mini.signal.at(at)
    old, sampler = mini.old_logp[at], mini.sampler_logp[at]
    reference = None if mini.reference_logp is None else mini.reference_logp[at]
    signal = method.live(weighted, Now(logp.detach(), entropy.detach(), old, reference, weighted.rows))
    foreign, own = signal.foreign, ~signal.foreign
    advantage, weight = signal.advantage, torch.ones_like(signal.advantage)
    if importance_cap is not None:
        weight = torch.where(own, (old - sampler).exp().clamp(max=importance_cap), weight)
        advantage = weight * advantage

    part, imitated, active = weighted.policy != 0, weighted.likelihood != 0, weighted.active
    losses = token_losses(
        logp[part], old[part], advantage[part], foreign[part], method.ratios, signal.teacher[part],
        weighted.rows[part],
    )  # fmt: skip
    # live may have changed the weight, not the denominator
    scale = mini.scale[at][part] * (signal.policy / weighted.policy)[part]
    terms = {"policy": (losses.losses * scale).sum()}
    if mini.likelihood_tokens:
        terms["likelihood"] = -(signal.likelihood * logp)[imitated].sum() / mini.likelihood_tokens
    if method.entropy_coef:
        terms["entropy"] = -method.entropy_coef * entropy[active].sum() / mini.tokens
    divergence = torch.zeros_like(terms["policy"])
    if reference is not None:
        gap = (reference - logp)[active & own]
        divergence = (gap.exp() - gap - 1).sum() / mini.own_tokens  # the estimator of Schulman's k3
        if method.beta:
            terms["kl"] = method.beta * divergence

    answers = entropy[own].sum() / mini.own_rows
    metrics.totals({"pg_loss": terms["policy"], "kl": divergence, "entropy/answer": answers})
    metrics.means(loss_metrics(losses, logp[part], old[part], foreign[part]))
    moved, mismatch = (logp - old)[own].abs(), (logp - sampler)[own].abs()
    metrics.means(
        {
            "sft_loss": -logp[foreign],
            "off_policy_prob": logp[foreign].exp(),
            "entropy": entropy,
            "entropy/on": entropy[own],
            "entropy/off": entropy[foreign],
            "old_logp_gap/mean": moved,
            "sampler_gap/mean": mismatch,
            "sampler_gap/above": mismatch > GAP_BOUND,
            "importance_weight": weight[own],
        }
    )
    metrics.maxima({"old_logp_gap/max": moved, "sampler_gap/max": mismatch})
    return terms
