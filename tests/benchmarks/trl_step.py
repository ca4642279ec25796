"""TRL's GRPOTrainer on the same model, prompts, window, reward and loss, in a process of its own:
`python tests/benchmarks/trl_step.py MODEL FOLDER ROUNDS` prints tokens/s of its updates and seconds of its steps."""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

from parts import GENERATIONS, PROMPTS, WINDOW

from luffy import tinyworld
from luffy.verifier.pool import Verifier


def main(path: str, folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    verifier = Verifier(workers=1)

    def reward(prompts, completions, answer, **columns):
        return verifier.score(completions, answer, think=False)

    problems = tinyworld.make_problems("chain", "train", PROMPTS * (rounds + 1))
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
        learning_rate=1e-12, temperature=1.0, max_steps=rounds + 1, report_to="none", use_cpu=True, bf16=False,
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
    return [count / seconds for count, seconds in zip(tokens[1:], updates, strict=True)], steps[1:]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
