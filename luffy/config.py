"""The configuration of a run: flat in files and on the command line, in groups here.

Defaults are the tiny tier: the embedded world and its base model, on a CPU. A value comes from, in rising priority:
these defaults, the method, a config file, the command line or keyword arguments. Types, choices and bounds stand at the
fields; the combinations that are impossible are at the end.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field

from . import methods
from .errors import ConfigError
from .methods import METHODS, Method
from .methods.fields import (
    Count,
    Device,
    Int,
    JsonMapping,
    Name,
    NonNegative,
    Positive,
    PositiveInt,
    RewardName,
    Servers,
    Share,
    settings,
    unknown_field,
)  # fmt: skip

TINY = "tiny"
DEFAULT_MODEL = "tiny:own_share=0.4"
TINYWORLD = "tinyworld"

Template = Literal["chat", "paper", "llama", "qwen", "simplerl", "prime", "no"]


@settings
class DataOptions:
    """The problems, and how they are asked."""

    dataset: Name = TINYWORLD
    """Training problems: "tinyworld", a .parquet/.csv/.json/.jsonl file, or a hub name."""
    dataset_split: str = "train"
    """Split of the data set; of the tiny world, "train" or "complement"."""
    num_problems: Count = 0
    """Training problems taken from the data set; 0: all of a file, 1,000 of the tiny world."""
    template: Template = "chat"
    """Prompt template: "chat" (the tokenizer's own), paper (App. C.2), llama, qwen, simplerl, prime, no."""
    template_kwargs: JsonMapping = field(default_factory=dict)
    """Variables of the tokenizer's own template, such as {"enable_thinking": false}; as a flag: JSON."""
    max_prompt_length: PositiveInt = 64
    """Longest prompt in tokens; longer ones are left out."""
    max_completion_length: PositiveInt = 128
    """Window of a completion in tokens, rollout or demonstration."""
    long_traces: Literal["cut", "drop"] = "cut"
    """A trace longer than the window is "cut" to it, without EOS, or left out ("drop")."""


@settings
class WorldOptions:
    """The embedded world, where the data set is "tinyworld"."""

    difficulties: Annotated[tuple[Annotated[Int, Field(ge=2, le=100)], ...], Field(min_length=1)] = (3, 4, 5, 6, 7)
    """Difficulties of the training problems: the number of operations plus one."""
    trace_errors: Share = 0.0
    """Share of traces that end in a wrong answer."""
    num_traces: PositiveInt = 1
    """Traces per problem, of which num_off_policy join a group."""
    verbosity: Share = 0.3
    """Share of a trace's steps that the teacher writes down once more."""


@settings
class SamplingOptions:
    """How the groups of a step are sampled."""

    rollout_batch_size: PositiveInt = 16
    """Problems per step."""
    num_generations: PositiveInt = 8
    """Rows of a group, demonstrations included."""
    temperature: Positive = 1.0
    """Sampling temperature in training."""
    sampler: Literal["transformers", "vllm"] = "transformers"
    """What generates: "transformers" (the policy's own weights), or "vllm" (a process of its own on the device)."""
    sampler_rows: PositiveInt = 512
    """Completions sampled at once."""
    sampler_timeout: Positive = 600.0
    """vLLM only: seconds without a sign of life (from servers: without a completion) after which its process is started
    again, or a server connected to once more, once in a run."""
    sampler_gap_limit: Positive = 0.2
    """Mean difference between the sampler's log-probs and the trainer's, in nats, that ends the run."""
    vllm_importance_sampling_cap: Positive | None = None
    """Weight on-policy tokens with min(cap, trainer's probability / sampler's); None: no correction (the paper)."""
    vllm_servers: Servers = ()
    """Addresses (host:port) of vLLM servers (`luffy serve`) to generate on, shared by all ranks; none: the ranks' own
    devices."""
    vllm_tensor_parallel_size: PositiveInt = 1
    """vLLM only: neighbouring ranks whose devices hold one copy of the sampled model; a server has its own number."""
    vllm_gpu_memory_utilization: Annotated[Positive, Field(le=1)] = 0.4
    """vLLM only: share of the GPU's memory for its weights and cache."""
    vllm_cache_mb: Count = 0
    """vLLM only: size of its key-value cache; 0: what vllm_gpu_memory_utilization leaves, on a CPU 512."""


@settings
class RewardOptions:
    """What a completion is rewarded for."""

    reward: RewardName = "math_verify"
    """"math_verify", or "module:function" with reward(prompts, completions, **columns) -> list[float]."""
    think_format: bool | None = None
    """Whether an answer without a closed think block gets no reward; None: if the prompt ends inside an open one."""
    boxed_format: bool = False
    """Whether an answer that is not boxed gets no reward."""
    verifier_workers: PositiveInt = 1
    """Processes that check answers."""
    verifier_timeout: Positive = 5.0
    """Seconds a check may take."""


@settings
class UpdateOptions:
    """The optimiser steps."""

    mini_batch_size: PositiveInt = 8
    """Problems per optimiser step; divides rollout_batch_size."""
    num_iterations: PositiveInt = 1
    """Passes over the rows of a step."""
    loss_type: Literal["dr_grpo", "dapo", "grpo"] = "dr_grpo"
    """Denominator of the policy term: "dr_grpo" rows x max_completion_length (the paper's practice), "dapo" tokens (Z
    of Eq. 5), "grpo" rows x the tokens of each row."""
    learning_rate: Positive = 1.5e-4
    """Peak learning rate of reinforcement learning (AdamW)."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: "constant", or "linear" or "cosine" decay until after the last step."""
    min_lr_rate: Share = 0.0
    """Share of the peak learning rate that it decays to."""
    warmup_steps: Count = 5
    """Optimiser steps of linear warm-up."""
    weight_decay: NonNegative = 0.01
    """AdamW's decoupled weight decay."""
    adam_beta2: Annotated[Positive, Field(lt=1)] = 0.999
    """AdamW's second-moment decay; the first is 0.9."""
    adam_epsilon: Positive = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Positive = 0.015625
    """Gradient clipping by global norm. The default is the reference's 1.0 on our scale (methods/REFERENCE.md)."""
    recompute_old_logp: bool = False
    """Take old log-probs from a forward pass rather than from the sampler; needed where the two differ in precision."""
    micro_batch_tokens: PositiveInt = 8192
    """Tokens per forward and backward pass; changes memory and speed, not the gradient."""
    logits_chunk_size: PositiveInt = 4096
    """Tokens whose logits exist at once."""


@settings
class EngineOptions:
    """The machine: what updates, where, and in which precision."""

    engine: Literal["torch", "deepspeed"] = "torch"
    """"torch" (one process) or "deepspeed" (one process per GPU: `luffy train --nproc 8`)."""
    zero_stage: Annotated[Int, Field(ge=1, le=3)] = 2
    """DeepSpeed only: what is sharded over the ranks: 1 the optimiser's state, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """DeepSpeed only: keep the optimiser's state, and take its steps, on the CPU."""
    device: Device = "auto"
    """"cpu", "cuda", or "auto": a GPU if there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """"float32", or "bfloat16": autocast over float32 weights (torch), bfloat16 weights with float32 master weights
    (deepspeed)."""
    gradient_checkpointing: bool = False
    """Recompute the trunk's activations in backward."""
    num_threads: PositiveInt = 1
    """CPU threads of torch; other values may change the last bits."""
    lora_r: Count = 0
    """Rank of low-rank adapters (LoRA), which are then all that is trained; 0: every weight is."""
    lora_alpha: PositiveInt = 32
    """Adapters are scaled by lora_alpha / lora_r."""
    lora_target_modules: tuple[str, ...] = ()
    """Names of the linear layers that have adapters, such as q_proj; none: all but the output head."""
    load_in_4bit: bool = False
    """Adapters only: keep the frozen weights in 4 bits (bitsandbytes, on a GPU)."""


@settings
class EvaluationOptions:
    """Validation during training, and the evaluation after the last step."""

    eval_datasets: Annotated[tuple[Name, ...], Field(min_length=1)] = (TINYWORLD,)
    """Evaluation problems: "tinyworld" for all its families, names of data/benchmarks.py, files or hub names."""
    ood_sources: tuple[str, ...] = ("words", "flip", "prefix", "lines", "arc_c", "gpqa", "mmlu_pro")
    """Benchmarks (in own files: sources) that count as out of distribution."""
    eval_steps: Count = 25
    """Steps between validations, 0 for none."""
    eval_problems: PositiveInt = 60
    """Problems per family in a validation."""
    eval_temperature: NonNegative = 0.6
    """Sampling temperature of evaluations, 0 for greedy."""
    final_eval_problems: Count = 500
    """Problems per family in the evaluation after the last step, 0 for none."""
    final_eval_samples: PositiveInt = 4
    """Completions per problem in the final evaluation: avg@k and pass@k."""
    final_eval_temperatures: tuple[NonNegative, ...] = ()
    """Further temperatures of the final evaluation, at which each problem is answered once."""


@settings
class Config:
    """One run. `make_config` makes one from flat values."""

    method: Method = field(default_factory=METHODS["luffy"])
    data: DataOptions = field(default_factory=DataOptions)
    world: WorldOptions = field(default_factory=WorldOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)
    update: UpdateOptions = field(default_factory=UpdateOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    model: Name = DEFAULT_MODEL
    """Base model: an embedded one ("tiny", "tiny:own_share=0.4,seed=1": model/bases.py), a Hugging Face folder, or a
    hub name."""
    seed: Count = 0
    """Seed of everything random in the run; the base model has its own."""
    max_steps: Annotated[PositiveInt, tyro.conf.arg(aliases=["--steps"])] = 150
    """Training steps, each one rollout batch."""
    save_steps: PositiveInt = 50
    """Steps between checkpoints."""
    save_total_limit: PositiveInt = 2
    """Checkpoints kept, the newest ones; the last one always is."""
    sample_steps: Count = 25
    """Steps between written samples, 0 for none."""
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Besides the run directory: "none", "tensorboard", "wandb" or "trackio"."""

    def __post_init__(self) -> None:
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """Every field, flat; the method by its name."""
        flat: dict[str, Any] = {"method": methods.full_name(type(self.method))}
        for name, owner in _fields(type(self.method)):
            value = getattr(getattr(self, owner) if owner else self, name)
            flat[name] = list(value) if isinstance(value, tuple) else value
        return flat

    def differing(self, values: dict[str, Any]) -> list[str]:
        """The fields that flat values, perhaps from JSON, have otherwise."""
        ours = json.loads(json.dumps(self.to_dict()))
        return [name for name, value in json.loads(json.dumps(values)).items() if ours.get(name, value) != value]

    def replace(self, method: Method | str | None = None, **values: Any) -> Config:
        """A copy with other values, checked like any. Another method comes with its own parameters, those given as
        values aside, and keeps the rest of this configuration; one that is given by its name brings its defaults."""
        if method is None:
            method = self.method
        elif isinstance(method, str):
            method = methods.get(method)()
            values = {**method.defaults, **values}
        known = dict(_fields(type(method)))
        kept = {name: value for name, value in self.to_dict().items() if name in known}
        own = {f.name: getattr(method, f.name) for f in fields(method)}
        return from_dict({**kept, **own, "method": methods.full_name(type(method)), **_named(values)})


GROUPS: dict[str, Any] = {
    "data": DataOptions,
    "world": WorldOptions,
    "sampling": SamplingOptions,
    "reward": RewardOptions,
    "update": UpdateOptions,
    "engine": EngineOptions,
    "evaluation": EvaluationOptions,
}


def _fields(method: type[Method]) -> Iterator[tuple[str, str]]:
    """Every field of a configuration with that method, and the group that has it ("" for the configuration itself)."""
    for f in fields(Config):
        if f.name != "method" and f.name not in GROUPS:
            yield f.name, ""
    for group, options in {"method": method, **GROUPS}.items():
        for f in fields(options):
            yield f.name, group


def field_names(method: type[Method] | None = None) -> set[str]:
    """The flat names of a method's configuration; of those of all methods together if none is given."""
    return {name for one in ([method] if method else METHODS.values()) for name, _ in _fields(one)}


def fitting(values: dict[str, Any], method: type[Method]) -> dict[str, Any]:
    """The values without fields that only other methods have, for files that serve several methods."""
    others = field_names() - field_names(method)
    return {name: value for name, value in _named(values).items() if name not in others}


ALIASES = {"steps": "max_steps"}  # short for, everywhere
# Names that fields had, and the ones they have now.
RENAMED = {
    "lr_schedule": "lr_scheduler_type",
    "keep_checkpoints": "save_total_limit",
    "vllm_gpu_memory": "vllm_gpu_memory_utilization",
    "importance_sampling_cap": "vllm_importance_sampling_cap",
}


# Names that fields had, and why there is no such choice now.
DROPPED = dict.fromkeys(
    ("row_tokens", "attn_implementation", "attention"),
    "packed sequences go through attention one by one, without masks, on CPUs and GPUs alike",
)


# Fields that came later and whose default is not what was the case before.
LATER = {"verbosity": 0.0}


def _named(values: dict[str, Any]) -> dict[str, Any]:
    return {ALIASES.get(name, name): value for name, value in values.items()}


def from_dict(values: dict[str, Any]) -> Config:
    """A configuration from flat values. Raises ConfigError for a field that does not exist."""
    values = _named(values)
    name = values.pop("method", "luffy")
    if not isinstance(name, str):
        raise ConfigError(f"method must be the name of one, not {name!r}")
    method = methods.get(name)
    owners = dict(_fields(method))
    grouped: dict[str, dict[str, Any]] = {group: {} for group in ("", "method", *GROUPS)}
    for field_name, value in values.items():
        if field_name not in owners:
            raise ConfigError(describe_unknown(field_name, method))
        grouped[owners[field_name]][field_name] = value
    parts = {group: options(**grouped[group]) for group, options in GROUPS.items()}
    return Config(method=method(**grouped["method"]), **parts, **grouped[""])


def describe_unknown(name: str, method: type[Method]) -> str:
    """Why a method's configuration has no field of that name, and what to write instead."""
    if name in RENAMED:
        return f"{name} is called {RENAMED[name]} now"
    if name in DROPPED:
        return f"there is no {name} any more: {DROPPED[name]}"
    owners = [other.name for other in METHODS.values() if name in field_names(other)]
    if owners:
        return f"method {method.name} has no {name}, which {', '.join(owners)} have"
    return unknown_field(name, field_names(method))


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """The flat values of a run that may have been begun when every method had every field. Raises ConfigError if they
    say what can no longer be said."""
    values = LATER | {name: value for name, value in values.items() if name not in DROPPED}
    if "supervised" not in values:
        return values
    method = methods.get(str(values.get("method")))
    if values.get("sft_loss_coef") and issubclass(method, methods.Mixed):
        raise ConfigError(f"method {method.name} has no sft_loss_coef now, which is {values['sft_loss_coef']} there")
    new = {RENAMED.get(name, name): value for name, value in _named(values).items()}
    if not method.samples:
        new.pop("beta", None)  # it had no effect there
    return {name: value for name, value in new.items() if name == "method" or name in field_names(method)}


def make_config(method: str | type[Method] = "luffy", **values: Any) -> Config:
    """The configuration of a method, by its name or METHODS["..."], with flat `values` over what it starts from.

    Raises ConfigError for what does not exist or fit.
    """
    if not isinstance(method, (str, type)):
        raise ConfigError(f"method must be the name of one, not {method!r}")
    chosen = methods.get(method) if isinstance(method, str) else method
    return from_dict({**chosen.defaults, **_named(values), "method": methods.full_name(chosen)})


def check_package(package: str, what: str, install: str) -> None:
    """Raises ConfigError unless a package that is no requirement is there. install: what stands behind pip install."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{what} needs the package {package}, which is not installed: pip install {install}")


def check(config: Config) -> None:
    """Raises ConfigError if a combination of values is impossible."""
    sampling, update, engine, method = config.sampling, config.update, config.engine, config.method
    method.check(config)
    if sampling.rollout_batch_size % update.mini_batch_size:
        raise ConfigError(
            f"mini_batch_size {update.mini_batch_size} does not divide rollout_batch_size {sampling.rollout_batch_size}"
        )
    if engine.precision == "bfloat16" and method.samples and not update.recompute_old_logp:
        raise ConfigError(
            "precision bfloat16 needs recompute_old_logp: the sampler's log-probs are of another precision"
        )
    if sampling.vllm_importance_sampling_cap is not None and not update.recompute_old_logp:
        raise ConfigError("vllm_importance_sampling_cap needs recompute_old_logp: the trainer's probabilities")
    if sampling.vllm_servers and sampling.sampler != "vllm":
        raise ConfigError("vllm_servers need sampler vllm")
    if sampling.vllm_tensor_parallel_size > 1 and (
        sampling.sampler != "vllm" or sampling.vllm_servers or engine.engine != "deepspeed"
    ):
        raise ConfigError(
            "vllm_tensor_parallel_size is for sampler vllm on the ranks' own devices, with engine deepspeed; servers "
            "are started with a number of their own"
        )
    if engine.load_in_4bit and (not engine.lora_r or engine.engine != "torch" or engine.device == "cpu"):
        raise ConfigError("load_in_4bit is for adapters (lora_r) on a GPU, with engine torch")
    if engine.load_in_4bit and (engine.lora_target_modules or sampling.vllm_servers):
        raise ConfigError("load_in_4bit goes with adapters on all linear layers, and not with vllm_servers")
    if engine.engine == "deepspeed" and engine.device.startswith("cuda:"):
        raise ConfigError(f"device {engine.device} with engine deepspeed: each rank has its own GPU, say cuda")
    if config.data.dataset == TINYWORLD and config.data.dataset_split not in ("train", "complement"):
        raise ConfigError(
            f"the tiny world's splits to train on are train and complement, not {config.data.dataset_split!r}"
        )
    if config.data.dataset == TINYWORLD and method.traces_needed() > config.world.num_traces:
        raise ConfigError(
            f"num_off_policy {method.traces_needed()} exceeds num_traces {config.world.num_traces}: the tiny world's "
            "problems would not have that many demonstrations"
        )


def read_file(path: str | Path) -> dict[str, Any]:
    """The values in a YAML or JSON file. Raises ConfigError if it cannot be read or is not a mapping."""
    import yaml

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        values = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the configuration {path} is not a mapping of fields to values")
    return values
