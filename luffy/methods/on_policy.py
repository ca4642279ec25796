"""On-policy reinforcement learning: a group of rollouts, each judged against the group's mean (the paper's Table 1 and
the ablation of Table 4)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import shaping
from ..errors import ConfigError
from ..objective import Ratios
from .base import Method, RunConfig, register
from .fields import Clip, NonNegative, Positive, settings
from .rows import Batch, Signal


@settings
class Grouped(Method):
    """What all methods with rollouts share: the advantage over the group, and the ratio of on-policy tokens."""

    scale_rewards: Literal["none", "group", "mean"] = "none"
    """Advantages: "none" (Dr. GRPO), "group" (divided by the group's standard deviation) or "mean" (by its mean)."""
    mask_truncated_completions: bool = False
    """Give rollouts that the window has cut no advantage."""
    epsilon: Clip | None = None
    """Clip of the on-policy ratio at 1 - epsilon and 1 + epsilon; None: no clip."""
    epsilon_high: NonNegative | None = None
    """Upper clip range where it differs from epsilon."""
    on_shaping: Literal["none", "regularized", "sqrt", "power"] = "none"
    """Shaping of both probabilities in the on-policy ratio (log and prob_plus_log would not be ratios)."""
    gamma: Positive = 0.1
    """Parameter of the regularized shaping, and of the trust region (alpha)."""
    on_gamma: Positive | None = None
    """Parameter of the regularized on-policy shaping; None: gamma."""
    shaping_exponent: Positive = 0.5
    """Parameter of the power shaping."""

    def __post_init__(self) -> None:
        if self.epsilon is None and self.epsilon_high is not None:
            raise ConfigError("epsilon_high without epsilon: give both, or neither for no clip")

    def check(self, config: RunConfig) -> None:
        if config.sampling.num_generations == 1:
            raise ConfigError("num_generations 1: an advantage is over the mean of a group, which one row has not")

    @property
    def ratios(self) -> Ratios:
        clip = None
        if self.epsilon is not None:
            clip = self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high
        gamma = self.gamma if self.on_gamma is None else self.on_gamma
        parameters = {"regularized": {"gamma": gamma}, "power": {"exponent": self.shaping_exponent}}
        shape = shaping.get(self.on_shaping, **parameters.get(self.on_shaping, {}))
        return Ratios(on_shaping=None if self.on_shaping == "none" else shape, clip=clip)

    def advantages(self, batch: Batch, baseline: str = "union", among: Tensor | None = None) -> Tensor:
        """(B,): over the group's baseline (Eq. 4). among: (B,) bool, the rows that it may have; default all."""
        advantages = batch.advantages(baseline=baseline, scale_rewards=self.scale_rewards, among=among)
        if self.mask_truncated_completions:
            cut = batch.of_rows(lambda row: row.truncated and not row.off_policy)
            advantages = torch.where(cut, 0.0, advantages)
        return advantages

    def imitating(self, batch: Batch, coefficient: float, *, baseline: str = "union", policy: float = 1.0) -> Signal:
        """Own tokens learn by reward, with a weight in the policy term, foreign ones by their likelihood, with a
        coefficient."""
        foreign = batch.foreign.float()
        advantages = self.advantages(batch, baseline)
        return Signal.of(batch, advantages, policy=policy * (1.0 - foreign), likelihood=coefficient * foreign)

    def signal(self, batch: Batch) -> Signal:
        return Signal.of(batch, self.advantages(batch))


@register("on_policy", "On-Policy RL")
class OnPolicy(Grouped):
    epsilon: Clip | None = 0.2


@register("on_policy_shaping", "On-Policy RL + Shaping")
class OnPolicyShaping(OnPolicy):
    on_shaping: Literal["none", "regularized", "sqrt", "power"] = "regularized"


@register("on_policy_no_clip", "On-Policy RL + No Clip")
class OnPolicyNoClip(OnPolicy):
    epsilon: Clip | None = None
