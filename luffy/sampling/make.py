"""The sampler that a training configuration asks for."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..config import Config
from ..errors import ConfigError
from ..model.loading import load_model, model_path
from .local import TransformersSampler
from .protocol import Sampler
from .ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def make_sampler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    ends: Sequence[int],
    ranks: Ranks,
) -> Sampler:
    """The sampler of a rank; called by all of them, before there is an engine.

    ends: the tokens that end a completion. Raises ConfigError, SamplerError.
    """
    options = config.sampling
    window = config.data.max_prompt_length + config.data.max_completion_length
    if options.sampler == "vllm" and options.vllm_servers:
        from .servers import ServerSampler

        return ServerSampler(
            options.vllm_servers,
            model,
            eos_ids=ends,
            max_model_len=window,
            device=model.device,
            sends=ranks.first,
            token=ranks.broadcast(secrets.token_hex(4)),
            rows=options.sampler_rows,
            timeout_s=options.sampler_timeout,
        )
    if options.sampler == "vllm":
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            if model.device.type == "cuda" and "expandable_segments:True" in os.environ.get(name, ""):
                raise ConfigError(
                    f"{name} has expandable_segments:True: such memory can be neither shared with vLLM's process nor "
                    "put to sleep; unset it, or generate on servers (vllm_servers)"
                )
        from .tensor_parallel import TensorParallelSampler
        from .vllm_sampler import VLLMOptions, VLLMSampler

        together = options.vllm_tensor_parallel_size
        settings = VLLMOptions(
            model=model_path(config.model),
            eos_ids=tuple(ends),
            max_model_len=window,
            dtype=config.engine.precision,
            device=model.device.type,
            gpu=model.device.index or 0,
            gpu_memory=options.vllm_gpu_memory_utilization,
            cache_mb=options.vllm_cache_mb,
            max_rows=options.sampler_rows,
            tensor_parallel_size=together,
            tensor_parallel_rank=ranks.rank % together,
        )
        timeout = options.sampler_timeout
        sampler: Sampler
        if together > 1:
            sampler = TensorParallelSampler(settings, ranks.neighbours(together), timeout_s=timeout)
        else:
            sampler = VLLMSampler(settings, timeout_s=timeout)
        sampler.sleep()
        return sampler
    # A model whose weights are sharded cannot be sampled from: another one gets them before every step.
    copied = config.engine.engine == "deepspeed" and config.engine.zero_stage == 3
    return TransformersSampler(
        load_model(config.model, device=config.engine.device, dtype=model.dtype) if copied else model,
        eos_ids=ends,
        pad_id=tokenizer.pad_token_id,
        max_rows=options.sampler_rows,
        copied=copied,
    )
