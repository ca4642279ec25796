"""The policy and the engine that a configuration asks for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import Config
from ..model.loading import load_model
from .engine import Engine, TorchEngine
from .ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_policy(config: Config, source: str | Path) -> PreTrainedModel:
    """The model in the precision that the engine trains it in."""
    engine = config.engine
    half = engine.engine == "deepspeed" and engine.precision == "bfloat16"  # its master weights are float32
    return load_model(
        source,
        device=engine.device,
        dtype=torch.bfloat16 if half else torch.float32,
        gradient_checkpointing=engine.gradient_checkpointing,
    )


def make_engine(model: PreTrainedModel, config: Config, updates: int, ranks: Ranks) -> Engine:
    """The engine that trains the model for so many optimiser steps."""
    if config.engine.engine == "torch":
        return TorchEngine(model, config, updates)
    from .deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, config, updates, ranks)
