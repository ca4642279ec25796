"""Throughput and memory of the update on this machine: tokens/s, share of the GPU's peak (MFU), peak memory against the
estimate of luffy/training/plan.py.

    python tests/gpu/throughput.py                                  # random-weight Qwen2.5-1.5B, bfloat16, on a GPU
    python tests/gpu/throughput.py --engine deepspeed --zero-stage 2
    python tests/gpu/throughput.py --size test --device cpu --updates 2     # the script itself, in seconds

A model of the given shape is made with random weights, and trained on packs of `--row-tokens` random tokens. Nothing is
downloaded. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from luffy import make_config
from luffy.model.packing import TokenSequence, pack
from luffy.training.engines import load_policy, make_engine
from luffy.training.plan import GPUS, SHAPES, Shape, plan
from luffy.training.ranks import join

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1.5b")
    parser.add_argument("--engine", choices=("torch", "deepspeed"), default="torch")
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--attention", choices=("sdpa", "flex_attention", "flash_attention_2"), default="sdpa")
    parser.add_argument("--row-tokens", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=4, help="packs of an update, a micro-batch each")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of a sequence in a pack")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="whose peak the MFU refers to")
    known = parser.parse_args()
    shape, row = SIZES[known.size], min(known.row_tokens, 512 if known.size == "test" else known.row_tokens)
    sequence = min(known.sequence, row)

    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, Path(folder))
        config = make_config(
            "sft", model=folder, engine=known.engine, zero_stage=known.zero_stage, attn_implementation=known.attention,
            precision="bfloat16", gradient_checkpointing=True, row_tokens=row, micro_batch_tokens=row,
            logits_chunk_size=2048, device=known.device, max_prompt_length=sequence // 8,
            max_completion_length=sequence - sequence // 8,
        )  # fmt: skip
        model = load_policy(config, folder)
        engine = make_engine(model, config, known.updates, join(config))
    prompt, completion = sequence // 8, sequence - sequence // 8
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> np.ndarray:
        return torch.randint(3, shape.vocabulary, (count,), generator=draw).numpy()

    sequences = [TokenSequence(tokens(prompt), tokens(completion)) for _ in range(known.rows * (row // sequence))]
    batches = pack(sequences, row_tokens=row, micro_batch_tokens=row)
    total = sum(map(len, sequences))
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
                "attention": known.attention,
                "row_tokens": row,
                "tokens_per_s": round(rate, 1),
                "mfu": round(rate * operations / GPUS[known.gpu][0], 4),
                "peak_gib": round(peak / 2**30, 3),
                "estimate_gib": round((made.phases["updating"] - made.memory["reserve"]) / 2**30, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
