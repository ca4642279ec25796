"""Will it fit, and how long will it take: an estimate from a configuration and the model's shape; nothing is loaded.

Memory per GPU, in bytes; P parameters, R ranks:

    weights      4 P, or with deepspeed or adapters in bfloat16 2 P; / R under ZeRO-3, and two layers whole; 0.55 P
                 in 4 bits
    gradients    4 P; / R from ZeRO-2 on; P here and below is of the adapters if only they are trained
    optimiser    8 P of moments, and 4 P of master weights with deepspeed; / R, none on the GPU if offloaded
    activations  of one micro-batch; with gradient checkpointing each layer's input and one layer's inside
    logits       two copies in float32 of one chunk x vocabulary, and the gradient of the head's weight in float32
    sampler      vLLM's share of the GPU; of the transformers sampler the cache and copies of two thirds of the weights
                 (of all of them besides under ZeRO-3)

The sampler and the activations are not there at the same time: vLLM sleeps during the update. Time counts operations
at the share MFU of the GPU's peak. Training takes 6 per parameter and token (4 if it is frozen, 2 more with
checkpointing), a forward pass 2; attention's are added. Generation reads the weights for every token of the longest
row, for which all wait, and the rows' caches. What it assumes is printed with it, and checked against measured times
in tests/training/test_plan.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import Config
from ..errors import ConfigError
from ..model.loading import load_settings
from ..model.packing import REPEATED

MFU = 0.4  # of training; what well-tuned dense models reach
BANDWIDTH = 0.6  # share of the memory bandwidth that decoding reaches
RESERVE = 2 << 30  # CUDA's own, fragments, NCCL's buffers
SLEEPING = 5 << 29  # 2.5 GiB: what vLLM keeps while it sleeps (its CUDA context, graphs, compiled code)
BALANCE = 0.97  # how full the ranks' micro-batches are, on average
OTHER_S = 10.0  # of a step: weights to the sampler, waking it, the last answers' verification
OWN_SHARE, TRACE_SHARE = 0.27, 0.51  # mean lengths in the paper, of the window: 2,200 and 4,200 of 8,192 tokens

# bf16 operations/s and bytes/s of the data sheets
GPUS = {
    "a100": (312e12, 2.0e12),
    "h100": (989e12, 3.35e12),
    "h200": (989e12, 4.8e12),
    "a40": (150e12, 0.7e12),
    "rtx4090": (165e12, 1.0e12),
    "a10": (125e12, 0.6e12),
}


@dataclass(frozen=True)
class Shape:
    """What of a decoder's configuration decides memory and time."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    head_dim: int
    qkv_bias: bool = True

    @property
    def parameters(self) -> int:
        """Of a Llama or Qwen2 decoder, exactly."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * queries + 2 * keys) + self.qkv_bias * (queries + 2 * keys)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * layer + embeddings + self.hidden

    def adapters(self, rank: int) -> int:
        """Of low-rank adapters on all linear layers but the head."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = 2 * (self.hidden + queries) + 2 * (self.hidden + keys) + 3 * (self.hidden + self.intermediate)
        return self.layers * rank * sides

    @property
    def cache_per_token(self) -> int:
        """Elements of keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim


# The models of the paper and of the files in study/presets, so that a plan needs no download.
SHAPES = {
    "Qwen2.5-Math-7B": Shape(3584, 28, 28, 4, 18944, 152064, False, 128),
    "Qwen2.5-7B-Instruct": Shape(3584, 28, 28, 4, 18944, 152064, False, 128),
    "Qwen2.5-Math-1.5B": Shape(1536, 28, 12, 2, 8960, 151936, True, 128),
    "Llama-3.1-8B": Shape(4096, 32, 32, 8, 14336, 128256, False, 128, qkv_bias=False),
    "Qwen2.5-32B": Shape(5120, 64, 40, 8, 27648, 152064, False, 128),
    "Llama-3.1-70B": Shape(8192, 80, 64, 8, 28672, 128256, False, 128, qkv_bias=False),
}


def shape_of(model: str) -> Shape:
    """The shape of a model of the paper by its name, or of any folder or hub name. Raises ConfigError."""
    for name, shape in SHAPES.items():
        if model.rstrip("/").split("/")[-1].startswith(name):
            return shape
    settings = load_settings(model)
    return Shape(
        hidden=settings.hidden_size,
        layers=settings.num_hidden_layers,
        heads=settings.num_attention_heads,
        kv_heads=settings.num_key_value_heads,
        intermediate=settings.intermediate_size,
        vocabulary=settings.vocab_size,
        tied=bool(settings.tie_word_embeddings),
        head_dim=getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads,
        qkv_bias=settings.model_type == "qwen2" or bool(getattr(settings, "attention_bias", False)),
    )


@dataclass(frozen=True)
class Plan:
    """memory: bytes per GPU by part; phases: the parts that are there at once; host: bytes on the machine's CPUs;
    seconds: per step, by phase; problems: why it cannot be, with what to change, empty if it can."""

    config: Config
    shape: Shape
    ranks: int
    gpu: str
    capacity: int
    memory: dict[str, int]
    phases: dict[str, int]
    host: int
    seconds: dict[str, float]
    problems: list[str]
    assumed: str

    def table(self) -> str:
        """The plan as text."""
        gib = 2**30
        steps = self.config.max_steps
        lines = [
            f"{self.config.method.name}: {self.shape.parameters / 1e9:.2f}B parameters on {self.ranks} x {self.gpu} of "
            f"{self.capacity / gib:.0f} GiB",
            "",
            *(f"  {name:<24}{size / gib:9.2f} GiB" for name, size in self.memory.items()),
            "",
            *(
                f"  at once while {name:<10}{size / gib:9.2f} GiB of {self.capacity / gib:.0f}"
                for name, size in self.phases.items()
            ),
            f"  in the machine's memory {self.host / gib:9.2f} GiB",
            "",
            *(f"  {name:<24}{seconds:9.1f} s a step" for name, seconds in self.seconds.items()),
            f"  {steps} steps{'':<15}{steps * sum(self.seconds.values()) / 3600:9.1f} h",
        ]
        lines += ["", f"  assumed: {self.assumed}"]
        return "\n".join([*lines, "", *(f"IMPOSSIBLE: {problem}" for problem in self.problems)]).rstrip()


def plan(
    config: Config,
    *,
    ranks: int = 1,
    gpu: str = "a100",
    gpu_memory: float = 80.0,
    mean_length: int = 0,
    trace_length: int = 0,
    shape: Shape | None = None,
) -> Plan:
    """Estimates a configuration on `ranks` GPUs of `gpu_memory` GiB.

    mean_length, trace_length: tokens of a rollout and of a demonstration; 0: their shares of the window in the paper.
    Raises ConfigError for an unknown GPU, or if the configuration does not go with that many ranks.
    """
    data, sampling, engine = config.data, config.sampling, config.engine
    if gpu not in GPUS:
        raise ConfigError(f"no GPU {gpu!r}: there are {', '.join(GPUS)}")
    if ranks > 1 and engine.engine == "torch":
        raise ConfigError(f"engine torch trains on one GPU, not on {ranks}: use engine deepspeed")
    shape = shape or shape_of(config.model)
    capacity = int(gpu_memory * 2**30)
    window = data.max_prompt_length + data.max_completion_length
    length = mean_length or int(OWN_SHARE * data.max_completion_length)
    trace = trace_length or int(TRACE_SHARE * data.max_completion_length)
    memory, host = _memory(config, shape, ranks, capacity, window)
    resident = sum(memory[name] for name in ("weights", "gradients", "optimiser", "reference", "reserve"))
    phases = {"sampling": resident + memory["sampler"], "updating": resident + memory["activations"] + memory["logits"]}
    if sampling.sampler == "vllm":
        phases["updating"] += 0 if sampling.vllm_servers else SLEEPING
    elif engine.engine == "deepspeed" and engine.zero_stage == 3:
        phases["updating"] += memory["sampler"]
    seconds = _seconds(config, shape, ranks, capacity, gpu, length, trace)
    assumed = (
        f"rollouts of {length} tokens on average, the longest of {data.max_completion_length}, demonstrations of "
        f"{trace}; {MFU:.0%} of the GPU's peak in training, {BANDWIDTH:.0%} of its bandwidth in decoding, "
        f"{BALANCE:.0%} full micro-batches"
        + "; what the servers need and take is left out"
        * bool(sampling.vllm_servers)
    )
    return Plan(
        config,
        shape,
        ranks,
        gpu,
        capacity,
        memory,
        phases,
        host,
        seconds,
        _problems(config, shape, ranks, capacity, memory, phases, window),
        assumed,
    )


def _memory(config: Config, shape: Shape, ranks: int, capacity: int, window: int) -> tuple[dict[str, int], int]:
    sampling, update, engine = config.sampling, config.update, config.engine
    parameters = shape.parameters
    sharded = engine.engine == "deepspeed"
    half = engine.precision == "bfloat16"
    frozen = engine.lora_r > 0
    trained = shape.adapters(engine.lora_r) if frozen else parameters
    weights = (2 if half and (sharded or frozen) else 4) * parameters
    if engine.load_in_4bit:
        weights = int(0.55 * parameters)
    gradients, optimiser = 4 * trained, 8 * trained
    host = 0
    if sharded:
        optimiser = 12 * trained // ranks
        if engine.zero_stage == 3:
            weights = weights // ranks + 2 * weights // shape.layers
        gradients //= ranks if engine.zero_stage >= 2 else 1
        if engine.offload_optimizer:
            host += optimiser * ranks
            optimiser = 0
    tokens = max(update.micro_batch_tokens, window)
    # A micro-batch holds no more than the step has.
    tokens = min(tokens, update.mini_batch_size * sampling.num_generations * window)
    width = 2 if half else 4
    queries = shape.heads * shape.head_dim
    keys = shape.kv_heads * shape.head_dim
    # queries, keys, values and the attention's result also sequence by sequence, where shared prompts are repeated
    repeated = REPEATED * (2 * queries + 2 * keys)
    inside = tokens * width * (6 * shape.hidden + 4 * queries + 4 * keys + repeated + 4 * shape.intermediate)
    inputs = tokens * shape.hidden * width
    activations = shape.layers * inputs + inside if engine.gradient_checkpointing else shape.layers * (inputs + inside)
    # two chunks in float32 and one in half precision; the gradient of the head's weight, summed in float32
    logits = (8 if width == 4 else 10) * min(update.logits_chunk_size, tokens) * shape.vocabulary
    logits += 0 if frozen else (4 if width == 4 else 6) * shape.hidden * shape.vocabulary
    if sampling.sampler == "vllm":
        cache = sampling.vllm_cache_mb << 20
        slice_ = (2 if half else 4) * parameters // sampling.vllm_tensor_parallel_size
        share = slice_ + cache if cache else int(sampling.vllm_gpu_memory_utilization * capacity)
        sampler = share if config.method.samples and not sampling.vllm_servers else 0
    else:
        rows = min(sampling.sampler_rows, sampling.rollout_batch_size * sampling.num_generations // ranks)
        # the decoder has copies of the weights of joined projections: about two thirds of a layer's
        cached = rows * window * shape.cache_per_token + 2 * shape.parameters // 3
        sampler = cached * (2 if sharded and half else 4) if config.method.samples else 0
        if sharded and engine.zero_stage == 3:
            sampler += (2 if half else 4) * parameters
    memory = {
        "weights": weights,
        "gradients": gradients,
        "optimiser": optimiser,
        # (of adapters the model without them)
        "reference": (2 if sharded and half else 4) * parameters
        if (name := config.method.reference(config.model)) and not (frozen and name == config.model)
        else 0,
        "activations": activations,
        "logits": logits,
        "sampler": sampler,
        "reserve": RESERVE,
    }
    return memory, host


def _seconds(
    config: Config, shape: Shape, ranks: int, capacity: int, gpu: str, length: int, trace: int
) -> dict[str, float]:
    sampling, engine, method = config.sampling, config.engine, config.method
    flops, bandwidth = GPUS[gpu]
    sampled = method.sampled_rows(sampling.num_generations) if method.samples else 0
    others = (sampling.num_generations if method.samples else method.traces_wanted()) - sampled
    rows = {length: sampled, trace: others + method.rows_beside}
    prompt = config.data.max_prompt_length // 4

    def forward(lengths: dict[int, float]) -> float:
        """Seconds of a forward pass over so many rows of each length in every group."""
        operations = 0.0
        for tokens, count in lengths.items():
            attention = 2 * shape.layers * shape.heads * shape.head_dim * (tokens + prompt)
            operations += count * (tokens + prompt) * (2 * shape.parameters + attention)
        return sampling.rollout_batch_size * operations / ranks / (MFU * BALANCE * flops)

    own = forward({length: sampled})
    # those of a step's first mini-batch come with its update
    later = 1 - config.update.mini_batch_size / sampling.rollout_batch_size
    passes = (2 if engine.lora_r else 3) + engine.gradient_checkpointing
    seconds = {
        "sample": 0.0,
        "old log-probs": later
        * (own * config.update.recompute_old_logp + forward({trace: rows[trace]}) * method.scores_foreign),
        "reference": own if method.reference(config.model) else 0.0,
        "update": passes * forward(rows) * config.update.num_iterations,
        "other": OTHER_S,
    }
    together = sampling.vllm_tensor_parallel_size
    here = sampling.rollout_batch_size * sampled * together / ranks
    if here and not sampling.vllm_servers:
        element = 2 if engine.precision == "bfloat16" else 4
        share = sampling.vllm_gpu_memory_utilization * capacity * together
        cache = (sampling.vllm_cache_mb << 20) * together or share - element * shape.parameters
        fitting = cache / (length * shape.cache_per_token * element) if sampling.sampler == "vllm" else math.inf
        at_once = max(1.0, min(here, sampling.sampler_rows, fitting))
        # one round after another, each as long as its longest row; the caches are read for every row's own tokens
        weights = here / at_once * config.data.max_completion_length * shape.parameters
        caches = here * length * (length / 2 + prompt) * shape.cache_per_token
        seconds["sample"] = element * (weights + caches) / together / (BANDWIDTH * bandwidth)
    return seconds


def _problems(
    config: Config, shape: Shape, ranks: int, capacity: int, memory: dict[str, int], phases: dict[str, int], window: int
) -> list[str]:
    sampling, engine = config.sampling, config.engine
    problems = []
    gib = 2**30
    element = 2 if engine.precision == "bfloat16" else 4
    if sampling.sampler == "vllm" and config.method.samples and not sampling.vllm_servers:
        room = memory["sampler"] * sampling.vllm_tensor_parallel_size
        room -= element * shape.parameters
        if room < window * shape.cache_per_token * element:
            problems.append(
                f"vLLM's share of the GPU, {memory['sampler'] / gib:.1f} GiB, does not hold the weights and one "
                f"completion of {window} tokens: raise vllm_gpu_memory_utilization or vllm_tensor_parallel_size"
            )
    if phases["sampling"] > capacity:
        lower = "vllm_gpu_memory_utilization" if sampling.sampler == "vllm" else "sampler_rows"
        problems.append(f"sampling takes {phases['sampling'] / gib:.1f} GiB: lower {lower}, {_shard(config, ranks)}")
    if phases["updating"] > capacity:
        lower = "micro_batch_tokens" + ("" if engine.gradient_checkpointing else ", set gradient_checkpointing")
        problems.append(f"the update takes {phases['updating'] / gib:.1f} GiB: lower {lower}, {_shard(config, ranks)}")
    return problems


def _shard(config: Config, ranks: int) -> str:
    engine = config.engine
    if engine.engine == "torch":
        return "or shard the model over GPUs (engine deepspeed)"
    if engine.zero_stage < 3 and ranks > 1:
        return "raise zero_stage"
    return "use more GPUs" if engine.offload_optimizer else "set offload_optimizer, or use more GPUs"
