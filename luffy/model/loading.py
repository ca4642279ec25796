"""Models and tokenizers from their names: the embedded one, a folder, or the hub."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import TINY
from ..data import hub
from ..data.templates import turn_end
from ..errors import ConfigError
from . import adapters, bases, smollm
from .logprobs import prepare

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TINY_MODEL = bases.PRETRAINED
DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout")


def tune_cpu(num_threads: int) -> None:
    """Sets torch's threads, and has the C library keep freed memory for the next tensor.

    By default glibc returns every block above some 100 kB to the system and asks for it again. Touching fresh pages
    costs a small model's update a quarter of its time. Elsewhere than in glibc there is nothing to set.
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


BAR_BYTES = 1 << 30  # from which a model is read or written under a progress bar


def model_path(source: str | Path) -> str:
    """A folder or hub name: the embedded model's for "tiny", those of bases.py and smollm.py, which are made if need
    be, and the model's of an adapter."""
    if source == TINY:
        return str(TINY_MODEL)
    if adapters.is_adapter(source):
        return model_path(adapters.base_of(source))
    if source == smollm.NAME:
        return str(smollm.locate())
    base = bases.parse(str(source))
    return str(bases.locate(base)) if base else hub.expanded(source)


def check_model(source: str) -> None:
    """Raises ConfigError for a model that is nowhere, without loading or making it."""
    try:
        if source == smollm.NAME:
            smollm.weights_file()
        elif source != TINY and bases.parse(source) is None:
            hub.check_model(source)
    except hub.NotFoundError as error:
        raise ConfigError(f"no model {source!r}: {error}") from error


def _no_model(source: str | Path, error: Exception) -> ConfigError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    local = isinstance(error, hub.NotFoundError) or Path(model_path(source)).exists()
    return ConfigError(f"no model {str(source)!r}: {reason if local else hub.missing(source, reason)}")


def load_settings(source: str | Path) -> PreTrainedConfig:
    """The model's configuration. Raises ConfigError if there is no such model, or none that transformers knows."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(hub.locate(model_path(source)))
    except (OSError, ValueError) as error:
        raise _no_model(source, error) from error


@contextmanager
def without_bars(size: int) -> Iterator[None]:
    """Leaves out transformers' bars while a model of so many bytes is read or written, if that takes no time."""
    from transformers.utils import logging

    if size >= BAR_BYTES or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def load_model(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    load_in_4bit: bool = False,
    sharded: bool = False,
) -> PreTrainedModel:
    """The causal language model "tiny", in a folder, or of a hub name, on its device, without dropout; a folder with an
    adapter stands for its model with the adapter's changes. sharded: this is within DeepSpeed's `sharded`, which keeps
    a share of the weights in each rank; such a model cannot compute yet, and is checked by its engine.

    Raises ConfigError if the weights are missing or damaged, or the model is none of those that `prepare` accepts.
    """
    if adapters.is_adapter(source):  # perhaps on a model that is itself one with an adapter, as SFT+RL makes them
        if load_in_4bit:
            raise ConfigError(f"{source} holds an adapter, which weights in 4 bits cannot take up: luffy data merge")
        model = load_model(
            adapters.base_of(source), device=device, dtype=dtype, gradient_checkpointing=gradient_checkpointing
        )
        return adapters.attach(model, Path(source))
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    path = model_path(source)
    settings = load_settings(source)
    for name in DROPOUTS:  # the ratio of old and new policy must not depend on a mask drawn in between
        if hasattr(settings, name):
            setattr(settings, name, 0.0)
    # read tensor by tensor to where they belong, without a copy on the CPU
    more: dict[str, Any] = {} if sharded else {"device_map": {"": pick_device(device)}}
    if load_in_4bit:
        from transformers import BitsAndBytesConfig

        quantized = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        more["quantization_config"] = quantized
    files = list(Path(path).glob("*.safetensors"))
    try:
        with without_bars(sum(file.stat().st_size for file in files) if files else BAR_BYTES):
            model = AutoModelForCausalLM.from_pretrained(
                path,
                config=settings,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                **more,
            )
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot load the weights of {source}: {str(error).splitlines()[0]}") from error
    try:
        prepare(model, check=not sharded)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, as in `load_model`. Raises ConfigError if there is no such model, or it has no EOS."""
    from transformers import AutoTokenizer

    folder = str(source) if adapters.is_adapter(source) else model_path(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(hub.locate(folder))
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
