"""From a language model to the log-probabilities and entropies of its completion tokens.

The model's trunk runs on packed sequences. Only hidden states that predict a completion token go through the head, in
chunks whose logits are made again in backward. So never more than two chunks x vocabulary are alive in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from . import attention
from .packing import TokenSequence, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .packing import MicroBatch

# transformers makes no mask of its own where it is given one of four dimensions; packed attention reads none
NO_MASK = torch.empty(1, 1, 1, 1)


class Head(nn.Linear):
    """An output layer that gives log-probs and entropies of targets where it is asked for them, else logits.

    One call for all chunks: wherever weights are gathered for a module's call (ZeRO 3), ranks call equally often.
    """

    def forward(
        self, states: Tensor, targets: Tensor | None = None, *, temperature: float = 1.0, chunk_size: int = 1024
    ) -> Any:
        if targets is None:
            return super().forward(states)
        return head_logprobs(
            states, self.weight, targets, bias=self.bias, temperature=temperature, chunk_size=chunk_size
        )


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, both (M,) float32 with gradient.

    hidden: (M, d) states before the head; weight: (V, d), bias: (V,) the head's; targets: (M,) int64; temperature
    divides the logits. chunk_size: tokens whose logits exist at once, in forward and in backward.
    """
    return _HeadLogprobs.apply(hidden, weight, bias, targets, temperature, chunk_size)  # type: ignore[no-any-return]


class _HeadLogprobs(torch.autograd.Function):
    """With logits z, log Z their logsumexp, p = exp(z - log Z) and H the entropy: d log p_t / dz = [t] - p and
    dH / dz = -p (z - log Z + H)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.temperature, ctx.chunk = temperature, chunk
        logp, entropy, normalizer = hidden.new_empty(3, len(hidden), dtype=torch.float32)
        for at in _slices(len(hidden), chunk):
            logits = _logits(ctx, hidden[at], weight, bias)
            highest = logits.amax(-1)
            probs = logits.sub_(highest[:, None]).exp()
            total = probs.sum(-1)
            chosen = logits.gather(-1, targets[at, None]).squeeze(-1)
            logp[at] = chosen - total.log()
            entropy[at] = total.log() - probs.mul_(logits).sum(-1) / total
            normalizer[at] = highest + total.log()
            del logits, probs
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, normalizer)
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        to_logp, to_entropy = gradients
        hidden, weight, bias, targets, entropy, normalizer = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        # over many chunks a sum in bfloat16 would lose the small ones
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        for at in _slices(len(hidden), ctx.chunk):
            slope = _logits(ctx, hidden[at], weight, bias).sub_(normalizer[at, None])
            if to_entropy is None:
                slope.exp_().mul_(-(to_logp if to_logp is not None else torch.zeros_like(entropy))[at, None])
            else:
                probs = slope.exp()
                slope.add_(entropy[at, None]).mul_(-to_entropy[at, None])
                if to_logp is not None:
                    slope.sub_(to_logp[at, None])
                slope.mul_(probs)
                del probs
            if to_logp is not None:
                slope.scatter_add_(-1, targets[at, None], to_logp[at, None])
            slope = slope.div_(ctx.temperature).to(ctx.dtype)
            if d_hidden is not None:
                d_hidden[at] = slope @ weight.to(ctx.dtype)
            if d_weight is not None:
                states = hidden[at].to(ctx.dtype)
                if ctx.dtype == torch.float32:
                    d_weight.addmm_(slope.T, states)  # without a product beside it
                else:
                    d_weight += slope.T @ states
            if d_bias is not None:
                d_bias += slope.sum(0)
            del slope
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None


def _slices(length: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, length, chunk)]


def _logits(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(c, V) float32, by the temperature."""
    logits = linear(states.to(ctx.dtype), weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype))
    return logits.float().div_(ctx.temperature)


def token_logprobs(
    model: PreTrainedModel, batch: MicroBatch, *, temperature: float = 1.0, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, (M,) float32 each, of the micro-batch's completion tokens.

    For any Hugging Face causal language model that `prepare` has accepted. Raises ValueError for one that has not seen
    it, whose sequences would see each other.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, Head):
        raise ValueError(f"this {type(model).__name__} is not prepared for packed sequences: see prepare")
    trunk = model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=NO_MASK,
        use_cache=False,
        layout=batch.layout,
    )
    hidden = trunk.last_hidden_state[0].index_select(0, batch.predictors)
    return head(hidden, batch.targets, temperature=temperature, chunk_size=chunk_size)


def prepare(model: PreTrainedModel, *, check: bool = True) -> None:
    """Gives a model packed attention and a head that can be asked for log-probs; it stays what it is to all others.

    Raises ValueError, and leaves the model as it was, unless `token_logprobs` then says of packed sequences what the
    model says of each alone. That is not so for models that cap or scale their logits, or look at a part of a
    sequence only; nor where the rotary embedding depends on what else is in a row, or attention gets no keywords.
    check: compute with it (`check_model`); else by its settings alone.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(model.config, "sliding_window", None):
        raise ValueError(f"{name} has attention that is not full (sliding windows, linear layers)")
    if rope_type(model) == "longrope":
        raise ValueError(f"{name} has a rotary embedding (longrope) that depends on the longest sequence of a row")
    if type(head) not in (nn.Linear, Head):
        raise ValueError(f"{name} has no plain linear layer as its output")
    before = type(head), model.config._attn_implementation
    head.__class__, model.config._attn_implementation = Head, attention.NAME
    try:
        if check:
            check_model(model)
    except Exception:
        head.__class__, model.config._attn_implementation = before
        raise


def rope_type(model: PreTrainedModel) -> str:
    """The kind of a model's rotary embedding, by transformers' name."""
    return (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")  # type: ignore[no-any-return]


@torch.no_grad()
def check_model(model: PreTrainedModel) -> None:
    """Raises ValueError unless the model's logits are its output head on its trunk's last hidden state, and a packed
    sequence has the log-probs that the model gives it alone."""
    name, words = type(model).__name__, np.arange(6) % model.config.vocab_size
    sequences = [TokenSequence(words[:2], words[2:]), TokenSequence(words[:2], words[:2])]
    expected = []
    for sequence in sequences:
        ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.completion_ids])).to(model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits.float()
        if not bool(logits.isfinite().all()):
            raise ValueError(f"{name} computes logits that are not numbers: its weights are damaged")
        trunk = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state
        if not torch.allclose(model.get_output_embeddings()(trunk).float(), logits, atol=1e-3, rtol=1e-3):
            raise ValueError(f"{name} transforms its logits after the head, which is not supported")
        first = len(sequence.prompt_ids)
        expected.append(logits[0, first - 1 : -1].log_softmax(-1).gather(-1, ids[first:, None]).squeeze(-1))
    found = _packed_logprobs(model, sequences)
    beside = TokenSequence(words[:2], words[2:][::-1].copy())
    other = _packed_logprobs(model, [beside, sequences[1]])
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.2  # other kernels round otherwise
    same = torch.equal(found[-2:], other[-2:])  # in any precision
    if not same or not torch.allclose(found, torch.cat(expected), atol=tolerance, rtol=tolerance):
        raise ValueError(f"{name} does not keep packed sequences apart")


def _packed_logprobs(model: PreTrainedModel, sequences: list[TokenSequence]) -> Tensor:
    batch = pack(sequences, micro_batch_tokens=100)[0].to(model.device)
    found = torch.empty(len(batch.targets), device=model.device)
    try:
        found[batch.token_index] = token_logprobs(model, batch)[0]
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{type(model).__name__} does not take packed sequences: {error}") from error
    return found
