"""The sampler that a training configuration asks for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..config import Config
from ..model.loading import model_path
from .local import TransformersSampler
from .protocol import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def make_sampler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    ends: Sequence[int],
    place: int | None,
) -> Sampler:
    """The sampler of a rank; called before the engine shards the model.

    ends: the tokens that end a completion. place: which of the ranks that sample it is, None if it does not (its
    sampler is then never asked for anything).
    """
    options = config.sampling
    if options.sampler == "vllm" and place is not None:
        from .vllm_sampler import VLLMOptions, VLLMSampler

        settings = VLLMOptions(
            model=model_path(config.model),
            eos_ids=tuple(ends),
            max_model_len=config.data.max_prompt_length + config.data.max_completion_length,
            dtype=config.engine.precision,
            device=model.device.type,
            gpu=model.device.index or 0,
            gpu_memory=options.vllm_gpu_memory_utilization,
            cache_mb=options.vllm_cache_mb,
            max_rows=options.sampler_rows,
        )
        address = options.vllm_servers[place] if options.vllm_servers else None
        sampler = VLLMSampler(settings, timeout_s=options.sampler_timeout, address=address)
        sampler.sleep()
        return sampler
    # A model whose weights are sharded cannot be sampled from: a copy, which gets the weights before every step.
    copied = config.engine.engine == "deepspeed" and config.engine.zero_stage == 3 and place is not None
    return TransformersSampler(
        copy.deepcopy(model) if copied else model,
        eos_ids=ends,
        pad_id=tokenizer.pad_token_id,
        max_rows=options.sampler_rows,
    )
