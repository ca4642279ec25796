"""The objective of LUFFY as pure functions: advantages over a mixed group, and the mixed-policy loss.

Equations are those of "Learning to Reason under Off-Policy Guidance" (arXiv 2504.14945v5). Differences from the
paper's text that its experiments also make: no standard deviation in the advantage (Dr. GRPO), pi_phi = 1, no clip
on off-policy tokens.

All functions work on tokens: advantages, weights and log-probs of a mini-batch lie on one flat axis (N,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .shaping import Identity

STD_EPSILON = 1e-6

Shape = Callable[[Tensor], Tensor]


def group_advantages(
    rewards: Tensor, group_ids: Tensor, *, scale_rewards: str = "none", baseline_mask: Tensor | None = None
) -> Tensor:
    """Advantage of each completion over the mean of its group (Eq. 4).

    rewards: (B,) float; group_ids: (B,) int, in any order and with any gaps.
    baseline_mask: (B,) bool, the rows whose mean (and deviation) is the baseline; default all rows of the group,
        i.e. the union of on- and off-policy. Every row is centred, also those outside the mask.
    scale_rewards: "none" (Dr. GRPO: R - mean) or "group" (divided by the baseline rows' unbiased standard deviation
        + 1e-6; where these rows have no spread the difference stays unscaled, so a group without spread gets 0), or
        "mean" (divided by the baseline rows' mean, 0 where that is not above 0: MaxRL, arXiv 2602.02710).

    Returns (B,) in the dtype of rewards. Raises ValueError for wrong shapes, an unknown scale_rewards, or a group
    none of whose rows is in the baseline.
    """
    if rewards.ndim != 1 or group_ids.shape != rewards.shape:
        raise ValueError(f"rewards and group_ids must both be (B,), not {rewards.shape} and {group_ids.shape}")
    if scale_rewards not in ("none", "group", "mean"):
        raise ValueError(f"scale_rewards is 'none', 'group' or 'mean', not {scale_rewards!r}")
    if not rewards.is_floating_point():
        rewards = rewards.float()
    if baseline_mask is None:
        baseline_mask = torch.ones_like(rewards, dtype=torch.bool)
    if baseline_mask.shape != rewards.shape or baseline_mask.dtype != torch.bool:
        raise ValueError(f"baseline_mask must be bool of shape {rewards.shape}")
    ids, group = torch.unique(group_ids, return_inverse=True)
    zeros = rewards.new_zeros(len(ids))
    weight = baseline_mask.to(rewards.dtype)
    count = zeros.index_add(0, group, weight)
    if (count == 0).any():
        raise ValueError(f"groups {ids[count == 0].tolist()} have no row in the baseline")
    mean = zeros.index_add(0, group, rewards * weight) / count
    infinity = torch.full_like(zeros, torch.inf)
    low = infinity.scatter_reduce(0, group[baseline_mask], rewards[baseline_mask], "amin")
    high = (-infinity).scatter_reduce(0, group[baseline_mask], rewards[baseline_mask], "amax")
    flat = low == high
    mean = torch.where(flat, low, mean)  # exact, where a rounded mean would leave a residue
    advantages = rewards - mean[group]
    if scale_rewards == "none":
        return advantages
    if scale_rewards == "mean":
        scaled = advantages / torch.where(mean > 0, mean, torch.ones_like(mean))[group]
        return torch.where((mean > 0)[group], scaled, torch.zeros_like(scaled))
    variance = zeros.index_add(0, group, advantages.square() * weight) / (count - 1).clamp(min=1)
    scale = torch.where(flat, torch.ones_like(variance), variance.sqrt() + STD_EPSILON)
    return advantages / scale[group]


@dataclass(frozen=True)
class Ratios:
    """How the ratios of the policy term are shaped and bounded.

    off_shaping: f on off-policy ratios; on_shaping: f on both probabilities of an on-policy ratio; None: no shaping.
    level: an on-policy ratio is of a "token", of its "row" (the geometric mean over the row's on-policy tokens, with
        the token's own gradient: GSPO, arXiv 2507.18071), or "none", a 1 with the gradient of log pi (REINFORCE).
    clip: (eps_low, eps_high) of the bound on on-policy ratios; None: no clip. clip_kind: it bounds the loss ("ppo",
        pessimistic), or the "weight" of log pi, whose gradient stays (CISPO, arXiv 2506.13585).
    off_ratio_clip: (low, high), either may be None, bounds the shaped off-policy ratio.
    off_clip: (eps_low, eps_high) of PPO's bound on shaped off-policy ratios; None: no clip.
    """

    off_shaping: Shape | None = None
    on_shaping: Shape | None = None
    clip: tuple[float, float] | None = None
    off_ratio_clip: tuple[float | None, float | None] = (None, None)
    level: str = "token"
    clip_kind: str = "ppo"
    off_clip: tuple[float, float] | None = None


@dataclass(frozen=True)
class TokenLosses:
    """The policy loss of every token, (N,) float with gradient, its ratio, and (N,) bool: tokens that the clip holds,
    off-policy tokens below and above the bounds of their ratio."""

    losses: Tensor
    ratios: Tensor
    clipped: Tensor
    below: Tensor
    above: Tensor


def token_losses(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    off_policy: Tensor,
    ratios: Ratios,
    teacher_logp: Tensor | None = None,
    rows: Tensor | None = None,
) -> TokenLosses:
    """-ratio * advantage of every token (Eq. 5 and 6, negated). All tensors are (N,); gradient flows through logp.
    rows: int64, the row of each token, for ratios of rows.

    Off-policy tokens: ratio = off_shaping(exp(logp - teacher_logp)); teacher_logp None means pi_phi = 1. A token at a
        bound of off_ratio_clip has no gradient. Their old_logp is never read.
        With off_clip the loss is PPO's pessimistic one.
    On-policy tokens: ratio = exp(logp - old_logp), at the level that `Ratios` has, or on_shaping(pi) /
        on_shaping(pi_old); with a clip the loss is PPO's pessimistic one on [1 - eps_low, 1 + eps_high], or the clipped
        ratio is the weight of logp. Their teacher_logp is never read.
    """
    on = ~off_policy
    on_logp, on_old, on_advantage = logp[on], old_logp[on], advantages[on]
    on_ratio = _ratio(on_logp, on_old, ratios.level, None if rows is None else rows[on])
    if ratios.on_shaping is not None:
        on_ratio = ratios.on_shaping(on_logp.exp()) / ratios.on_shaping(on_old.exp())
    clipped = torch.zeros_like(off_policy)
    if ratios.clip_kind == "weight":
        low, high = ratios.clip or (1.0, torch.inf)
        weight = on_ratio.detach().clamp(1 - low, 1 + high)
        clipped[on] = weight != on_ratio.detach()
        on_losses = -on_advantage * weight * on_logp
    else:
        on_losses, clipped[on] = _bounded(on_advantage, on_ratio, ratios.clip)

    off_logp = logp[off_policy]
    off_log_ratio = off_logp if teacher_logp is None else off_logp - teacher_logp[off_policy]
    # float32 loses exp below -87, and with it the finite gradient that log and power shapings have there
    off_ratio = (ratios.off_shaping or Identity())(off_log_ratio.clamp(min=-80).exp())
    below, above = torch.zeros_like(off_policy), torch.zeros_like(off_policy)
    least, most = ratios.off_ratio_clip
    if least is not None:
        below[off_policy] = off_ratio < least
    if most is not None:
        above[off_policy] = off_ratio > most
    if least is not None or most is not None:
        off_ratio = off_ratio.clamp(least, most)

    off_losses, clipped[off_policy] = _bounded(advantages[off_policy], off_ratio, ratios.off_clip)
    losses, shown = torch.zeros_like(logp), torch.zeros_like(logp)
    losses = losses.index_put((on,), on_losses).index_put((off_policy,), off_losses)
    shown[on], shown[off_policy] = on_ratio.detach(), off_ratio.detach()
    return TokenLosses(losses, shown, clipped, below, above)


def row_means(values: Tensor, rows: Tensor, where: Tensor) -> Tensor:
    """(N,): the mean of each token's row over the tokens of it that are chosen; 0 where there are none.

    values: (N,) float; rows: (N,) int64, the row of each token; where: (N,) bool.
    """
    _, row = torch.unique(rows, return_inverse=True)
    zeros = values.new_zeros(int(row.max()) + 1 if len(row) else 0)
    count = zeros.index_add(0, row, where.to(values.dtype))
    return (zeros.index_add(0, row, values * where) / count.clamp(min=1))[row]


def _ratio(logp: Tensor, old_logp: Tensor, level: str, rows: Tensor | None) -> Tensor:
    """pi / pi_old of a token or a row, or 1, with gradient."""
    if level == "none":
        return (logp - logp.detach()).exp()
    if level == "row":
        if rows is None:
            raise ValueError("ratios of rows need the row of each token")
        mean = row_means((logp - old_logp).detach(), rows, torch.ones_like(rows, dtype=torch.bool))
        return (mean + logp - logp.detach()).exp()
    return (logp - old_logp).exp()


def _bounded(advantage: Tensor, ratio: Tensor, clip: tuple[float, float] | None) -> tuple[Tensor, Tensor]:
    """-ratio * advantage, with PPO's pessimistic bound, and which tokens that holds."""
    losses = -advantage * ratio
    if clip is None:
        return losses, torch.zeros_like(losses, dtype=torch.bool)
    bounded = -advantage * ratio.clamp(1 - clip[0], 1 + clip[1])
    return torch.maximum(losses, bounded), bounded > losses


def policy_scale(weights: Tensor, rows: Tensor, *, loss_type: str, window: int) -> Tensor:
    """What each token's policy loss is multiplied by, so that their sum is the policy term: (N,) float, on the device
    of weights.

    weights: (N,) float; tokens of weight 0 take no part, nor in the denominator. rows: (N,) int64, the row of each.
    loss_type, TRL's names: "dr_grpo" 1 / (rows x window), the paper's practice; "dapo" 1 / tokens, Eq. 5's Z; "grpo"
        1 / (rows x tokens of the row). window: longest completion in tokens. Raises ValueError for another loss_type.
    """
    counts = torch.zeros(int(rows.max()) + 1 if len(rows) else 0, device=weights.device)
    counts = counts.index_add(0, rows, (weights != 0).float())
    active = max(1.0, float((counts > 0).sum()))
    if loss_type == "dr_grpo":
        return weights / (active * window)
    if loss_type == "dapo":
        return weights / max(1.0, float(counts.sum()))
    if loss_type == "grpo":
        return weights / (active * counts[rows].clamp(min=1))
    raise ValueError(f"loss_type is dr_grpo, dapo or grpo, not {loss_type!r}")


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    off_policy: Tensor,
    *,
    off_shaping: Shape | None = None,
    on_shaping: Shape | None = None,
    clip: tuple[float, float] | None = None,
    normalizer: float | None = None,
    teacher_logp: Tensor | None = None,
    off_ratio_clip: tuple[float | None, float | None] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The mixed-policy loss of a whole batch: the sum of `token_losses` over the mask, divided by the normalizer.

    All tensors have one shape, (B, T) or packed (N,). mask and off_policy are bool; entries outside the mask and
    old_logp on off-policy tokens are never read (they may be anything, also NaN). Gradient flows through logp.
    The options are those of `Ratios` and `token_losses`.
    normalizer: what the sum is divided by; None means the number of masked tokens.

    Returns the scalar loss and metrics (floats, 0 where a part is empty): pg_loss; on_pg_loss, off_pg_loss (token
    means); pg_clipfrac (on-policy tokens that the clip holds); ppo_kl (mean old_logp - logp on-policy); on_policy_prob
    (under the sampling policy), off_policy_prob (under the current one); off_ratio_mean, off_ratio_min_clip_frac,
    off_ratio_max_clip_frac. Raises ValueError where shapes or dtypes do not fit.
    """
    for name, tensor in {
        "old_logp": old_logp,
        "advantages": advantages,
        "mask": mask,
        "off_policy": off_policy,
        "teacher_logp": logp if teacher_logp is None else teacher_logp,
    }.items():
        if tensor.shape != logp.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, logp {tuple(logp.shape)}")
    if mask.dtype != torch.bool or off_policy.dtype != torch.bool:
        raise ValueError("mask and off_policy must be bool")
    off = off_policy[mask]
    current, old = logp[mask], old_logp[mask]
    terms = token_losses(
        current,
        old,
        advantages[mask],
        off,
        Ratios(off_shaping, on_shaping, clip, off_ratio_clip or (None, None)),
        None if teacher_logp is None else teacher_logp[mask],
    )
    denominator = float(mask.sum()) if normalizer is None else float(normalizer)
    total = terms.losses.sum()
    loss = total / denominator if denominator else total
    with torch.no_grad():
        found = {**loss_metrics(terms, current, old, off), "off_policy_prob": current[off].exp()}
        metrics = {"pg_loss": loss.item()} | {
            name: float(values.float().mean()) if len(values) else 0.0 for name, values in found.items()
        }
    return loss, metrics


def loss_metrics(terms: TokenLosses, logp: Tensor, old_logp: Tensor, off_policy: Tensor) -> dict[str, Tensor]:
    """What is reported of the policy term besides the loss, as the values of the tokens that each is the mean of."""
    on = ~off_policy
    return {
        "on_pg_loss": terms.losses[on].detach(),
        "off_pg_loss": terms.losses[off_policy].detach(),
        "pg_clipfrac": terms.clipped[on],
        "ppo_kl": (old_logp - logp)[on].detach(),
        "on_policy_prob": old_logp[on].exp(),
        "off_ratio_mean": terms.ratios[off_policy],
        "off_ratio_min_clip_frac": terms.below[off_policy],
        "off_ratio_max_clip_frac": terms.above[off_policy],
    }
