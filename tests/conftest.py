"""Shared fixtures: the embedded model and small random ones of several architectures, all real transformers models."""

from __future__ import annotations

import os

# One thread: two threads beside any busy process spin-wait, and the bits of a sum depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tiny():
    """The embedded base model and its tokenizer. Tests must not change its weights."""
    from luffy.engine import load_model, load_tokenizer

    return load_model("tiny").eval(), load_tokenizer("tiny")


def random_model(architecture: str, tied: bool = True, vocab_size: int = 61, seed: int = 0):
    """A small random-weight causal language model of an architecture, in float32."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{architecture}Config")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=vocab_size, max_position_embeddings=256, tie_word_embeddings=tied,
        initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return getattr(transformers, f"{architecture}ForCausalLM")(config).eval()


ARCHITECTURES = [(name, tied) for name in ("Qwen2", "Qwen3", "Llama") for tied in (True, False)]


@pytest.fixture(scope="session")
def short_run() -> dict[str, object]:
    """Values that make a run take about a second."""
    return dict(
        steps=4, rollout_batch_size=4, mini_batch_size=2, num_generations=4, max_completion_length=48, num_problems=40,
        eval_steps=2, eval_problems=4, final_eval_problems=4, final_eval_samples=2, save_steps=2, sample_steps=2,
    )  # fmt: skip
