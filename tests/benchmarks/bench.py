"""Speed and memory, side by side in one run: `python tests/benchmarks/bench.py [sampler update head verifier]`.

Everything runs on one thread (OMP_NUM_THREADS) with a model that writes traces of natural lengths: the embedded base
model after 100 steps of supervised fine-tuning. Ratios are what counts; run it on an otherwise idle machine. The
comparison with TRL needs the extra `bench`.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

from luffy import make_config, tinyworld, train
from luffy.methods.rows import Batch, Signal
from luffy.model.logprobs import head_logprobs
from luffy.runs import RunDirectory
from luffy.sampling.local import TransformersSampler
from luffy.sampling.protocol import SamplingParams, SamplingRequest
from luffy.training.trainer import Trainer
from luffy.verifier.pool import Verifier

PROMPTS, GENERATIONS, WINDOW = 16, 8, 96
REPEATS = 7


def line(name: str, value: str, ratio: str = "") -> None:
    print(f"{name:<58}{value:>22}{ratio:>10}", flush=True)


def timed(function, repeats=REPEATS):
    """Median seconds of a call, after one to warm up, and what the last one returned."""
    result, seconds = function(), []
    for _ in range(repeats):
        started = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def make_trainer(folder: Path) -> Trainer:
    values = dict(rollout_batch_size=PROMPTS, mini_batch_size=PROMPTS, num_generations=GENERATIONS, warmup_steps=0)
    sft = train(make_config("sft", steps=100, eval_steps=0, final_eval_problems=0), folder / "sft")
    # a learning rate of next to nothing: every repetition measures the same model
    config = make_config("on_policy", **values, model=str(sft.path / "final"), learning_rate=1e-12, entropy_coef=1e-4)
    return Trainer(config, RunDirectory(folder / "on_policy"))


def bench_sampler(trainer: Trainer) -> None:
    model, tokenizer = trainer.model, trainer.tokenizer
    for prompts in (8, PROMPTS):
        problems = trainer.problems[:prompts]
        requests = [SamplingRequest(p.prompt_ids, i, g) for i, p in enumerate(problems) for g in range(GENERATIONS)]
        sampler = TransformersSampler(model, eos_ids=[tokenizer.eos_token_id], pad_id=tokenizer.pad_token_id)

        def ours(sampler=sampler, requests=requests):
            found = sampler.sample(requests, SamplingParams(WINDOW))
            return sum(len(rollout.token_ids) for _, rollout in found)

        tokenizer.padding_side = "left"
        batch = tokenizer(
            [p.prompt_text for p in problems for _ in range(GENERATIONS)], return_tensors="pt", padding=True
        )

        def theirs(batch=batch):
            output = model.generate(
                **{k: batch[k] for k in ("input_ids", "attention_mask")}, do_sample=True, temperature=1.0, top_k=0,
                max_new_tokens=WINDOW, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            new = output[:, batch["input_ids"].shape[1] :]
            return int((new != tokenizer.pad_token_id).sum())

        seconds, tokens = timed(theirs)
        slow = tokens / seconds
        line(f"model.generate, {len(requests)} rows", f"{slow:,.0f} tokens/s")
        seconds, tokens = timed(ours)
        line(
            f"TransformersSampler, {len(requests)} rows",
            f"{tokens / seconds:,.0f} tokens/s",
            f"{tokens / seconds / slow:.2f}x",
        )


def plain_step(trainer: Trainer, rows: list) -> None:
    """The same optimiser step as most code does it: padded rows, all positions through the head at once."""
    width = max(len(row.prompt_ids) + len(row.token_ids) for row in rows)
    ids, mask, label = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for i, row in enumerate(rows):
        both = torch.from_numpy(np.concatenate([row.prompt_ids, row.token_ids]))
        ids[i, : len(both)], mask[i, : len(both)], label[i, len(row.prompt_ids) : len(both)] = both, 1, 1
    logits = trainer.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logp_all = logits.float().log_softmax(-1)
    logp = logp_all.gather(-1, ids[:, 1:, None]).squeeze(-1)
    entropy = -(logp_all.exp() * logp_all).sum(-1)
    on = label[:, 1:].bool()
    advantage = torch.linspace(-1, 1, len(rows))[:, None]
    loss = -(advantage * (logp - logp.detach()).exp() * on).sum() / (len(rows) * WINDOW) - 1e-4 * entropy[on].mean()
    trainer.engine.backward(loss)
    trainer.engine.step()


def bench_update(trainer: Trainer, folder: Path) -> None:
    rows = trainer.collect(0)
    tokens = sum(len(row.token_ids) for row in rows)
    batch = Batch.of(rows)
    signal = Signal.of(batch, torch.linspace(-1, 1, len(rows)))
    seconds, _ = timed(lambda: plain_step(trainer, rows))
    plain = tokens / seconds
    line(f"padded full-logits update, {len(rows)} rows", f"{plain:,.0f} tokens/s")
    seconds, _ = timed(lambda: trainer.update(*trainer.mini_batches(batch, signal)))
    ours = tokens / seconds
    line(f"Trainer.update, {len(rows)} rows", f"{ours:,.0f} tokens/s", f"{ours / plain:.2f}x")

    steps = itertools.count()  # another step every time: other rollouts, and no check answered from the cache
    seconds, _ = timed(lambda: trainer.train_step(next(steps)))
    line("Trainer.train_step (sample, verify, update)", f"{seconds * 1000:,.0f} ms")
    trainer.reward.close()
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed (extra `bench`): no comparison")
        return
    # In a process of its own, without the memory settings of ours.
    command = [sys.executable, __file__, "trl", trainer.config.model, str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    theirs, their_step = json.loads(output.splitlines()[-1])
    line("TRL GRPOTrainer update", f"{theirs:,.0f} tokens/s", f"{ours / theirs:.2f}x")
    line("TRL GRPOTrainer step", f"{their_step * 1000:,.0f} ms", f"{their_step / seconds:.2f}x")


def trl_step(path: str, folder: Path) -> tuple[float, float]:
    """TRL's tokens/s in the update and seconds per step: same model, prompts, window, reward and loss."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    verifier = Verifier(workers=1)

    def reward(prompts, completions, answer, **columns):
        return verifier.score(completions, answer, think=False)

    problems = tinyworld.make_problems("chain", "train", PROMPTS * (REPEATS + 1))
    data = Dataset.from_list([{"prompt": p.prompt[0]["content"], "answer": p.answer} for p in problems])
    steps, generation, tokens = [], [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            steps.append(time.perf_counter() - self.started)

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            started = time.perf_counter()
            output = super()._generate_and_score_completions(inputs)
            generation.append(time.perf_counter() - started)
            tokens.append(int(output["completion_mask"].sum()))
            return output

    config = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=PROMPTS * GENERATIONS, num_generations=GENERATIONS,
        steps_per_generation=1, max_completion_length=WINDOW, beta=0.0, loss_type="dr_grpo", scale_rewards="none",
        learning_rate=1e-12, temperature=1.0, max_steps=REPEATS + 1, report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, logging_steps=1000, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    theirs = Timed(
        model=model, args=config, train_dataset=data, reward_funcs=reward, callbacks=[Clock()],
        processing_class=AutoTokenizer.from_pretrained(path),
    )  # fmt: skip
    theirs.train()
    verifier.close()
    updates = [step - made for step, made in zip(steps, generation, strict=True)][1:]
    rates = [count / seconds for count, seconds in zip(tokens[1:], updates, strict=True)]
    return statistics.median(rates), statistics.median(steps[1:])


def bench_head() -> None:
    """Peak memory of forward and backward through a head of 151,936 words, in chunks and whole."""
    states, vocabulary = 2048, 151_936
    for chunk in (128, 512, states):
        with tempfile.NamedTemporaryFile() as file:
            if os.fork() == 0:  # a process of its own, so that each peak is its own
                head = torch.nn.Linear(64, vocabulary, bias=False)
                hidden = torch.randn(states, 64, requires_grad=True)
                targets = torch.randint(vocabulary, (states,))
                before, peak, stop = memory_mb(), [0.0], threading.Event()

                def watch(peak=peak, stop=stop):
                    while not stop.wait(0.002):
                        peak[0] = max(peak[0], memory_mb())

                thread = threading.Thread(target=watch)
                thread.start()
                logp, entropy = head_logprobs(hidden, head, targets, chunk_size=chunk)
                (logp.sum() + entropy.sum()).backward()
                stop.set()
                thread.join()
                Path(file.name).write_text(str(peak[0] - before))
                os._exit(0)
            os.wait()
            used = float(Path(file.name).read_text())
        whole = chunk * vocabulary * 4 / 2**20
        line(f"head, {states} states, chunks of {chunk}", f"{used:,.0f} MB", f"{used / whole:.1f} chunk")


def memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


KINDS = {
    "integers": ["%d"],
    "mixed": ["%d"] * 12 + ["\\frac{%d}{7}"] * 3 + ["\\sqrt{%d}", "%d.5", "%d\\pi", "x^2+%d", "(%d, 3)"],
    "hard": ["\\frac{%d}{7}", "%d", "\\sqrt{%d}", "%d.5", "x^2+%d", "(%d, 3)", "%d\\pi", "2^{%d}"],
}


def bench_verifier() -> None:
    """Checks of groups of eight answers to a problem, all different, so that none is cached; one of them is right."""
    for kind, answers in KINDS.items():
        forms = [answers[i % len(answers)] for i in range(250)]
        golds = [form % (i + 2) for i, form in enumerate(forms) for _ in range(8)]
        given = [form % (i + 2 + 300 * k) for i, form in enumerate(forms) for k in range(8)]
        completions = [f"so</think> The answer is $\\boxed{{{answer}}}$." for answer in given]
        for workers in (1, 2):
            with Verifier(workers=workers) as verifier:
                verifier.score(["</think> 1"] * workers, [str(i) for i in range(workers)])  # they start when needed
                started = time.perf_counter()
                scores = verifier.score(completions, golds)
                seconds = time.perf_counter() - started
            assert sum(scores) == len(forms)
            line(f"verifier, {kind}, {workers} worker{'s' * (workers > 1)}", f"{len(golds) / seconds:,.0f} checks/s")


def main() -> None:
    if sys.argv[1:2] == ["trl"]:
        print(json.dumps(trl_step(sys.argv[2], Path(sys.argv[3]))))
        return
    wanted = sys.argv[1:] or ["sampler", "update", "head", "verifier"]
    line("one thread", "", "ratio")
    if "head" in wanted:  # first: later the C library keeps freed memory (engine.tune_cpu)
        bench_head()
    with tempfile.TemporaryDirectory() as folder:
        if {"sampler", "update"} & set(wanted):
            trainer = make_trainer(Path(folder))
            if "sampler" in wanted:
                bench_sampler(trainer)
            if "update" in wanted:
                bench_update(trainer, Path(folder))
    if "verifier" in wanted:
        bench_verifier()


if __name__ == "__main__":
    main()
