"""The optimiser behind the trainer: the Engine protocol, and the engine of a single process (plain torch, float32
weights, bfloat16 autocast if asked for)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..config import Config
from ..errors import NonFiniteError
from ..model import adapters
from ..model.loading import without_bars
from ..model.logprobs import token_logprobs
from ..model.packing import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def learning_rate_factor(update: int, total: int, warmup: int, schedule: str, least: float = 0.0) -> float:
    """Factor on the peak learning rate at optimiser step `update` (from 0) of `total`; it decays to `least`."""
    if update < warmup:
        return (update + 1) / (warmup + 1)
    left = max(0, total - update) / max(1, total - warmup)  # (a method may make more steps than are usual)
    decayed = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[schedule]
    return least + (1 - least) * decayed


def learning_rate(config: Config, update: int, total: int) -> float:
    """The learning rate of optimiser step `update` (from 0) of `total`."""
    options = config.update
    factor = learning_rate_factor(update, total, options.warmup_steps, options.lr_scheduler_type, options.min_lr_rate)
    return factor * config.method.learning_rate(options.learning_rate)


def adamw(model: PreTrainedModel, config: Config, *, fused: bool = False) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.method.learning_rate(config.update.learning_rate),
        betas=(0.9, config.update.adam_beta2),
        eps=config.update.adam_epsilon,
        weight_decay=config.update.weight_decay,
        fused=fused or None,
    )


def model_logprobs(model: PreTrainedModel, batch: MicroBatch, config: Config) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of a micro-batch's tokens under a model, as `token_logprobs`, in the configuration's
    precision."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=config.engine.precision == "bfloat16"):
        return token_logprobs(
            model, batch, temperature=config.sampling.temperature, chunk_size=config.update.logits_chunk_size
        )


class Engine(Protocol):
    """What the trainer needs of whatever updates the policy."""

    def token_logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of a micro-batch's tokens under the policy, as `token_logprobs`."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one micro-batch's share of the loss. Raises NonFiniteError."""
        ...

    def step(self) -> dict[str, float]:
        """Clips, updates and clears the gradient. Returns grad_norm (before clipping) and lr. Raises NonFiniteError."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights by their Hugging Face names; a tensor holds until the next one is asked for."""
        ...

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the model in Hugging Face layout (of adapters: those, in peft's) with its tokenizer, and the
        optimiser's state. Raises NonFiniteError if a weight is not finite."""
        ...

    def load_optimizer(self, folder: Path) -> None:
        """Restores what `save` wrote beside the model; the model itself is loaded with load_model."""
        ...

    def close(self) -> None:
        """Gives back the memory that garbage collection would not."""
        ...


def check_finite(model: PreTrainedModel) -> None:
    """Raises NonFiniteError if a weight, or this rank's share of it, is not finite: a run cannot go on from it."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(getattr(parameter, "ds_tensor", parameter)).all()):
            raise NonFiniteError(f"the weight {name} is not finite any more, and no checkpoint is made of it")


class TorchEngine:
    """AdamW over one model in one process: backward accumulates, step clips and updates."""

    def __init__(self, model: PreTrainedModel, config: Config, total_updates: int) -> None:
        self.model = model
        self.config = config
        self.total_updates = total_updates
        self.updates = 0
        self.optimizer = adamw(model, config, fused=model.device.type == "cuda")

    def token_logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        # transformers recomputes activations only in training mode, in which it in turn refuses to sample with a cache
        self.model.train(self.config.engine.gradient_checkpointing)
        try:
            return model_logprobs(self.model, batch, self.config)
        finally:
            self.model.eval()

    def backward(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise NonFiniteError(f"the loss is {loss.item()}")
        loss.backward()

    def step(self) -> dict[str, float]:
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.update.max_grad_norm).item()
        if not math.isfinite(grad_norm):
            raise NonFiniteError(f"the gradient's norm is {grad_norm}")
        rate = learning_rate(self.config, self.updates, self.total_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return {"grad_norm": grad_norm, "lr": rate}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, _, make in adapters.whole(self.model):
            yield name, make()

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        check_finite(self.model)
        if self.config.engine.lora_r:
            adapters.save(self.model, folder)
        else:
            with without_bars(sum(parameter.nbytes for parameter in self.model.parameters())):
                self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        torch.save({"optimizer": self.optimizer.state_dict(), "updates": self.updates}, folder / "optimizer.pt")

    def load_optimizer(self, folder: Path) -> None:
        state = torch.load(folder / "optimizer.pt", map_location=self.model.device, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]

    def close(self) -> None:
        pass
