"""Mixed-policy GRPO: some rows of a group are traces of a stronger model, or begin in one (Section 3 of the paper).

The advantage is over the union of the group. A trace token counts for f(pi) instead of a ratio to the policy that wrote
it, which the paper takes for 1 (off_ratio "pi"); with "known" it is f(pi / pi_phi), where the data has the teacher's
log-probs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from .. import shaping
from ..errors import ConfigError
from ..objective import Ratios
from .base import RunConfig, register
from .fields import Clip, Count, Float, NonNegative, PositiveInt, Share, settings
from .on_policy import Grouped
from .prefixes import prefix_shares
from .rows import PREFIXES, ROLLOUT, SHARES, Batch, Draw, Rounds, Signal, Start, part, whole

OffShaping = Literal["none", "regularized", "log", "prob_plus_log", "sqrt", "power", "parabola", "trust_region"]


@settings
class WithTraces(Grouped):
    """Groups in which some rows are traces, or begin in one."""

    num_off_policy: Count = 1
    """Rows of a group that are demonstrations, or begin in one."""
    trace_share: Share = 1.0
    """Share of groups that get their demonstrations; the others are all rollouts."""

    def traces_wanted(self) -> int:
        return self.num_off_policy

    def sampled_rows(self, size: int) -> float:
        return size - self.trace_share * self.num_off_policy

    def rounds(self, draw: Draw) -> Rounds:
        starts = self.starts(draw) if draw.rng(SHARES).random() < self.trace_share else []
        yield [ROLLOUT] * (draw.size - len(starts)) + starts

    def starts(self, draw: Draw) -> list[Start]:
        """How the rows of a group begin that do not begin with nothing."""
        return [whole(trace) for trace in draw.some_traces(self.num_off_policy)]

    def check(self, config: RunConfig) -> None:
        size = config.sampling.num_generations
        if self.num_off_policy > size:
            raise ConfigError(
                f"num_off_policy {self.num_off_policy} exceeds num_generations {size}: demonstrations are part of "
                "the group"
            )
        if self.num_off_policy == size:
            raise ConfigError(f"num_off_policy = num_generations = {size} leaves no rollout: use sft")
        super().check(config)


@register("mixed", "Mixed-Policy RL")
class Mixed(WithTraces):
    epsilon: Clip | None = 0.2
    baseline: Literal["union", "on_policy"] = "union"
    """Rows whose mean reward is the baseline: "union" (Eq. 4) or "on_policy"."""
    off_ratio: Literal["pi", "known"] = "pi"
    """Off-policy ratio: "pi" (pi_phi = 1, the paper) or "known" (to the data's trace_logprobs)."""
    off_shaping: OffShaping = "none"
    """Shaping of off-policy ratios."""
    shaping_weight: NonNegative = 0.1
    """Parameter of the log and prob_plus_log shapings."""
    off_ratio_min: Float | None = None
    """Lower bound of the shaped off-policy ratio."""
    off_ratio_max: Float | None = None
    """Upper bound of the shaped off-policy ratio."""

    prefix_strategy: Literal["random", "fixed", "linear", "reverse_linear"] = "random"
    """What share of its trace a row begins with: "random" between prefix_min and prefix_max, "fixed" at even distances
    between them; "linear" is at most a bound that falls over prefix_steps, "reverse_linear" one that rises: the bound
    itself with prefix_shared, else a random share below it."""
    prefix_min: Share | None = None
    """Least share, for random and fixed; None: prefix_max."""
    prefix_max: Share = 1.0
    """Greatest share; 1: the whole trace."""
    prefix_steps: PositiveInt = 1000
    """Steps over which the bound of the linear strategies moves."""
    prefix_shared: bool = False
    """Whether the rows of a group that begin in a trace have one share and one trace."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.off_ratio_min, self.off_ratio_max
        if low is not None and high is not None and low > high:
            raise ConfigError(f"off_ratio_min {low} exceeds off_ratio_max {high}")
        if self.least_share > self.prefix_max:
            raise ConfigError(f"prefix_min {self.prefix_min} exceeds prefix_max {self.prefix_max}")

    @property
    def ratios(self) -> Ratios:
        parameters = {
            "regularized": {"gamma": self.gamma},
            "log": {"weight": self.shaping_weight},
            "prob_plus_log": {"weight": self.shaping_weight},
            "power": {"exponent": self.shaping_exponent},
            "trust_region": {"alpha": self.gamma},
        }
        shape = shaping.get(self.off_shaping, **parameters.get(self.off_shaping, {}))
        return replace(super().ratios, off_shaping=shape, off_ratio_clip=(self.off_ratio_min, self.off_ratio_max))

    @property
    def least_share(self) -> float:
        return self.prefix_max if self.prefix_min is None else self.prefix_min

    @property
    def takes_whole_traces(self) -> bool:
        return self.prefix_strategy in ("random", "fixed") and self.least_share == 1.0

    def sampled_rows(self, size: int) -> float:
        return super().sampled_rows(size) if self.takes_whole_traces else size

    def traces_needed(self) -> int:
        return self.num_off_policy if self.takes_whole_traces else min(1, self.num_off_policy)

    def starts(self, draw: Draw) -> list[Start]:
        if self.takes_whole_traces:
            return super().starts(draw)
        traces = draw.some_traces(1 if self.prefix_shared else self.num_off_policy)
        shares = prefix_shares(
            self.prefix_strategy,
            rows=self.num_off_policy,
            low=self.least_share,
            high=self.prefix_max,
            done=min(draw.step / self.prefix_steps, 1.0),
            shared=self.prefix_shared,
            rng=draw.rng(PREFIXES),
        )
        return [part(traces[row % len(traces)], share) for row, share in enumerate(shares if traces else [])]

    @property
    def needs_teacher(self) -> bool:
        return self.off_ratio == "known"

    def signal(self, batch: Batch) -> Signal:
        teacher = batch.logprobs if self.off_ratio == "known" else None
        return Signal.of(batch, self.advantages(batch, self.baseline), teacher=teacher)


@register("mixed_shaping", "Mixed-Policy RL + Shaping")
class MixedShaping(Mixed):
    off_shaping: OffShaping = "regularized"


@register("luffy", "LUFFY")
class Luffy(MixedShaping):
    epsilon: Clip | None = None
