"""Mixed-policy GRPO with policy shaping: the training loop.

A step, as in Section 3 of the paper:

    sample     num_generations - k rollouts of the policy per problem, beside k demonstrations of a stronger one
    verify     reward 1 if the final answer is right, else 0, for either kind                                 (Eq. 1)
    advantage  reward minus the mean over the union of the group                                             (Eq. 4)
    update     policy gradient: pi/pi_old on-policy, shaped pi off-policy, mini-batch by mini-batch      (Eq. 5, 6)

Differences from the paper's text, as in its experiments: no standard deviation, pi_phi = 1. Difference from the
reference implementation: the loss of an optimiser step is defined over its whole mini-batch, so that the gradient does
not depend on how that is cut into micro-batches:

    policy term = sum of token losses / (sequences x max_completion_length);
    entropy, SFT and KL terms = means over the mini-batch's tokens that they concern.

Every random number derives from (seed, step, index), so a run that is resumed from a checkpoint goes on with the
numbers it would have had.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import evaluation, methods, reporting, tinyworld
from .batching import MicroBatch, pack
from .config import TINYWORLD, Config, ConfigError
from .data import DataError, Problem, fingerprint, load_problems
from .engine import TorchEngine, eos_ids, load_model, load_tokenizer, pick_device, tune_cpu
from .objective import group_advantages, policy_loss
from .policy import token_logprobs
from .rewards import make_reward
from .rollouts import (
    Completion,
    completion_text,
    draw_problems,
    from_rollout,
    mean,
    plan_groups,
    rollout_metrics,
    tokenize_problems,
)
from .runs import NonFiniteError, RunDirectory, RunError, make_manifest, seconds_per_phase
from .sampling import TransformersSampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def training_problems(config: Config) -> list[Problem]:
    """The problems a configuration trains on."""
    if config.dataset == TINYWORLD:
        return tinyworld.make_problems(
            tinyworld.IN_DISTRIBUTION,
            config.dataset_split,
            config.num_problems or 1000,
            difficulties=config.difficulties,
            trace_errors=config.trace_errors,
            num_traces=config.num_traces,
        )
    problems, _ = load_problems(config.dataset, config.dataset_split)
    taken = problems[: config.num_problems or None]
    log.info("%s: %d of %d problems taken", config.dataset, len(taken), len(problems))
    return taken


class Trainer:
    """One run of one configuration in one run directory, from its last checkpoint or from the start."""

    def __init__(self, config: Config, run: RunDirectory) -> None:
        self.config = config
        self.run_dir = run
        if pick_device(config.device).type == "cpu":
            tune_cpu(config.num_threads)
        self.tokenizer = load_tokenizer(config.model)
        problems = training_problems(config)
        self.problems, counts = tokenize_problems(
            problems,
            self.tokenizer,
            template=config.template,
            max_prompt_length=config.max_prompt_length,
            max_completion_length=config.max_completion_length,
            long_traces=config.long_traces,
        )
        if config.supervised:
            self.problems = [problem for problem in self.problems if problem.traces]
            if not self.problems:
                raise DataError(f"{config.dataset} has no traces to fine-tune on")
        if len(self.problems) < config.rollout_batch_size:
            raise ConfigError(
                f"rollout_batch_size {config.rollout_batch_size} exceeds the {len(self.problems)} problems"
            )
        log.info("training problems: %s", dict(counts))
        self.fingerprint = fingerprint(problems)
        self.families = evaluation.tokenize_families(evaluation.load_families(config), self.tokenizer, config)
        self.start_step, self.totals = 0, Counter(prompts=0, generated_tokens=0, trained_tokens=0)
        found = run.latest_checkpoint()
        updates = config.steps * config.rollout_batch_size // config.mini_batch_size
        self.model = self.load(found[1] if found else config.model)
        window, positions = (
            config.max_prompt_length + config.max_completion_length,
            self.model.config.max_position_embeddings,
        )
        if window > positions:
            raise ConfigError(
                f"max_prompt_length + max_completion_length is {window}, the model has {positions} positions"
            )
        self.engine = TorchEngine(self.model, config, updates)
        if found:
            self.start_step, folder = found
            state = json.loads((folder / "trainer.json").read_text())
            if state["data"] != self.fingerprint:
                raise RunError(f"{config.dataset} is not the data that {run.path} was trained on so far")
            self.totals.update(state["totals"])
            self.engine.load_optimizer(folder)
        run.add_to_manifest(data={"fingerprint": self.fingerprint, **counts})
        self.reference = (
            self.load(config.model).requires_grad_(False) if config.beta and not config.supervised else None
        )
        self.sampler = TransformersSampler(
            self.model,
            eos_ids=eos_ids(self.model, self.tokenizer),
            pad_id=self.tokenizer.pad_token_id,
            max_rows=config.sampler_rows,
        )
        self.seconds: dict[str, float] = {}

    def load(self, source: str | Path) -> PreTrainedModel:
        return load_model(source, device=self.config.device, gradient_checkpointing=self.config.gradient_checkpointing)

    # --- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains to the last step and evaluates; leaves the run directory complete."""
        config, run = self.config, self.run_dir
        run.keep_metrics_until(self.start_step or -1)
        self.reward = make_reward(config)
        report, close_report = reporting.make_report(config, run.path)
        try:
            if self.start_step == 0 and config.eval_steps:
                run.append_metrics({"step": 0, **self.validate()})
            for step in range(self.start_step, config.steps):
                done = step + 1
                self.seconds.clear()
                with self.timed("step"):
                    row = {"step": done, **self.train_step(step)}
                if config.eval_steps and (done % config.eval_steps == 0 or done == config.steps):
                    with self.timed("eval"):
                        row |= self.validate()
                row |= {f"time/{name}": seconds for name, seconds in self.seconds.items()} | self.machine_metrics()
                run.append_metrics(row)
                report(row)
                if done % config.save_steps == 0 or done == config.steps:
                    run.save_checkpoint(done, self.save, config.keep_checkpoints)
                log.info(
                    "step %d/%d: reward %.3f, length %.1f, entropy %.3f, %.2f s",
                    *(done, config.steps, row["reward/mean"], row["length/mean"], row["entropy"], row["time/step"]),
                )
            run.link_final(config.steps)
            run.add_to_manifest(seconds=seconds_per_phase(run.metrics()))
            run.complete(self.final_evaluation())
        finally:
            self.reward.close()
            close_report()

    def train_step(self, step: int) -> dict[str, float]:
        """One pass of the algorithm. Returns the step's metrics. Raises NonFiniteError, with the batch saved."""
        config = self.config
        rows: list[Completion] = []
        try:
            with self.timed("sample"):
                for row in self.sample(step):
                    rows.append(row)
                    self.submit(row)
            with self.timed("verify"):
                for row, reward in zip(rows, self.reward.finish(), strict=True):
                    row.reward = reward
            rows.sort(key=lambda row: (row.group, row.index))
            with self.timed("advantage"):
                advantages = self.advantages(rows)
                old_logps = self.old_logps(rows)
            with self.timed("update"):
                updates = []
                for first in range(0, config.rollout_batch_size, config.mini_batch_size):
                    groups = range(first, first + config.mini_batch_size)
                    chosen = [i for i, row in enumerate(rows) if row.group in groups]
                    if chosen:
                        mini_batch = [rows[i] for i in chosen]
                        updates.append(self.update(mini_batch, advantages[chosen], [old_logps[i] for i in chosen]))
        except NonFiniteError as error:
            phase = list(self.seconds)[-1] if self.seconds else "sample"
            saved = self.run_dir.path / f"failed-step-{step + 1:06d}.pt"
            torch.save({"step": step + 1, "phase": phase, "rows": [vars(row) for row in rows]}, saved)
            raise NonFiniteError(f"step {step + 1}, {phase}: {error}. The batch is in {saved}") from error
        if config.sample_steps and (step + 1) % config.sample_steps == 0:
            self.run_dir.write_samples(step + 1, self.readable(rows, advantages))
        metrics = {name: mean([update[name] for update in updates]) for name in updates[0]} if updates else {}
        return (
            rollout_metrics(rows, advantages, config.num_off_policy)
            | metrics
            | {f"total/{k}": v for k, v in self.totals.items()}
        )

    # --- the phases ----------------------------------------------------------------------------------------------

    def sample(self, step: int) -> Iterator[Completion]:
        """Yields the rows of all groups as they become available: demonstrations, then rollouts as they finish."""
        config = self.config
        indices = draw_problems(len(self.problems), config.rollout_batch_size, config.seed, step)
        demonstrations, requests, groups = plan_groups(
            self.problems,
            indices,
            num_generations=config.num_generations,
            num_off_policy=config.num_off_policy,
            supervised=config.supervised,
            eos_id=self.tokenizer.eos_token_id,
            seed=config.seed,
            step=step,
        )
        self.totals["prompts"] += len(indices)
        yield from demonstrations
        for i, rollout in self.sampler.sample(
            requests,
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature,
            seed=config.seed,
            step=step,
        ):
            if not math.isfinite(sum(rollout.logprobs)):
                raise NonFiniteError("the policy's probabilities are not numbers")
            self.totals["generated_tokens"] += len(rollout.token_ids)
            yield from_rollout(requests[i], groups[i], rollout)

    def submit(self, row: Completion) -> None:
        """Starts the check of a row, which goes on while others are still being sampled."""
        problem = self.problems[row.problem_index]
        row.text = completion_text(row.token_ids, self.tokenizer)
        self.reward.start(problem.problem, problem.prompt_text, row.text)

    def advantages(self, rows: Sequence[Completion]) -> Tensor:
        """(B,) float32, one a row."""
        if not rows:
            return torch.zeros(0)
        on_policy = torch.tensor([not row.off_policy for row in rows])
        return group_advantages(
            torch.tensor([row.reward for row in rows]),
            torch.tensor([row.group for row in rows]),
            scale_rewards=self.config.scale_rewards,
            baseline_mask=on_policy if self.config.baseline == "on_policy" and not self.config.supervised else None,
        )

    def old_logps(self, rows: Sequence[Completion]) -> list[Tensor]:
        """Per row (tokens,): log-probs under the policy as it was when sampling. Demonstrations need none: zeros."""
        if self.config.recompute_old_logp:
            return self.logprobs(self.model, rows)
        return [torch.tensor(row.sampler_logprobs or [0.0] * len(row.token_ids)) for row in rows]

    def update(self, rows: Sequence[Completion], advantages: Tensor, old_logps: Sequence[Tensor]) -> dict[str, float]:
        """One optimiser step on a mini-batch of rows; advantages (B,), old_logps as from `old_logps`."""
        config, device = self.config, self.model.device
        lengths = torch.tensor([len(row.token_ids) for row in rows])
        # From here on everything lies on the flat token axis (N,) of the mini-batch.
        off_policy = torch.tensor([row.off_policy for row in rows]).repeat_interleave(lengths).to(device)
        advantage = advantages.repeat_interleave(lengths).to(device)
        old_logp = torch.cat(list(old_logps)).to(device)
        in_policy_loss = torch.ones_like(off_policy) if config.off_policy_loss else ~off_policy
        policy_rows = sum(config.off_policy_loss or not row.off_policy for row in rows)
        reference = torch.cat(self.logprobs(self.reference, rows)).to(device) if self.reference else None
        tokens, off_tokens = len(off_policy), int(off_policy.sum())
        on_tokens = tokens - off_tokens

        def policy_term(logp: Tensor, at: Tensor | slice) -> tuple[Tensor, dict[str, float]]:
            return policy_loss(
                logp,
                old_logp[at],
                advantage[at],
                in_policy_loss[at],
                off_policy[at],
                off_shaping=config.shaping(config.off_shaping),
                on_shaping=None if config.on_shaping == "none" else config.shaping(config.on_shaping),
                clip=config.clip,
                normalizer=max(1, policy_rows) * config.max_completion_length,
                off_ratio_clip=(config.off_ratio_min, config.off_ratio_max),
            )

        logps, entropies = torch.empty(tokens, device=device), torch.empty(tokens, device=device)
        kl = 0.0
        for batch in self.packed(rows):
            at, batch = batch.token_index.to(device), batch.to(device)
            with self.engine.forward_context():
                logp, entropy = self.token_logprobs(self.model, batch)
            loss, _ = policy_term(logp, at)
            off = off_policy[at]
            if config.entropy_coef:
                loss = loss - config.entropy_coef * entropy.sum() / tokens
            if config.sft_loss_coef and off_tokens:
                loss = loss - config.sft_loss_coef * logp[off].sum() / off_tokens
            if reference is not None and on_tokens:
                ratio = (reference[at] - logp)[~off]
                divergence = (ratio.exp() - ratio - 1).sum() / on_tokens  # the estimator of Schulman's k3
                loss = loss + config.beta * divergence
                kl += divergence.item()
            self.engine.backward(loss)
            logps[at], entropies[at] = logp.detach(), entropy.detach()
        metrics = self.engine.step()
        self.totals["trained_tokens"] += tokens

        gap = (logps - old_logp)[~off_policy].abs()
        return (
            metrics
            | policy_term(logps, slice(None))[1]
            | {
                "sft_loss": mean(-logps[off_policy]),
                # over policy_loss's own, which is 0 where demonstrations take no part in the policy loss
                "off_policy_prob": mean(logps[off_policy].exp()),
                "kl": kl,
                "entropy": mean(entropies),
                "entropy/on": mean(entropies[~off_policy]),
                "entropy/off": mean(entropies[off_policy]),
                "old_logp_gap/mean": mean(gap),
                "old_logp_gap/max": gap.max().item() if len(gap) else 0.0,
            }
        )

    # --- beside the algorithm ------------------------------------------------------------------------------------

    def packed(self, rows: Sequence[Completion]) -> list[MicroBatch]:
        return pack(
            [row.sequence for row in rows],
            row_tokens=self.config.row_tokens,
            micro_batch_tokens=self.config.micro_batch_tokens,
            pad_id=self.tokenizer.pad_token_id,
        )

    def token_logprobs(self, model: PreTrainedModel, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        config = self.config
        return token_logprobs(model, batch, temperature=config.temperature, chunk_size=config.logits_chunk_size)

    @torch.no_grad()
    def logprobs(self, model: PreTrainedModel, rows: Sequence[Completion]) -> list[Tensor]:
        """Log-probs of the rows' tokens under a model, (tokens,) float32 each, on the CPU."""
        lengths = [len(row.token_ids) for row in rows]
        flat = torch.empty(sum(lengths))
        for batch in self.packed(rows):
            with self.engine.forward_context():
                flat[batch.token_index] = self.token_logprobs(model, batch.to(model.device))[0].cpu()
        return list(flat.split(lengths))

    def evaluate(self, per_family: int, samples: int) -> dict[str, evaluation.Result]:
        config = self.config
        return evaluation.evaluate(
            self.sampler,
            self.reward,
            self.tokenizer,
            {family: problems[:per_family] for family, problems in self.families.items()},
            samples=samples,
            temperature=config.eval_temperature,
            max_new_tokens=config.max_completion_length,
            seed=config.seed,
        )

    def validate(self) -> dict[str, float]:
        """Accuracy on a few held-out problems of each family, as metrics."""
        results = self.evaluate(self.config.eval_problems, 1)
        row = {f"eval/{name}": value for name, value in evaluation.averages(results, self.config.ood_sources).items()}
        for family, result in results.items():
            row |= {f"eval/{family}/accuracy": result.accuracy, f"eval/{family}/length": result.mean_length}
        return row

    def final_evaluation(self) -> dict[str, Any]:
        config = self.config
        if not config.final_eval_problems:
            return {"families": {}, "averages": {}, "totals": dict(self.totals)}
        results = self.evaluate(config.final_eval_problems, config.final_eval_samples)
        return {
            "temperature": config.eval_temperature,
            "averages": evaluation.averages(results, config.ood_sources),
            "families": {family: result.to_dict() for family, result in results.items()},
            "totals": dict(self.totals),
        }

    def save(self, folder: Path, step: int) -> None:
        """Fills a checkpoint folder: model, tokenizer, optimiser, and where the run stands."""
        self.engine.save(folder, self.tokenizer)
        state = {"step": step, "totals": dict(self.totals), "data": self.fingerprint}
        (folder / "trainer.json").write_text(json.dumps(state))

    def readable(self, rows: Sequence[Completion], advantages: Tensor, groups: int = 2) -> list[dict[str, Any]]:
        """The first groups of a step as a person wants to see them."""
        return [
            {
                "prompt": self.problems[row.problem_index].prompt_text,
                "answer": self.problems[row.problem_index].problem.answer,
                "completion": row.text,
                "off_policy": row.off_policy,
                "reward": row.reward,
                "advantage": round(advantage, 6),
                "truncated": row.truncated,
            }
            for row, advantage in zip(rows, advantages.tolist(), strict=True)
            if row.group < groups
        ]

    def machine_metrics(self) -> dict[str, float]:
        """What depends on the machine and its load: never part of what a resumed run must repeat."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if self.model.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        return {"machine/peak_memory_mb": round(peak, 1)} | {
            f"machine/verifier_{name}": count for name, count in sorted(self.reward.counts.items())
        }

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        self.seconds[phase] = 0.0
        try:
            yield
        finally:
            self.seconds[phase] = time.perf_counter() - started


def train(config: Config, run_dir: str | Path) -> RunDirectory:
    """Trains a configuration in a run directory, stage by stage, or goes on where it was left; returns the run.

    Raises RunError if the directory is taken or holds another configuration, ConfigError for an impossible one.
    """
    run = RunDirectory(run_dir)
    with run.locked():
        run.start(config, make_manifest(config.seed))
        for stage, path in methods.stages(config, run.path):
            stage_run = run if path == run.path else RunDirectory(path)
            if stage_run is not run:
                stage_run.start(stage, make_manifest(stage.seed))
            if not stage_run.is_complete:
                Trainer(stage, stage_run).train()
    return run


def resume(run_dir: str | Path) -> RunDirectory:
    """Goes on with the run in a directory; does nothing if it is complete. Raises RunError if there is none."""
    return train(RunDirectory(run_dir).config(), run_dir)
