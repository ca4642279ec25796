"""The objective of LUFFY as pure functions: advantages over a mixed group, and the mixed-policy loss.

Equations are those of "Learning to Reason under Off-Policy Guidance" (arXiv 2504.14945v5). Differences from the
paper's text that its experiments also make: no standard deviation in the advantage (Dr. GRPO), pi_phi = 1, no clip
on off-policy tokens.
"""

from __future__ import annotations

from collections.abc import Callable

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
        + 1e-6; where these rows have no spread the difference stays unscaled, so a group without spread gets 0).

    Returns (B,) in the dtype of rewards. Raises ValueError for wrong shapes, an unknown scale_rewards, or a group
    none of whose rows is in the baseline.
    """
    if rewards.ndim != 1 or group_ids.shape != rewards.shape:
        raise ValueError(f"rewards and group_ids must both be (B,), not {rewards.shape} and {group_ids.shape}")
    if scale_rewards not in ("none", "group"):
        raise ValueError(f"scale_rewards is 'none' or 'group', not {scale_rewards!r}")
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
    variance = zeros.index_add(0, group, advantages.square() * weight) / (count - 1).clamp(min=1)
    scale = torch.where(flat, torch.ones_like(variance), variance.sqrt() + STD_EPSILON)
    return advantages / scale[group]


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
    """The mixed-policy loss (Eq. 5 and 6, negated): -sum(ratio * advantage over mask) / normalizer.

    All tensors have one shape, (B, T) or packed (N,). mask and off_policy are bool; entries outside the mask and
    old_logp on off-policy tokens are never read (they may be anything, also NaN). Gradient flows through logp.

    Off-policy tokens: ratio = off_shaping(exp(logp - teacher_logp)); teacher_logp None means pi_phi = 1, off_shaping
        None means no shaping. off_ratio_clip = (low, high), either may be None, bounds the shaped ratio; a token
        at a bound has no gradient.
    On-policy tokens: ratio = exp(logp - old_logp), or on_shaping(pi) / on_shaping(pi_old); with
        clip = (eps_low, eps_high) the loss is PPO's pessimistic one on [1 - eps_low, 1 + eps_high].
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
    }.items():
        if tensor.shape != logp.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, logp {tuple(logp.shape)}")
    if mask.dtype != torch.bool or off_policy.dtype != torch.bool:
        raise ValueError("mask and off_policy must be bool")
    if teacher_logp is not None and teacher_logp.shape != logp.shape:
        raise ValueError(f"teacher_logp has shape {tuple(teacher_logp.shape)}, logp {tuple(logp.shape)}")

    on, off = mask & ~off_policy, mask & off_policy
    on_logp, on_old, on_advantage = logp[on], old_logp[on], advantages[on]
    on_ratio = (on_logp - on_old).exp()
    if on_shaping is not None:
        on_ratio = on_shaping(on_logp.exp()) / on_shaping(on_old.exp())
    on_losses = -on_advantage * on_ratio
    clipped = torch.zeros_like(on)[on]
    if clip is not None:
        bounded = -on_advantage * on_ratio.clamp(1 - clip[0], 1 + clip[1])
        clipped = bounded > on_losses
        on_losses = torch.maximum(on_losses, bounded)

    off_logp, off_advantage = logp[off], advantages[off]
    off_log_ratio = off_logp if teacher_logp is None else off_logp - teacher_logp[off]
    # float32 loses exp below -87, and with it the finite gradient that log and power shapings have there
    off_ratio = off_log_ratio.clamp(min=-80).exp()
    off_ratio = (off_shaping or Identity())(off_ratio)
    low, high = off_ratio_clip or (None, None)
    below = torch.zeros_like(off)[off] if low is None else off_ratio < low
    above = torch.zeros_like(off)[off] if high is None else off_ratio > high
    if low is not None or high is not None:
        off_ratio = off_ratio.clamp(low, high)
    off_losses = -off_advantage * off_ratio

    denominator = float(mask.sum()) if normalizer is None else float(normalizer)
    total = on_losses.sum() + off_losses.sum()
    loss = total / denominator if denominator else total
    with torch.no_grad():
        metrics = {
            "pg_loss": loss.item(),
            "on_pg_loss": _mean(on_losses),
            "off_pg_loss": _mean(off_losses),
            "pg_clipfrac": _mean(clipped),
            "ppo_kl": _mean(on_old - on_logp),
            "on_policy_prob": _mean(on_old.exp()),
            "off_policy_prob": _mean(off_logp.exp()),
            "off_ratio_mean": _mean(off_ratio),
            "off_ratio_min_clip_frac": _mean(below),
            "off_ratio_max_clip_frac": _mean(above),
        }
    return loss, metrics


def _mean(values: Tensor) -> float:
    return values.detach().float().mean().item() if values.numel() else 0.0
