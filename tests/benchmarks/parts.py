"""The parts of a step and their rivals: sampler, update, whole step, head, verifier.

The floor of a part is the time of its matrix products alone, joined where layers have the same input, on the same
machine in the same round: what no arrangement of the same products can fall below.
"""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from measure import ROUNDS, Line, compared, in_turns, peak_mb

from luffy import make_config, train
from luffy.methods.rows import Batch, Row, Signal
from luffy.model.loading import pick_device
from luffy.model.logprobs import head_logprobs
from luffy.runs import RunDirectory
from luffy.sampling.local import TransformersSampler
from luffy.sampling.protocol import SamplingParams, SamplingRequest
from luffy.training.trainer import Trainer
from luffy.training.update import MiniBatch
from luffy.verifier.pool import Verifier

PROMPTS, GENERATIONS, WINDOW = 16, 8, 96


def make_trainer(folder: Path, **values: object) -> Trainer:
    """A trainer of a model that writes answers of natural lengths: the embedded one after 100 steps of SFT. With a
    learning rate of next to nothing, so that every repetition measures the same model."""
    if "model" not in values:
        sft = train(make_config("sft", max_steps=100, eval_steps=0, final_eval_problems=0), folder / "sft")
        values["model"] = str(sft.path / "final")
    shape = dict(rollout_batch_size=PROMPTS, mini_batch_size=PROMPTS, num_generations=GENERATIONS)
    config = make_config("on_policy", **{**shape, "learning_rate": 1e-12, "warmup_steps": 0, **values})
    return Trainer(config, RunDirectory(folder / "on_policy"))


# --- sampler ---------------------------------------------------------------------------------------------------------


