"""The policy and the engine that a configuration asks for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import Config
from ..model import adapters
from ..model.loading import load_model
from ..sampling.ranks import Ranks
from .engine import Engine, TorchEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_policy(config: Config, source: str | Path) -> PreTrainedModel:
    """The model in the precision that the engine trains it in. source: the base model, or a checkpoint of the run."""
    engine = config.engine
    # the rest of the weights are float32, whether trained (torch) or beside these ones (deepspeed's master weights)
    half = engine.precision == "bfloat16" and (engine.engine == "deepspeed" or engine.lora_r > 0)
    model = load_model(
        config.model if engine.lora_r else source,
        device=engine.device,
        dtype=torch.bfloat16 if half else torch.float32,
        gradient_checkpointing=engine.gradient_checkpointing,
        load_in_4bit=engine.load_in_4bit,
    )
    if engine.lora_r:
        adapters.add(model, engine, config.model, config.seed)
        if source != config.model:
            adapters.load(model, Path(source))
        if engine.engine == "deepspeed":  # which wants weights of one precision, and has float32 ones besides
            torch.nn.Module.to(model, model.dtype)
    return model


def make_engine(model: PreTrainedModel, config: Config, updates: int, ranks: Ranks) -> Engine:
    """The engine that trains the model for so many optimiser steps."""
    if config.engine.engine == "torch":
        return TorchEngine(model, config, updates)
    from .deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, config, updates, ranks)
