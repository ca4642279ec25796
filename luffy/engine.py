"""Loading models, and the optimiser behind the trainer: the Engine protocol, and the engine of a single process (plain
torch, float32 weights, bfloat16 autocast if asked for)."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from . import hub, policy
from .batching import MicroBatch
from .config import TINY, Config, ConfigError
from .runs import NonFiniteError
from .templates import turn_end

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TINY_MODEL = Path(__file__).parent / "assets" / "tiny"


DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout")


def tune_cpu(num_threads: int) -> None:
    """Sets torch's threads, and has the C library keep freed memory for the next tensor.

    By default glibc returns every block above some 100 kB to the system and asks for it again, and touching fresh
    pages costs a small model's update a quarter of its time. Elsewhere than in glibc there is nothing to set.
    """
    torch.set_num_threads(num_threads)
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, (1 << 31) - 1)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def model_path(source: str | Path) -> str:
    """A folder or hub name: the embedded model's for "tiny"."""
    return str(TINY_MODEL) if source == TINY else hub.expanded(source)


def _refuse_adapter(source: str | Path) -> None:
    folder = Path(model_path(source))
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(f"{source} holds an adapter (LoRA), not a model: merge it into its base model and save that")


def _no_model(source: str | Path, error: Exception) -> ConfigError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    local = isinstance(error, hub.NotFoundError) or Path(model_path(source)).exists()
    return ConfigError(f"no model {str(source)!r}: {reason if local else hub.missing(source, reason)}")


def load_settings(source: str | Path) -> PreTrainedConfig:
    """The model's configuration. Raises ConfigError if there is no such model, or none that transformers knows."""
    from transformers import AutoConfig

    _refuse_adapter(source)
    try:
        return AutoConfig.from_pretrained(hub.locate(model_path(source)))
    except (OSError, ValueError) as error:
        raise _no_model(source, error) from error


def load_model(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """The causal language model "tiny", in a folder, or of a hub name, on its device, without dropout.

    Raises ConfigError if the weights are missing or damaged, the attention's package is not there, or the logits are
    not a linear head on the trunk.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    path = model_path(source)
    settings = load_settings(source)
    for name in DROPOUTS:  # the ratio of old and new policy must not depend on a mask drawn in between
        if hasattr(settings, name):
            setattr(settings, name, 0.0)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, config=settings, dtype=dtype, attn_implementation="sdpa")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot load the weights of {source}: {str(error).splitlines()[0]}") from error
    try:
        policy.check_model(model)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.nn.Module.to(model, pick_device(device))
    if attention != "sdpa":  # only now: flash attention's kernels are for a GPU, and what was checked above was not
        try:
            model.set_attn_implementation(attention)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"attention {attention}: {str(error).splitlines()[0]}") from error
    return model


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, as in `load_model`. Raises ConfigError if there is no such model, or it has no EOS."""
    from transformers import AutoTokenizer

    _refuse_adapter(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(hub.locate(model_path(source)))
    except (OSError, ValueError) as error:
        raise _no_model(source, error) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {source} has no EOS token: a completion could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def eos_ids(source: str | Path, tokenizer: PreTrainedTokenizerBase, template: str = "chat") -> list[int]:
    """Every token that ends a completion: the tokenizer's EOS, the one that ends a turn of the template, and those of
    the model's generation config."""
    from transformers import GenerationConfig

    try:
        more = GenerationConfig.from_pretrained(model_path(source)).eos_token_id
    except OSError:  # not every model has one
        more = getattr(load_settings(source), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, turn_end(tokenizer, template)}
    return sorted({*ends, *([more] if isinstance(more, int) else more or [])})


def learning_rate_factor(update: int, total: int, warmup: int, schedule: str) -> float:
    """Factor on the peak learning rate at optimiser step `update` (from 0) of `total`."""
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if schedule == "linear":
        return (total - update) / max(1, total - warmup)
    return 1.0


def learning_rate(config: Config, update: int, total: int) -> float:
    """The learning rate of optimiser step `update` (from 0) of `total`."""
    factor = learning_rate_factor(update, total, config.warmup_steps, config.lr_schedule)
    return factor * config.peak_learning_rate


def adamw(model: PreTrainedModel, config: Config, *, fused: bool = False) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.peak_learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=fused or None,
    )


def model_logprobs(model: PreTrainedModel, batch: MicroBatch, config: Config) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of a micro-batch's tokens under a model, as `policy.token_logprobs`, in the
    configuration's precision."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        return policy.token_logprobs(model, batch, temperature=config.temperature, chunk_size=config.logits_chunk_size)


class Engine(Protocol):
    """What the trainer needs of whatever updates the policy."""

    def token_logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of a micro-batch's tokens under the policy, as `policy.token_logprobs`."""
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
        """Writes the model in Hugging Face layout with its tokenizer, and the optimiser's state."""
        ...

    def load_optimizer(self, folder: Path) -> None:
        """Restores what `save` wrote beside the model; the model itself is loaded with load_model."""
        ...

    def close(self) -> None:
        """Gives back the memory that garbage collection would not."""
        ...


class TorchEngine:
    """AdamW over one model in one process: backward accumulates, step clips and updates."""

    def __init__(self, model: PreTrainedModel, config: Config, total_updates: int) -> None:
        self.model = model
        self.config = config
        self.total_updates = total_updates
        self.updates = 0
        self.optimizer = adamw(model, config)

    def token_logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        # transformers recomputes activations only in training mode, in which it in turn refuses to sample with a cache
        self.model.train(self.config.gradient_checkpointing)
        try:
            return model_logprobs(self.model, batch, self.config)
        finally:
            self.model.eval()

    def backward(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise NonFiniteError(f"the loss is {loss.item()}")
        loss.backward()

    def step(self) -> dict[str, float]:
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm).item()
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
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        torch.save({"optimizer": self.optimizer.state_dict(), "updates": self.updates}, folder / "optimizer.pt")

    def load_optimizer(self, folder: Path) -> None:
        state = torch.load(folder / "optimizer.pt", map_location=self.model.device, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]

    def close(self) -> None:
        pass