def sampler(trainer: Trainer, rounds: int = ROUNDS) -> list[Line]:
    """Tokens/s beside transformers' generate, vLLM's CPU build where it is installed, and the products alone."""
    lines = []
    for prompts in (PROMPTS // 2, PROMPTS):
        requests = [
            SamplingRequest(problem.prompt_ids, i, g)
            for i, problem in enumerate(trainer.problems[:prompts])
            for g in range(GENERATIONS)
        ]
        ours = TransformersSampler(trainer.model, eos_ids=trainer.ends, pad_id=trainer.tokenizer.pad_token_id)
        lengths = [len(rollout.token_ids) for _, rollout in ours.sample(requests, SamplingParams(WINDOW))]
        running = [sum(length > t for length in lengths) for t in range(max(lengths))]
        products = Products(trainer)
        candidates: dict[str, Callable[[], float]] = {
            f"model.generate, {len(requests)} rows": lambda prompts=prompts: _generate(trainer, prompts),
            f"TransformersSampler, {len(requests)} rows": lambda requests=requests, ours=ours: _tokens(ours, requests),
            f"products alone, {len(requests)} rows": lambda running=running, products=products: products(running),
        }
        if importlib.util.find_spec("vllm") is not None and trainer.model.device.type == "cpu":
            candidates[f"vLLM's CPU build, {len(requests)} rows"] = lambda requests=requests: _tokens(
                _vllm(trainer), requests
            )
        lines += compared("sampler", in_turns(candidates, rounds), "tokens/s", next(iter(candidates)))
    _close_vllm(trainer)
    return lines


def _tokens(sampler: object, requests: Sequence[SamplingRequest]) -> float:
    return sum(len(rollout.token_ids) for _, rollout in sampler.sample(requests, SamplingParams(WINDOW)))


def _generate(trainer: Trainer, prompts: int) -> float:
    tokenizer = trainer.tokenizer
    tokenizer.padding_side = "left"
    texts = [problem.prompt_text for problem in trainer.problems[:prompts] for _ in range(GENERATIONS)]
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(trainer.model.device)
    output = trainer.model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=True, temperature=1.0, top_k=0,
        max_new_tokens=WINDOW, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return float((output[:, batch["input_ids"].shape[1] :] != tokenizer.pad_token_id).sum())


def _vllm(trainer: Trainer) -> object:
    from luffy.sampling.vllm_sampler import VLLMOptions, VLLMSampler

    if not hasattr(trainer, "vllm_for_bench"):
        options = VLLMOptions(
            model=trainer.config.model, eos_ids=tuple(trainer.ends), max_model_len=WINDOW + 64, dtype="float32",
            device="cpu", gpu=0, gpu_memory=0.4, cache_mb=512, max_rows=PROMPTS * GENERATIONS,
        )  # fmt: skip
        trainer.vllm_for_bench = VLLMSampler(options, timeout_s=600)
    return trainer.vllm_for_bench


def _close_vllm(trainer: Trainer) -> None:
    if hasattr(trainer, "vllm_for_bench"):
        trainer.vllm_for_bench.close()
        del trainer.vllm_for_bench


# --- update ----------------------------------------------------------------------------------------------------------


def update(trainer: Trainer, rounds: int = ROUNDS) -> list[Line]:
    """Completion tokens/s beside the padded step of most code, and the products alone: of every token, and of those
    that are left when a group's prompt is computed once."""
    rows = trainer.collect(0)
    tokens = float(sum(len(row.token_ids) for row in rows))
    every = sum(len(row.prompt_ids) + len(row.token_ids) for row in rows)
    part = mini_batch(trainer, rows)
    shared = sum(batch.input_ids.numel() for batch in part.micro_batches)
    padded = f"padded full-logits update, {len(rows)} rows"
    products = Products(trainer, backward=True)
    rates = in_turns(
        {
            padded: lambda: tokens if padded_step(trainer, rows) is None else 0.0,
            f"Trainer.update, {len(rows)} rows": lambda: tokens if update_step(trainer, rows) else 0.0,
            "products alone, every token": lambda: tokens * products([every]) / every,
            "products alone, prompts once": lambda: tokens * products([shared]) / shared,
        },
        rounds,
    )
    return compared("update", rates, "tokens/s", padded)


def mini_batch(trainer: Trainer, rows: Sequence[Row]) -> MiniBatch:
    batch = Batch.of(rows)
    (part,) = trainer.mini_batches(batch, Signal.of(batch, torch.linspace(-1, 1, len(rows))))
    return part


def update_step(trainer: Trainer, rows: Sequence[Row]) -> dict[str, float]:
    return trainer.update(mini_batch(trainer, rows), fresh=False)


def padded_step(trainer: Trainer, rows: Sequence[Row]) -> None:
    """The same optimiser step as most code does it: padded rows, all positions through the head at once."""
    width = max(len(row.prompt_ids) + len(row.token_ids) for row in rows)
    ids, mask, label = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for i, row in enumerate(rows):
        both = torch.from_numpy(np.concatenate([row.prompt_ids, row.token_ids]))
        ids[i, : len(both)], mask[i, : len(both)], label[i, len(row.prompt_ids) : len(both)] = both, 1, 1
    ids, mask, label = (tensor.to(trainer.model.device) for tensor in (ids, mask, label))
    half = trainer.config.engine.precision == "bfloat16"
    with torch.autocast(trainer.model.device.type, torch.bfloat16, enabled=half):
        logits = trainer.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logp_all = logits.float().log_softmax(-1)
    logp = logp_all.gather(-1, ids[:, 1:, None]).squeeze(-1)
    entropy = -(logp_all.exp() * logp_all).sum(-1)
    on = label[:, 1:].bool()
    advantage = torch.linspace(-1, 1, len(rows), device=ids.device)[:, None]
    loss = -(advantage * (logp - logp.detach()).exp() * on).sum() / (len(rows) * WINDOW) - 1e-4 * entropy[on].mean()
    trainer.engine.backward(loss)
    trainer.engine.step()


class Products:
    """The linear layers of the trunk, as matrices. Called with numbers of tokens it applies them to so many, one number
    after another, with `backward` also for both gradients, and returns how many tokens that were."""

    def __init__(self, trainer: Trainer, *, backward: bool = False) -> None:
        half = backward and trainer.config.engine.precision == "bfloat16"  # the sampler is in the weights' precision
        self.backward, self.matrices = backward, []
        for layer in trainer.model.base_model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = torch.cat([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
            gates = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            for matrix in (qkv, attention.o_proj.weight, gates, mlp.down_proj.weight):
                self.matrices.append((matrix.bfloat16() if half else matrix).detach().clone())
        self.states: dict[tuple[int, int], torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, tokens: Sequence[int]) -> float:
        for count in tokens:
            for matrix in self.matrices:
                shape = count, matrix.shape[1]
                if shape not in self.states:
                    self.states[shape] = torch.ones(shape, dtype=matrix.dtype, device=matrix.device)
                output = self.states[shape] @ matrix.T
                if self.backward:
                    output @ matrix, output.T @ self.states[shape]
        return float(sum(tokens))


# --- the whole step --------------------------------------------------------------------------------------------------


def step(trainer: Trainer, rounds: int = ROUNDS) -> Iterator[float]:
    """Seconds of whole steps: sampling, verification, update; other problems each time."""
    numbers = getattr(trainer, "steps_for_bench", itertools.count())
    trainer.steps_for_bench = numbers
    trainer.train_step(next(numbers))
    rates = in_turns({"step": lambda: float(bool(trainer.train_step(next(numbers))))}, rounds)
    return (1 / rate for rate in rates["step"])


# --- head ------------------------------------------------------------------------------------------------------------


def head(device: str = "cpu") -> list[Line]:
    """Peak memory of forward and backward through a head of 151,936 words, in chunks and whole, beside the gradient of
    its weight."""
    device = pick_device(device).type
    states, vocabulary = 2048, 151_936
    lines = []
    weight = torch.randn(vocabulary, 64, requires_grad=True, device=device)
    hidden = torch.randn(states, 64, requires_grad=True, device=device)
    targets = torch.randint(vocabulary, (states,), device=device)
    for chunk in (128, 512, states):

        def work(chunk: int = chunk) -> None:
            logp, entropy = head_logprobs(hidden, weight, targets, chunk_size=chunk)
            (logp.sum() + entropy.sum()).backward()

        peak = (peak_mb if device == "cpu" else _gpu_peak_mb)(work)
        used, logits = peak - weight.nbytes / 2**20, chunk * vocabulary * 4 / 2**20
        name = f"head, {states} states, chunks of {chunk}"
        lines.append(Line("head", name, used, "MB", used / logits, "a chunk of logits"))
    return lines


def _gpu_peak_mb(work: Callable[[], None]) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# --- verifier --------------------------------------------------------------------------------------------------------

KINDS = {
    "integers": ["%d"],
    "mixed": ["%d"] * 12 + ["\\frac{%d}{7}"] * 3 + ["\\sqrt{%d}", "%d.5", "%d\\pi", "x^2+%d", "(%d, 3)"],
    "hard": ["\\frac{%d}{7}", "%d", "\\sqrt{%d}", "%d.5", "x^2+%d", "(%d, 3)", "%d\\pi", "2^{%d}"],
}


def verifier() -> list[Line]:
    """Checks of groups of eight answers to a problem, all different, so that none is cached; one of them is right."""
    lines = []
    for kind, answers in KINDS.items():
        forms = [answers[i % len(answers)] for i in range(250)]
        golds = [form % (i + 2) for i, form in enumerate(forms) for _ in range(8)]
        given = [form % (i + 2 + 300 * k) for i, form in enumerate(forms) for k in range(8)]
        texts = [f"so</think> The answer is $\\boxed{{{answer}}}$." for answer in given]
        for workers in (1, 2):
            with Verifier(workers=workers) as pool:
                # two to each worker, so that all have started
                pool.score(["</think> \\boxed{x}"] * 2 * workers, [f"x/{i}" for i in range(2 * workers)])
                started = time.perf_counter()
                right = sum(pool.score(texts, golds))
                rate = len(golds) / (time.perf_counter() - started)
            assert right == len(forms)
            lines.append(Line("verifier", f"verifier, {kind}, {workers} worker{'s' * (workers > 1)}", rate, "checks/s"))
    return lines
