"""From a language model to the log-probabilities and entropies of its completion tokens.

The model's trunk runs on packed rows; only hidden states that predict a completion token go through the head, in
chunks that are recomputed in backward, so never more than chunk x vocabulary logits are alive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .packing import MicroBatch


def head_logprobs(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, temperature: float = 1.0, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, both (M,) float32 with gradient.

    hidden: (M, d) states before the head; targets: (M,) int64; temperature divides the logits.
    chunk_size: tokens whose logits exist at once, in forward and in backward.
    """

    def chunk_logprobs(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).float() / temperature
        log_normalizer = logits.logsumexp(-1)
        logp = logits.gather(-1, tokens[:, None]).squeeze(-1) - log_normalizer
        entropy = log_normalizer - (torch.softmax(logits, -1) * logits).sum(-1)
        return logp, entropy

    if torch.is_grad_enabled():
        pieces = [
            checkpoint(chunk_logprobs, states, tokens, use_reentrant=False, preserve_rng_state=False)
            for states, tokens in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
        ]
    else:
        pieces = [
            chunk_logprobs(states, tokens)
            for states, tokens in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
        ]
    logps, entropies = zip(*pieces, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def token_logprobs(
    model: PreTrainedModel, batch: MicroBatch, *, temperature: float = 1.0, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, (M,) float32 each, of the micro-batch's completion tokens.

    For any Hugging Face causal language model that passes `check_model`.
    """
    # attention_mask stays None and use_cache False: only then do position ids keep packed sequences apart.
    trunk = model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    hidden = trunk.last_hidden_state.flatten(0, 1)[batch.predictors]
    return head_logprobs(
        hidden, model.get_output_embeddings(), batch.targets, temperature=temperature, chunk_size=chunk_size
    )


@torch.no_grad()
def check_model(model: PreTrainedModel) -> None:
    """Raises ValueError unless the model's logits are its output head on its trunk's last hidden state.

    Models that cap or scale their logits are found by looking at what they compute, on one short input.
    """
    ids = torch.arange(4, device=model.device)[None] % model.config.vocab_size
    trunk = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    ours, theirs = model.get_output_embeddings()(trunk).float(), model(input_ids=ids, use_cache=False).logits.float()
    if not bool(theirs.isfinite().all()):
        raise ValueError(f"{type(model).__name__} computes logits that are not numbers: its weights are damaged")
    if not torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3):
        raise ValueError(f"{type(model).__name__} transforms its logits after the head, which is not supported")
