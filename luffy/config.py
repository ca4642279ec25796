"""The configuration of a run: one flat dataclass, every field a flag of `luffy train` and a key of a config file.

Defaults are the tiny tier: the embedded world and its base model, on a CPU. A value comes from, in rising priority:
these defaults, the method (methods.py), a config file, the command line or keyword arguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import shaping
from .templates import TEMPLATES

TINY = "tiny"
TINYWORLD = "tinyworld"


class ConfigError(ValueError):
    """A configuration with an unknown, ill-typed or impossible value; the message names the field."""


@dataclass(frozen=True)
class Config:
    method: str = "luffy"
    """Name of the method (methods.py) whose values this configuration started from."""
    seed: int = 0
    """Seed of everything random in the run; the base model has its own."""
    steps: int = 150
    """Training steps, each one rollout batch."""
    first_stage_steps: int = 0
    """Steps of the first stage of sft_rl; 0: as many as of the second."""

    model: str = TINY
    """Base model: "tiny" (the embedded one), a Hugging Face folder, or a hub name."""
    dataset: str = TINYWORLD
    """Training problems: "tinyworld", a .parquet/.json/.jsonl file, or a hub name."""
    dataset_split: str = "train"
    """Split of the data set; of the tiny world, "train" or "complement"."""
    complement: str = TINYWORLD
    """Where the second stage of sft_rl takes its problems, which the first has not seen."""
    complement_split: str = "complement"
    """Split of the complement."""
    num_problems: int = 0
    """Training problems taken from the data set; 0: all of a file, 1,000 of the tiny world."""
    difficulties: tuple[int, ...] = (3, 4, 5, 6)
    """Tiny world only: difficulties of the training problems."""
    trace_errors: float = 0.0
    """Tiny world only: share of traces that end in a wrong answer."""
    num_traces: int = 1
    """Tiny world only: traces per problem, of which num_off_policy join a group."""
    eval_datasets: tuple[str, ...] = (TINYWORLD,)
    """Evaluation problems: "tinyworld" for all its families, names of benchmarks.py, files or hub names."""
    ood_sources: tuple[str, ...] = ("words", "flip", "prefix", "arc_c", "gpqa", "mmlu_pro")
    """Benchmarks (in own files: sources) that count as out of distribution."""
    template: str = "chat"
    """Prompt template: "chat" (the tokenizer's own), paper (App. C.2), llama, qwen, simplerl, prime, no."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the tokenizer's own template, such as {"enable_thinking": false}; as a flag: JSON."""
    max_prompt_length: int = 64
    """Longest prompt in tokens; longer ones are left out."""
    max_completion_length: int = 96
    """Window of a completion in tokens, rollout or demonstration."""
    long_traces: str = "cut"
    """A trace longer than the window is "cut" to it, without EOS, or left out ("drop")."""

    rollout_batch_size: int = 16
    """Problems per step."""
    mini_batch_size: int = 8
    """Problems per optimiser step; divides rollout_batch_size."""
    num_generations: int = 8
    """Rows of a group, demonstrations included."""
    num_off_policy: int = 1
    """Demonstrations in a group."""
    supervised: bool = False
    """Groups hold their demonstrations only and nothing is sampled: supervised fine-tuning."""
    temperature: float = 1.0
    """Sampling temperature in training."""

    baseline: str = "union"
    """Rows whose mean reward is the baseline: "union" (Eq. 4) or "on_policy"."""
    scale_rewards: str = "none"
    """Advantages: "none" (Dr. GRPO) or "group" (divided by the group's standard deviation)."""
    off_policy_loss: bool = True
    """Whether demonstrations take part in the policy loss."""
    off_shaping: str = "regularized"
    """Shaping of off-policy ratios: none, regularized, log, prob_plus_log, sqrt, power."""
    on_shaping: str = "none"
    """Shaping of both probabilities in the on-policy ratio; log and prob_plus_log do not apply."""
    gamma: float = 0.1
    """Parameter of the regularized shaping."""
    shaping_weight: float = 0.1
    """Parameter of the log and prob_plus_log shapings."""
    shaping_exponent: float = 0.5
    """Parameter of the power shaping."""
    epsilon: float | None = None
    """Clip of the on-policy ratio at 1 - epsilon and 1 + epsilon; None: no clip."""
    epsilon_high: float | None = None
    """Upper clip range where it differs from epsilon."""
    off_ratio_min: float | None = None
    """Lower bound of the shaped off-policy ratio."""
    off_ratio_max: float | None = None
    """Upper bound of the shaped off-policy ratio."""
    sft_loss_coef: float = 0.0
    """Weight of the token-mean negative log-likelihood of the demonstrations."""
    entropy_coef: float = 1e-4
    """Weight of the token-mean entropy bonus (the README converts the reference's values)."""
    beta: float = 0.0
    """Weight of the token-mean KL divergence of rollouts to the model that the run, or the stage, starts from."""
    recompute_old_logp: bool = False
    """Take old log-probs from a forward pass rather than from the sampler; needed where the two differ in precision."""

    learning_rate: float = 3e-4
    """Peak learning rate of reinforcement learning (AdamW)."""
    sft_learning_rate: float = 1e-3
    """Peak learning rate of a supervised stage."""
    lr_schedule: str = "constant"
    """After the warm-up: "constant", or "linear" decay to zero after the last step."""
    warmup_steps: int = 5
    """Optimiser steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    adam_beta2: float = 0.999
    """AdamW's second-moment decay; the first is 0.9."""
    max_grad_norm: float = 1.0
    """Gradient clipping by global norm."""

    reward: str = "math_verify"
    """"math_verify", or "module:function" with reward(prompts, completions, **columns) -> list[float]."""
    think_format: bool = False
    """Whether an answer without a closed think block gets no reward (the paper's rule)."""
    verifier_workers: int = 1
    """Processes that check answers."""
    verifier_timeout: float = 5.0
    """Seconds a check may take."""

    engine: str = "torch"
    """"torch" (one process) or "deepspeed" (one process per GPU: `luffy train --nproc 8`)."""
    zero_stage: int = 2
    """DeepSpeed only: what is sharded over the ranks: 1 the optimiser's state, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """DeepSpeed only: keep the optimiser's state, and take its steps, on the CPU."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": a GPU if there is one."""
    precision: str = "float32"
    """"float32", or "bfloat16": autocast over float32 weights (torch), bfloat16 weights with float32 master weights
    (deepspeed)."""
    row_tokens: int = 128
    """Length of a packed row: short on a CPU, long on a GPU."""
    micro_batch_tokens: int = 8192
    """Tokens per forward and backward pass; changes memory and speed, not the gradient."""
    logits_chunk_size: int = 4096
    """Tokens whose logits exist at once."""
    attention: str = "sdpa"
    """Attention of the trainer: "sdpa", whose cost grows with the square of row_tokens, or, on a GPU and with one row a
    micro-batch, "flash_attention_2" (its package) or "flex_attention"."""
    gradient_checkpointing: bool = False
    """Recompute the trunk's activations in backward."""
    sampler: str = "transformers"
    """What generates: "transformers" (the policy's own weights), or "vllm" (a process of its own on the device)."""
    sampler_rows: int = 512
    """Completions sampled at once."""
    sampler_timeout: float = 600.0
    """vLLM only: seconds without a sign of life after which its process is started again, once in a run."""
    sampler_gap_limit: float = 0.2
    """Mean difference between the sampler's log-probs and the trainer's, in nats, that ends the run."""
    importance_sampling_cap: float | None = None
    """Weight on-policy tokens with min(cap, trainer's probability / sampler's); None: no correction (the paper)."""
    vllm_servers: tuple[str, ...] = ()
    """Addresses (host:port) of `luffy serve` to generate on, one per rank at most; none: the ranks' own devices."""
    vllm_gpu_memory: float = 0.4
    """vLLM only: share of the GPU's memory for its weights and cache."""
    vllm_cache_mb: int = 0
    """vLLM only: size of its key-value cache; 0: what vllm_gpu_memory leaves, on a CPU 512."""
    num_threads: int = 1
    """CPU threads of torch; other values may change the last bits."""

    eval_steps: int = 25
    """Steps between validations, 0 for none."""
    eval_problems: int = 60
    """Problems per family in a validation."""
    final_eval_problems: int = 500
    """Problems per family in the evaluation after the last step, 0 for none."""
    final_eval_samples: int = 4
    """Completions per problem in the final evaluation: avg@k and pass@k."""
    eval_temperature: float = 0.6
    """Sampling temperature of evaluations, 0 for greedy."""
    save_steps: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest ones; the last one always is."""
    sample_steps: int = 25
    """Steps between written samples, 0 for none."""
    report_to: str = "none"
    """Besides the run directory: "none", "tensorboard", "wandb" or "trackio"."""

    def __post_init__(self) -> None:
        check_types(self)
        check_values(self)

    @property
    def peak_learning_rate(self) -> float:
        return self.sft_learning_rate if self.supervised else self.learning_rate

    @property
    def clip(self) -> tuple[float, float] | None:
        if self.epsilon is None:
            return None
        return self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high

    def shaping(self, name: str) -> shaping.Shaping:
        """The shaping of that name with this configuration's parameter for it."""
        parameters = {
            "regularized": {"gamma": self.gamma},
            "log": {"weight": self.shaping_weight},
            "prob_plus_log": {"weight": self.shaping_weight},
            "power": {"exponent": self.shaping_exponent},
        }
        return shaping.get(name, **parameters.get(name, {}))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def replace(self, **values: Any) -> Config:
        """A copy with other values, checked like any. Raises ConfigError for an unknown field."""
        return from_dict({**self.to_dict(), **values})


FIELD_TYPES: dict[str, Any] = typing.get_type_hints(Config)

CHOICES = {
    "template": TEMPLATES,
    "long_traces": ("cut", "drop"),
    "baseline": ("union", "on_policy"),
    "scale_rewards": ("none", "group"),
    "off_shaping": tuple(shaping.SHAPINGS),
    "on_shaping": ("none", "regularized", "sqrt", "power"),
    "lr_schedule": ("constant", "linear"),
    "attention": ("sdpa", "flash_attention_2", "flex_attention"),
    "engine": ("torch", "deepspeed"),
    "sampler": ("transformers", "vllm"),
    "precision": ("float32", "bfloat16"),
    "report_to": ("none", "tensorboard", "wandb", "trackio"),
}
_SAMPLED = {"supervised": False}
_ON_POLICY = {**_SAMPLED, "num_off_policy": 0}
_MIXED = {**_SAMPLED, "off_policy_loss": True}
# What makes a method what it is: a configuration of that name cannot have other values (methods.py has the rest).
METHOD_FIELDS: dict[str, dict[str, Any]] = {
    "on_policy": _ON_POLICY,
    "on_policy_shaping": _ON_POLICY,
    "on_policy_no_clip": _ON_POLICY,
    "mixed": _MIXED,
    "mixed_shaping": _MIXED,
    "luffy": _MIXED,
    "sft": {"supervised": True, "off_policy_loss": False},
    "rl_sft_loss": {**_SAMPLED, "off_policy_loss": False, "baseline": "on_policy"},
    "sft_rl": _ON_POLICY,
}
# Every number must be positive, but for these, which may be zero, and the ratio bounds, which may be anything.
# fmt: off
MAY_BE_ZERO = {
    "seed", "first_stage_steps", "num_problems", "trace_errors", "num_off_policy", "epsilon", "epsilon_high",
    "shaping_weight", "sft_loss_coef", "entropy_coef", "beta", "warmup_steps", "weight_decay", "eval_steps",
    "final_eval_problems", "eval_temperature", "sample_steps", "vllm_cache_mb",
}
# fmt: on
MAY_BE_ANYTHING = {"off_ratio_min", "off_ratio_max"}


def check_types(config: Any) -> None:
    """Brings every field of a frozen dataclass of settings into its declared type. Raises ConfigError."""
    for name, kind in typing.get_type_hints(type(config)).items():
        object.__setattr__(config, name, _checked(name, getattr(config, name), kind))


def _checked(name: str, value: Any, kind: Any) -> Any:
    """The value in the field's type. A number may come as text or as another kind of number, if nothing is lost."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name} must be a list, not {value!r}")
        return tuple(_checked(name, item, typing.get_args(kind)[0]) for item in value)
    if typing.get_origin(kind) is dict:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                raise ConfigError(f"{name} must be a mapping, as JSON: {value!r} is none") from None
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{name} must be a mapping of names to values, not {value!r}")
        return dict(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            converted = kind(value)  # YAML reads 1e-3 as text
        except (ValueError, OverflowError):
            pass
        else:
            if isinstance(value, str) or converted == value:
                return converted
    raise ConfigError(f"{name} must be {kind.__name__}, not {value!r}")


def check_choice(name: str, value: str) -> None:
    """Raises ConfigError unless the value is one of those that the field may have."""
    if value not in CHOICES[name]:
        raise ConfigError(f"{name} is one of {', '.join(CHOICES[name])}, not {value!r}")


def check_package(package: str, what: str, extra: str) -> None:
    """Raises ConfigError unless the package of an extra is installed."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{what} needs the package {package}, which is not installed: pip install with the extra {extra}"
        )


def check_device(name: str) -> None:
    """Raises ConfigError unless it is the name of a device."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device is auto, cpu, cuda or cuda:N, not {name!r}")


def check_values(config: Config) -> None:
    """Raises ConfigError if a value, or a combination of values, is impossible."""
    if config.method not in METHOD_FIELDS:
        raise ConfigError(f"no method {config.method!r}: there are {', '.join(METHOD_FIELDS)}")
    for name, value in METHOD_FIELDS[config.method].items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} contradicts method {config.method}, which is {name}={value!r}: "
                f"make_config({config.method!r}, ...) sets what belongs to it"
            )
    for name in CHOICES:
        check_choice(name, getattr(config, name))
    for name in FIELD_TYPES:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            raise ConfigError(f"{name} must be finite, not {value}")
        if value < 0 and name not in MAY_BE_ANYTHING:
            raise ConfigError(f"{name} must not be negative, not {value}")
        if value == 0 and name not in MAY_BE_ZERO | MAY_BE_ANYTHING:
            raise ConfigError(f"{name} must be positive, not {value}")
    if config.num_off_policy > config.num_generations:
        raise ConfigError(
            f"num_off_policy {config.num_off_policy} exceeds num_generations {config.num_generations}: "
            "demonstrations are part of the group"
        )
    if config.rollout_batch_size % config.mini_batch_size:
        raise ConfigError(
            f"mini_batch_size {config.mini_batch_size} does not divide rollout_batch_size {config.rollout_batch_size}"
        )
    if config.supervised and (config.sft_loss_coef == 0 or config.num_off_policy == 0):
        raise ConfigError("supervised training needs num_off_policy > 0 and sft_loss_coef > 0")
    if not config.supervised and config.num_off_policy == config.num_generations:
        raise ConfigError(
            f"num_off_policy = num_generations = {config.num_generations} leaves no rollout: use supervised"
        )
    if config.precision == "bfloat16" and not (config.supervised or config.recompute_old_logp):
        raise ConfigError(
            "precision bfloat16 needs recompute_old_logp: the sampler's log-probs are of another precision"
        )
    if config.epsilon is None and config.epsilon_high is not None:
        raise ConfigError("epsilon_high without epsilon: give both, or neither for no clip")
    if config.epsilon is not None and config.epsilon >= 1:
        raise ConfigError(f"epsilon must be below 1, not {config.epsilon}")
    low, high = config.off_ratio_min, config.off_ratio_max
    if low is not None and high is not None and low > high:
        raise ConfigError(f"off_ratio_min {low} exceeds off_ratio_max {high}")
    if config.reward != "math_verify" and ":" not in config.reward:
        raise ConfigError(f'reward is "math_verify" or "module:function", not {config.reward!r}')
    if not config.difficulties or not config.eval_datasets:
        raise ConfigError("difficulties and eval_datasets must not be empty")
    if config.trace_errors > 1:
        raise ConfigError(f"trace_errors is a share, not {config.trace_errors}")
    if min(config.difficulties) < 2:
        raise ConfigError(
            f"difficulties must be 2 or more (the number of operations plus one), not {min(config.difficulties)}"
        )
    if config.dataset == TINYWORLD and config.num_off_policy > config.num_traces:
        raise ConfigError(
            f"num_off_policy {config.num_off_policy} exceeds num_traces {config.num_traces}: the tiny world's problems "
            "would not have that many demonstrations"
        )
    if config.importance_sampling_cap is not None and not config.recompute_old_logp:
        raise ConfigError("importance_sampling_cap needs recompute_old_logp: the trainer's probabilities")
    if config.vllm_servers and config.sampler != "vllm":
        raise ConfigError("vllm_servers need sampler vllm")
    if config.attention != "sdpa" and config.sampler == "transformers" and not config.supervised:
        raise ConfigError(f"attention {config.attention} needs sampler vllm: the transformers sampler uses sdpa's mask")
    if config.attention == "flash_attention_2" and config.precision != "bfloat16":
        raise ConfigError("attention flash_attention_2 needs precision bfloat16")
    if config.vllm_gpu_memory > 1:
        raise ConfigError(f"vllm_gpu_memory is a share, not {config.vllm_gpu_memory}")
    if config.engine == "deepspeed" and config.device.startswith("cuda:"):
        raise ConfigError(f"device {config.device} with engine deepspeed: each rank has its own GPU, say cuda")
    if config.zero_stage not in (1, 2, 3):
        raise ConfigError(f"zero_stage is 1, 2 or 3, not {config.zero_stage}")
    check_device(config.device)
    for source, split in ((config.dataset, config.dataset_split), (config.complement, config.complement_split)):
        if source == TINYWORLD and split not in ("train", "complement"):
            raise ConfigError(f"the tiny world's splits to train on are train and complement, not {split!r}")


def from_dict(values: dict[str, Any]) -> Config:
    """A configuration from a mapping. Raises ConfigError for a field that does not exist."""
    check_names(values, FIELD_TYPES)
    return Config(**values)


def check_names(values: Iterable[str], fields: Iterable[str]) -> None:
    """Raises ConfigError if a name is not that of a field; it names the nearest."""
    unknown = [name for name in values if name not in set(fields)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(fields), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"no field {', '.join(map(repr, unknown))} in the configuration{hint}")


def read_file(path: str | Path) -> dict[str, Any]:
    """The values in a YAML or JSON file. Raises ConfigError if it cannot be read or is not a mapping."""
    import yaml

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        values = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the configuration {path} is not a mapping of fields to values")
    return values
