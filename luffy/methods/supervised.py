"""Supervised learning from demonstrations: alone, beside reinforcement learning, and before it (Table 1)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from ..errors import ConfigError
from .base import Method, RunConfig, register
from .fields import Count, NonNegative, Positive, PositiveInt
from .mixed import WithTraces
from .on_policy import OnPolicy
from .rows import Batch, Draw, Rounds, Signal, whole

FIRST_STAGE = "first_stage"


@register("sft", "SFT")
class SFT(Method):
    """Groups are their demonstrations alone and nothing is sampled."""

    samples = False
    defaults: ClassVar[dict[str, Any]] = {"lr_scheduler_type": "linear", "max_grad_norm": 1.0}

    entropy_coef: NonNegative = 0.0
    num_off_policy: PositiveInt = 1
    """Demonstrations of a problem in a step."""
    sft_loss_coef: Positive = 1.0
    """Weight of the token-mean negative log-likelihood of the demonstrations."""
    sft_learning_rate: Positive = 2e-3
    """Peak learning rate."""

    def rounds(self, draw: Draw) -> Rounds:
        yield [whole(trace) for trace in draw.some_traces(self.num_off_policy)]

    def signal(self, batch: Batch) -> Signal:
        return Signal.of(batch, batch.advantages(), policy=0.0, likelihood=self.sft_loss_coef)

    def learning_rate(self, usual: float) -> float:
        return self.sft_learning_rate

    def traces_wanted(self) -> int:
        return self.num_off_policy


@register("rl_sft_loss", "RL w/ SFT Loss")
class RLSFTLoss(WithTraces):
    """Rollouts learn by reward, demonstrations by their likelihood."""

    sft_loss_coef: NonNegative = 0.003
    """Weight of the token-mean negative log-likelihood of the demonstrations."""

    def signal(self, batch: Batch) -> Signal:
        return self.imitating(batch, self.sft_loss_coef, baseline="on_policy")


@register("sft_rl", "SFT+RL")
class SFTRL(OnPolicy):
    """Supervised fine-tuning of the base model, then on-policy RL on problems that the first has not seen."""

    first_stage_steps: Count = 0
    """Steps of the first stage; 0: as many as of the second."""
    first_stage_num_off_policy: PositiveInt = 1
    """Demonstrations of a problem in a step of the first stage."""
    first_stage_warmup_steps: Count | None = None
    """Optimiser steps of warm-up in the first stage; None: warmup_steps."""
    sft_learning_rate: Positive = 1e-3
    """Peak learning rate of the first stage."""
    complement: str = "tinyworld"
    """Where the second stage takes its problems, which the first has not seen."""
    complement_split: str = "complement"
    """Split of the complement."""

    def check(self, config: RunConfig) -> None:
        super().check(config)
        data = config.data
        if data.dataset != "tinyworld" and self.complement == "tinyworld":
            raise ConfigError(f"{self.name} on {data.dataset} needs a complement: problems for its second stage")
        if (data.dataset, data.dataset_split) == (self.complement, self.complement_split):
            raise ConfigError(f"the complement of {self.name} must be other problems than its dataset")
        self.stages(config)  # each is checked when it is made

    def stages(self, config: RunConfig) -> list[tuple[str, Any]]:
        sft = SFT(num_off_policy=self.first_stage_num_off_policy, sft_learning_rate=self.sft_learning_rate)
        steps = self.first_stage_steps or config.max_steps
        values = dict(SFT.defaults)
        if self.first_stage_warmup_steps is not None:
            values["warmup_steps"] = self.first_stage_warmup_steps
        first = config.replace(method=sft, max_steps=steps, final_eval_problems=0, **values)
        shared = {f.name: getattr(self, f.name) for f in fields(OnPolicy)}
        last = config.replace(
            method=OnPolicy(**shared), model=FIRST_STAGE, dataset=self.complement, dataset_split=self.complement_split
        )
        return [(FIRST_STAGE, first), ("", last)]
