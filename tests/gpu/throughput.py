"""Throughput and memory of the update on this machine: tokens/s, share of the GPU's peak (MFU), peak memory against the
estimate of luffy/training/plan.py.

    python tests/gpu/throughput.py                                  # random-weight Qwen2.5-1.5B, bfloat16, on a GPU
    python tests/gpu/throughput.py --engine deepspeed --zero-stage 2
    python tests/gpu/throughput.py --parts sampler update head      # and the rows of tests/benchmarks/bench.py
    python tests/gpu/throughput.py --liger                          # with Liger's kernels (package liger-kernel)
    python tests/gpu/throughput.py --size test --device cpu --updates 2     # the script itself, in seconds

A model of the given shape is made with random weights, and trained on groups of random tokens with one prompt each.
Nothing is downloaded. The line of the update is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import parts
from transformers import PreTrainedModel

from luffy import Config, make_config
from luffy.model.loading import load_tokenizer
from luffy.model.packing import TokenSequence, pack
from luffy.sampling.ranks import join
from luffy.training.engine import Engine
from luffy.training.engines import load_policy, make_engine
from luffy.training.plan import GPUS, SHAPES, Shape, plan

SIZES = {
    "test": Shape(64, 2, 4, 2, 128, 512, True, 16),
    "0.5b": Shape(896, 24, 14, 2, 4864, 151936, True, 64),
    "1.5b": SHAPES["Qwen2.5-Math-1.5B"],
}


def make_model(shape: Shape, folder: Path) -> None:
    """Writes a Qwen2 of the shape with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings = Qwen2Config(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.intermediate, vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied, max_position_embeddings=32_768, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(settings).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)  # of few words, which is all that a prompt needs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1.5b")
    parser.add_argument("--engine", choices=("torch", "deepspeed"), default="torch")
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--micro-batches", type=int, default=4, help="of an update")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of a sequence, of which an eighth is prompt")
    parser.add_argument("--group", type=int, default=4, help="sequences with one prompt")
    parser.add_argument("--liger", action="store_true", help="replace norms, rotary embedding and SwiGLU by Liger's")
    parser.add_argument("--parts", nargs="*", default=[], choices=("sampler", "update", "head"))
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="whose peak the MFU refers to")
    known = parser.parse_args()
    shape = SIZES[known.size]
    width = min(known.micro_batch_tokens, 512 if known.size == "test" else known.micro_batch_tokens)
    sequence = min(known.sequence, width)
    if known.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2(cross_entropy=False, fused_linear_cross_entropy=False)

    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, Path(folder))
        config = make_config(
            "sft", model=folder, engine=known.engine, zero_stage=known.zero_stage, precision="bfloat16",
            gradient_checkpointing=True, micro_batch_tokens=width, logits_chunk_size=2048, device=known.device,
            max_prompt_length=sequence // 8, max_completion_length=sequence - sequence // 8,
        )  # fmt: skip
        model = load_policy(config, folder)
        engine = make_engine(model, config, known.updates, join(config))
        measure(known, config, shape, model, engine)
        del model, engine
        if "head" in known.parts:
            print(*parts.head(known.device), sep="\n")
        if {"sampler", "update"} & set(known.parts):
            precise = dict(precision="bfloat16", recompute_old_logp=True, sampler_gap_limit=10.0)
            with parts.make_trainer(Path(folder), model=folder, device=known.device, **precise) as trainer:
                for part in (parts.sampler, parts.update):
                    if part.__name__ in known.parts:
                        print(*part(trainer, 3), sep="\n")


def measure(known: argparse.Namespace, config: Config, shape: Shape, model: PreTrainedModel, engine: Engine) -> None:
    """Prints what an update takes."""
    prompt = config.data.max_prompt_length
    completion, sequence = config.data.max_completion_length, prompt + config.data.max_completion_length
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> np.ndarray:
        return torch.randint(3, shape.vocabulary, (count,), generator=draw).numpy()

    sequences: list[TokenSequence] = []
    while len(sequences) * sequence < known.micro_batches * config.update.micro_batch_tokens:
        same = tokens(prompt)
        sequences += [TokenSequence(same, tokens(completion)) for _ in range(known.group)]
    batches = pack(sequences, micro_batch_tokens=config.update.micro_batch_tokens)
    total = len(sequences) * sequence
    on_gpu = model.device.type == "cuda"
    seconds = []
    for update in range(known.updates + 1):
        started = time.perf_counter()
        for batch in batches:
            logp, _ = engine.token_logprobs(batch.to(model.device))
            engine.backward(-logp.sum() / total)
        engine.step()
        if on_gpu:
            torch.cuda.synchronize()
        if update:  # the first one compiles and allocates
            seconds.append(time.perf_counter() - started)
        elif on_gpu:
            torch.cuda.reset_peak_memory_stats()
    computed = sum(batch.input_ids.numel() for batch in batches) / total  # the prompts of a group once
    rate = total / (sum(seconds) / len(seconds))
    # 6 operations per parameter and token, and the attention's: 12 x layers x heads x head_dim x mean length / 2
    operations = 6 * shape.parameters + 6 * shape.layers * shape.heads * shape.head_dim * sequence
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    made = plan(config, gpu=known.gpu, shape=shape)
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name() if on_gpu else "cpu",
                "size": known.size,
                "engine": known.engine,
                "liger": known.liger,
                "micro_batch_tokens": config.update.micro_batch_tokens,
                "tokens_computed": round(computed, 3),
                "tokens_per_s": round(rate, 1),
                "mfu": round(rate * computed * operations / GPUS[known.gpu][0], 4),
                "peak_gib": round(peak / 2**30, 3),
                "estimate_gib": round((made.phases["updating"] - made.memory["reserve"]) / 2**30, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
