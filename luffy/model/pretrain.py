"""Makes the base model of the embedded world: `python -m luffy.model.pretrain --size tiny --out DIR`.

Two phases of supervised training on documents (prompt, response) with the loss on the response only. First the
primitives: one and two operations, clean. Then the habits: most questions are answered at once, and the harder they
are the more often wrongly; a few short chains; hardly any text in the teacher's style; and some worked sheets, after
the cue `#`, at every length and in every family. The result can calculate step by step, but does not when asked `?`.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import tinyworld
from ..data.tinyworld import FAMILIES
from .logprobs import prepare, token_logprobs
from .packing import TokenSequence, pack

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """The pre-training mixture and schedule, the same for both sizes but for the learning rate."""

    updates: int = 2200
    primitive_updates: int = 700
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup: int = 50
    decay_share: float = 0.4  # linear decay to zero over the last part
    family_weights: tuple[tuple[str, float], ...] = (("chain", 0.55), ("words", 0.15), ("flip", 0.15), ("prefix", 0.15))
    sheet_share: float = 0.10  # worked sheets after `#`
    sheet_difficulty: int = 5  # hardest of them
    start_share: float = 0.10  # only the first step after `?`, then an answer
    teacher_share_easy: float = 0.005  # teacher's style after `?`, difficulty 2 and 3
    teacher_share_hard: float = 0.0005  # and above
    answer_noise: tuple[float, ...] = (0.0, 0.2, 0.4, 0.5)  # share of wrong direct answers at difficulty 2, 3, 4, 5+


def document(rng: random.Random, recipe: Recipe, primitives: bool) -> tuple[str, str]:
    """One pre-training document as (prompt, response)."""
    names, weights = zip(*recipe.family_weights, strict=True)
    family = FAMILIES[rng.choices(names, weights)[0]]
    kind = rng.random()
    if primitives:
        difficulty = rng.choice((2, 2, 3))
        sheet = kind < 0.5
        teacher = start = noise = 0.0
    else:
        sheet = kind < recipe.sheet_share
        difficulty = rng.randint(2, recipe.sheet_difficulty if sheet else 6)
        teacher = recipe.teacher_share_easy if difficulty <= 3 else recipe.teacher_share_hard
        start = recipe.start_share
        noise = recipe.answer_noise[min(difficulty, 5) - 2]
    chain = tinyworld.draw_chain(rng, family, difficulty, "pretrain")
    if sheet:
        return tinyworld.write_chain(chain, family.style, "#"), ";".join(tinyworld.worked_steps(chain))
    prompt = tinyworld.write_chain(chain, family.style)
    style = rng.random()
    if style < teacher:
        return prompt, tinyworld.teacher_trace(chain, rng)
    answer = rng.randrange(100) if rng.random() < noise else chain.values()[-1]
    first_step = tinyworld.worked_steps(chain)[0] if style < teacher + start else ""
    return prompt, f"{first_step}\\boxed{{{answer}}}"


@dataclass(frozen=True)
class Schedule:
    """Updates and their learning rate: linear warm-up, then constant, then linear decay to zero over decay_share."""

    updates: int
    batch_size: int
    learning_rate: float
    warmup: int
    decay_share: float

    def at(self, update: int) -> float:
        remaining = (self.updates - update) / (self.updates * self.decay_share)
        return self.learning_rate * min(1.0, (update + 1) / self.warmup, remaining)


Draw = Callable[[random.Random, int], tuple[str, str]]  # a document of an update as (prompt, response)


def fit(model: Any, tokenizer: Any, draw: Draw, schedule: Schedule, seed: str) -> None:
    """Trains a model on documents, with the loss on the response only. One line of progress per 100 updates."""
    prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    started = time.perf_counter()
    for update in range(schedule.updates):
        rng = random.Random(f"{seed}/{update}")
        texts = [draw(rng, update) for _ in range(schedule.batch_size)]
        sequences = [
            TokenSequence(
                np.array(tokenizer.encode(prompt)), np.array([*tokenizer.encode(response), tokenizer.eos_token_id])
            )
            for prompt, response in texts
        ]
        tokens = sum(len(sequence.completion_ids) for sequence in sequences)
        total = 0.0
        for batch in pack(sequences, micro_batch_tokens=8192):
            logp, _ = token_logprobs(model, batch, chunk_size=8192)
            loss = -logp.sum() / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(update)
        optimizer.step()
        optimizer.zero_grad()
        if (update + 1) % 100 == 0:
            log.info("update %d loss %.4f (%.0f s)", update + 1, total, time.perf_counter() - started)


def pretrain(size: str, out: Path, seed: int = 0, recipe: Recipe | None = None) -> None:
    """Trains the model that all base models go on from, and writes it to `out` in Hugging Face layout."""
    from transformers import Qwen2ForCausalLM

    recipe = recipe or Recipe()
    torch.manual_seed(seed)
    tokenizer = tinyworld.make_tokenizer()
    model = Qwen2ForCausalLM(tinyworld.model_config(size))
    schedule = Schedule(recipe.updates, recipe.batch_size, recipe.learning_rate, recipe.warmup, recipe.decay_share)
    fit(
        model,
        tokenizer,
        lambda rng, update: document(rng, recipe, update < recipe.primitive_updates),
        schedule,
        f"pretrain/{seed}",
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another base model")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, Hugging Face layout")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # the same bits whatever else the machine does
    pretrain(arguments.size, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
