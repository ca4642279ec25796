"""On-policy RL with another ratio, clip or scale: DAPO (arXiv 2503.14476), GSPO (2507.18071), CISPO (2506.13585), MaxRL
(2602.02710)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from ...errors import ConfigError
from ...objective import Ratios
from ..base import register
from ..fields import Clip, Count, NonNegative
from ..on_policy import Grouped, OnPolicy
from ..rows import ROLLOUT, Batch, Draw, Rounds, Signal, Start

Scale = Literal["none", "group", "mean"]


@register("dapo", "DAPO")
class DAPO(Grouped):
    """A wider clip above, and another problem in the place of one whose rollouts are all right or all wrong."""

    defaults: ClassVar[dict[str, Any]] = {"loss_type": "dapo"}

    scale_rewards: Scale = "group"
    epsilon: Clip | None = 0.2
    epsilon_high: NonNegative | None = 0.28
    max_resamples: Count = 10
    """How often a group may be drawn again."""

    def rounds(self, draw: Draw) -> Rounds:
        group = yield [ROLLOUT] * draw.size
        for attempt in range(self.max_resamples):
            spare = draw.spare(attempt)
            if len({row.right for row in group[-draw.size :]}) > 1 or spare is None:
                return
            group = yield [Start(problem=spare)] * draw.size

    def signal(self, batch: Batch) -> Signal:
        """Of the last problem of each group, as far as its rollouts differ."""
        advantages, kept = self.advantages(batch), batch.last_round()
        return Signal.of(batch, advantages, policy=batch.spread((kept & (advantages != 0)).float()))


@register("gspo", "GSPO")
class GSPO(OnPolicy):
    """The ratio of a whole answer."""

    defaults: ClassVar[dict[str, Any]] = {"loss_type": "grpo"}

    scale_rewards: Scale = "group"
    epsilon: Clip | None = 3e-4
    epsilon_high: NonNegative | None = 4e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_shaping != "none":
            raise ConfigError("on_shaping is not for gspo, whose ratio is that of a whole answer")

    @property
    def ratios(self) -> Ratios:
        return replace(super().ratios, level="row")


@register("cispo", "CISPO")
class CISPO(OnPolicy):
    """The clip bounds a token's weight, and keeps its gradient."""

    defaults: ClassVar[dict[str, Any]] = {"loss_type": "dapo"}

    scale_rewards: Scale = "group"
    epsilon_high: NonNegative | None = 0.28

    @property
    def ratios(self) -> Ratios:
        return replace(super().ratios, clip_kind="weight")


@register("maxrl", "MaxRL")
class MaxRL(OnPolicy):
    """Advantages are divided by the group's mean, so that hard problems count for more."""

    scale_rewards: Scale = "mean"
