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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import evaluation, methods, reporting
from .assembly import check_installed, count_samplers, load_policy, make_engine, make_sampler, training_problems
from .batching import MicroBatch, pack
from .config import Config, ConfigError
from .data import DataError, fingerprint
from .engine import eos_ids, load_tokenizer, model_logprobs, pick_device, tune_cpu
from .objective import group_advantages, policy_loss
from .ranks import Ranks, join
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
from .sampling import SamplerError
from .templates import turn_end

log = logging.getLogger(__name__)

T = TypeVar("T")

GAP_BOUND = 0.2  # nats; a token whose log-probs differ by more counts as mismatched between sampler and trainer


class Trainer:
    """One run of one configuration in one run directory, from its last checkpoint or from the start.

    `ranks`: the processes that train it together; each has a Trainer of its own.
    """

    def __init__(self, config: Config, run: RunDirectory, ranks: Ranks | None = None) -> None:
        self.config = config
        self.run_dir = run
        check_installed(config)
        self.ranks = ranks or join(config)
        if pick_device(config.device).type == "cpu":
            tune_cpu(config.num_threads)
        self.tokenizer = load_tokenizer(config.model)
        self.ends = eos_ids(config.model, self.tokenizer, config.template)
        self.turn_end = turn_end(self.tokenizer, config.template)
        day = self.ranks.broadcast(run.day())
        problems = training_problems(config)
        self.problems, counts = tokenize_problems(
            problems,
            self.tokenizer,
            template=config.template,
            max_prompt_length=config.max_prompt_length,
            max_completion_length=config.max_completion_length,
            long_traces=config.long_traces,
            template_kwargs=config.template_kwargs,
            day=day,
        )
        if config.supervised:
            self.problems = [problem for problem in self.problems if problem.traces]
            if not self.problems:
                raise DataError(f"{config.dataset} has no traces to fine-tune on")
        elif config.num_off_policy and not counts["traces"]:
            raise DataError(f"no trace of {config.dataset} fits max_completion_length {config.max_completion_length}")
        if len(self.problems) < config.rollout_batch_size:
            raise ConfigError(
                f"rollout_batch_size {config.rollout_batch_size} exceeds the {len(self.problems)} problems"
            )
        log.info("training problems: %s", dict(counts))
        self.fingerprint = fingerprint(problems)
        self.families = evaluation.tokenize_families(evaluation.load_families(config), self.tokenizer, config, day)
        self.start_step, self.totals = 0, Counter(prompts=0, generated_tokens=0, trained_tokens=0)
        found = self.ranks.broadcast(run.latest_checkpoint() if self.ranks.first else None)
        updates = config.steps * config.rollout_batch_size // config.mini_batch_size
        self.model = load_policy(config, found[1] if found else config.model)
        window, positions = (
            config.max_prompt_length + config.max_completion_length,
            self.model.config.max_position_embeddings,
        )
        if window > positions:
            raise ConfigError(
                f"max_prompt_length + max_completion_length is {window}, the model has {positions} positions"
            )
        self.samplers = count_samplers(config, self.ranks)
        self.sampler = make_sampler(self.model, self.tokenizer, config, self.ranks)
        self.engine = make_engine(self.model, config, updates, self.ranks)
        if found:
            self.start_step, folder = found
            state = json.loads((folder / "trainer.json").read_text())
            if state["data"] != self.fingerprint:
                raise RunError(f"{config.dataset} is not the data that {run.path} was trained on so far")
            self.totals.update(state["totals"])
            self.engine.load_optimizer(folder)
        if self.ranks.first:
            run.add_to_manifest(data={"fingerprint": self.fingerprint, **counts}, ranks=self.ranks.size)
        self.reference = (
            load_policy(config, config.model).requires_grad_(False) if config.beta and not config.supervised else None
        )
        self.restarted = False
        self.seconds: dict[str, float] = {}

    # --- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains to the last step and evaluates; leaves the run directory complete."""
        config, run, first = self.config, self.run_dir, self.ranks.first
        if first:
            run.keep_metrics_until(self.start_step or -1)
        self.reward = make_reward(config)
        report, close_report = reporting.make_report(config, run.path) if first else reporting.no_report()
        try:
            if self.start_step == 0 and config.eval_steps:
                row = {"step": 0, **self.validate()}
                if first:
                    run.append_metrics(row)
            for step in range(self.start_step, config.steps):
                done = step + 1
                self.seconds.clear()
                with self.timed("step"):
                    row = {"step": done, **self.train_step(step)}
                if config.eval_steps and (done % config.eval_steps == 0 or done == config.steps):
                    with self.timed("eval"):
                        row |= self.validate()
                row |= {f"time/{name}": seconds for name, seconds in self.seconds.items()} | self.machine_metrics()
                if first:
                    run.append_metrics(row)
                    report(row)
                    log.info(
                        "step %d/%d: reward %.3f, length %.1f, entropy %.3f, %.2f s",
                        *(done, config.steps, row["reward/mean"], row["length/mean"], row["entropy"], row["time/step"]),
                    )
                if done % config.save_steps == 0 or done == config.steps:
                    self.save_checkpoint(done)
            if first:
                run.link_final(config.steps)
                run.add_to_manifest(seconds=seconds_per_phase(run.metrics()))
            results = self.final_evaluation()
            if first:
                run.complete(results)
            self.ranks.barrier()
        finally:
            self.reward.close()
            self.sampler.close()
            self.engine.close()
            close_report()

    def train_step(self, step: int) -> dict[str, float]:
        """One pass of the algorithm. Returns the step's metrics. Raises NonFiniteError, with the batch saved."""
        config = self.config
        rows: list[Completion] = []
        try:
            if config.supervised:
                self.rollouts(step, rows)
            else:
                self.with_sampler(lambda: self.rollouts(step, rows))
            rows = [row for share in self.ranks.gather(rows) for row in share]
            self.totals["prompts"] += config.rollout_batch_size
            self.totals["generated_tokens"] += sum(len(row.token_ids) for row in rows if not row.off_policy)
            rows.sort(key=lambda row: (row.group, row.index))
            with self.timed("advantage"):
                advantages = self.advantages(rows)
                old_logps = self.old_logps(rows)
            with self.timed("update"):
                updates: list[dict[str, float]] = []
                for first in range(0, config.rollout_batch_size, config.mini_batch_size):
                    groups = range(first, first + config.mini_batch_size)
                    chosen = [i for i, row in enumerate(rows) if row.group in groups]
                    if chosen:
                        mini_batch = [rows[i] for i in chosen]
                        olds = [old_logps[i] for i in chosen]
                        updates.append(self.update(mini_batch, advantages[chosen], olds, fresh=not updates))
        except NonFiniteError as error:
            phase = list(self.seconds)[-1] if self.seconds else "sample"
            rank = f"-rank-{self.ranks.rank}" if self.ranks.size > 1 else ""
            saved = self.run_dir.path / f"failed-step-{step + 1:06d}{rank}.pt"
            torch.save({"step": step + 1, "phase": phase, "rows": [vars(row) for row in rows]}, saved)
            raise NonFiniteError(f"step {step + 1}, {phase}: {error}. The batch is in {saved}") from error
        if self.ranks.first and config.sample_steps and (step + 1) % config.sample_steps == 0:
            self.run_dir.write_samples(step + 1, self.readable(rows, advantages))
        metrics = {name: mean([update[name] for update in updates]) for name in updates[0]} if updates else {}
        # of the policy that has sampled: it has moved on in the other updates
        metrics |= {name: value for name, value in (updates or [{}])[0].items() if name.startswith("sampler_gap/")}
        return (
            rollout_metrics(rows, advantages, config.num_off_policy)
            | metrics
            | {f"total/{k}": v for k, v in self.totals.items()}
        )

    # --- the phases ----------------------------------------------------------------------------------------------

    def rollouts(self, step: int, rows: list[Completion]) -> None:
        """Fills `rows` with this rank's of a step, with rewards; if it fails, they hold what there was until then."""
        rows.clear()
        with self.timed("sample"):
            for row in self.sample(step):
                rows.append(row)
                self.submit(row)
        with self.timed("verify"):
            for row, reward in zip(rows, self.reward.finish(), strict=True):
                row.reward = reward

    def with_sampler(self, use: Callable[[], T]) -> T:
        """What `use` returns, with the current weights in the sampler. If a sampler fails it is started anew, once in a
        run, and all ranks use theirs again. Raises SamplerError."""
        while True:
            result, failure = None, None
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()  # what the update has left in torch's cache is the sampler's now
            try:
                with self.timed("load_weights"):
                    self.sampler.load_weights(self.engine.weights())
                result = use()
                self.sampler.sleep()
            except SamplerError as error:
                failure = error
                self.reward.finish()  # what was being checked belongs to the failed attempt
            failures = [message for message in self.ranks.gather(str(failure) if failure else None) if message]
            if not failures:
                return result  # type: ignore[return-value]
            if self.restarted:
                raise SamplerError(f"the sampler has failed a second time: {failures[0]}")
            log.warning("%s", failures[0])
            self.restarted = True
            if failure:
                self.sampler.restart()

    def sample(self, step: int) -> Iterator[Completion]:
        """Yields the rows of this rank's groups as they become available: demonstrations, then rollouts."""
        config = self.config
        indices = draw_problems(len(self.problems), config.rollout_batch_size, config.seed, step)
        demonstrations, requests, groups = plan_groups(
            self.problems,
            indices,
            num_generations=config.num_generations,
            num_off_policy=config.num_off_policy,
            supervised=config.supervised,
            eos_id=self.turn_end,
            seed=config.seed,
            step=step,
        )
        yield from (row for row in demonstrations if self.here(row.group))
        here = [i for i, group in enumerate(groups) if self.here(group)]
        for i, rollout in self.sampler.sample(
            [requests[i] for i in here],
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature,
            seed=config.seed,
            step=step,
        ):
            if not math.isfinite(sum(rollout.logprobs)):
                raise NonFiniteError("the policy's probabilities are not numbers")
            yield from_rollout(requests[here[i]], groups[here[i]], rollout)

    def submit(self, row: Completion) -> None:
        """Starts the check of a row, which goes on while others are still being sampled."""
        problem = self.problems[row.problem_index]
        row.text = completion_text(row.token_ids, self.tokenizer, self.ends)
        self.reward.start(problem.problem, problem.prompt_text, row.text)

    def advantages(self, rows: Sequence[Completion]) -> Tensor:
        """(B,) float32, one a row; 0 for a row that no one has judged, which is in no baseline either."""
        if not rows:
            return torch.zeros(0)
        judged = torch.tensor([row.judged for row in rows])
        baseline = judged.clone()
        if self.config.baseline == "on_policy" and not self.config.supervised:
            baseline &= torch.tensor([not row.off_policy for row in rows])
        groups = torch.tensor([row.group for row in rows])
        empty = ~torch.isin(groups, groups[baseline])  # the rows of groups without a baseline
        advantages = group_advantages(
            torch.tensor([row.reward if row.judged else 0.0 for row in rows]),
            groups,
            scale_rewards=self.config.scale_rewards,
            baseline_mask=baseline | empty,
        )
        return torch.where(judged & ~empty, advantages, 0.0)

    def old_logps(self, rows: Sequence[Completion]) -> list[Tensor]:
        """Per row (tokens,): log-probs under the policy as it was when sampling. Demonstrations need none: zeros."""
        if self.config.recompute_old_logp:
            return self.logprobs(rows)
        return [torch.tensor(row.sampler_logprobs or [0.0] * len(row.token_ids)) for row in rows]

    def update(
        self, rows: Sequence[Completion], advantages: Tensor, old_logps: Sequence[Tensor], *, fresh: bool = True
    ) -> dict[str, float]:
        """One optimiser step on a mini-batch of rows; advantages (B,), old_logps as from `old_logps`.

        fresh: the policy is still the one that has sampled the rows, so that its log-probs must be the sampler's.
        Raises SamplerError if they are not; the weights are then as they were.
        """
        config, device = self.config, self.model.device
        lengths = torch.tensor([len(row.token_ids) for row in rows])
        # From here on everything lies on the flat token axis (N,) of the mini-batch.
        off_policy = torch.tensor([row.off_policy for row in rows]).repeat_interleave(lengths).to(device)
        advantage = advantages.repeat_interleave(lengths).to(device)
        old_logp = torch.cat(list(old_logps)).to(device)
        sampler_logp = torch.tensor(
            [logp for row in rows for logp in row.sampler_logprobs or [0.0] * len(row.token_ids)], device=device
        )
        weight = torch.ones_like(advantage)
        if config.importance_sampling_cap is not None:
            weight = (old_logp - sampler_logp).exp().clamp(max=config.importance_sampling_cap)
            advantage = torch.where(off_policy, advantage, weight * advantage)
        in_policy_loss = torch.ones_like(off_policy) if config.off_policy_loss else ~off_policy
        policy_rows = sum(config.off_policy_loss or not row.off_policy for row in rows)
        reference = (
            torch.cat(self.logprobs(rows, self.reference_logprobs)).to(device) if self.reference is not None else None
        )
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

        logps, entropies = torch.zeros(tokens, device=device), torch.zeros(tokens, device=device)
        kl = torch.zeros((), device=device)
        for batch in self.packed(rows):
            at, batch = batch.token_index.to(device), batch.to(device)
            logp, entropy = self.engine.token_logprobs(batch)
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
                kl += divergence.detach()
            self.engine.backward(loss)
            logps[at], entropies[at] = logp.detach(), entropy.detach()
        for shared in (logps, entropies, kl):
            self.ranks.sum(shared)
        sampler_gap = (logps - sampler_logp)[~off_policy].abs()
        if fresh and mean(sampler_gap) > config.sampler_gap_limit:
            raise SamplerError(
                f"the sampler's log-probs differ from the trainer's by {mean(sampler_gap):.3f} nats on average "
                f"(sampler_gap_limit {config.sampler_gap_limit}): it does not have the policy's weights"
            )
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
                "kl": kl.item(),
                "entropy": mean(entropies),
                "entropy/on": mean(entropies[~off_policy]),
                "entropy/off": mean(entropies[off_policy]),
                "old_logp_gap/mean": mean(gap),
                "old_logp_gap/max": gap.max().item() if len(gap) else 0.0,
                "sampler_gap/mean": mean(sampler_gap),
                "sampler_gap/max": sampler_gap.max().item() if len(sampler_gap) else 0.0,
                "sampler_gap/above": mean((sampler_gap > GAP_BOUND).float()),
                "importance_weight": mean(weight[~off_policy]),
            }
        )

    def here(self, index: int) -> bool:
        """Whether a group of the step, or an evaluation problem, is sampled and verified on this rank."""
        return self.ranks.mine(index, self.samplers)

    # --- beside the algorithm ------------------------------------------------------------------------------------

    def packed(self, rows: Sequence[Completion]) -> list[MicroBatch]:
        """This rank's micro-batches of the rows. All attention but sdpa takes one row at a time."""
        config = self.config
        return pack(
            [row.sequence for row in rows],
            row_tokens=config.row_tokens,
            micro_batch_tokens=config.micro_batch_tokens if config.attention == "sdpa" else 1,
            pad_id=self.tokenizer.pad_token_id,
            part=self.ranks.rank,
            parts=self.ranks.size,
        )

    def reference_logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        assert self.reference is not None
        return model_logprobs(self.reference, batch, self.config)

    @torch.no_grad()
    def logprobs(
        self, rows: Sequence[Completion], forward: Callable[[MicroBatch], tuple[Tensor, Tensor]] | None = None
    ) -> list[Tensor]:
        """Log-probs of the rows' tokens, (tokens,) float32 each, on the CPU; the policy's unless told otherwise."""
        lengths = [len(row.token_ids) for row in rows]
        flat = torch.zeros(sum(lengths), device=self.model.device)
        for batch in self.packed(rows):
            batch = batch.to(flat.device)
            flat[batch.token_index] = (forward or self.engine.token_logprobs)(batch)[0]
        return list(self.ranks.sum(flat).cpu().split(lengths))

    def evaluate(self, per_family: int, samples: int) -> dict[str, evaluation.Result]:
        """Asks the problems, each on one rank, and returns the results on all."""
        config = self.config
        families = {family: problems[:per_family] for family, problems in self.families.items()}
        found = self.with_sampler(
            lambda: evaluation.evaluate(
                self.sampler,
                self.reward,
                self.tokenizer,
                families,
                samples=samples,
                temperature=config.eval_temperature,
                max_new_tokens=config.max_completion_length,
                seed=config.seed,
                ends=self.ends,
                here=self.here,
            )
        )
        return evaluation.results(
            families, {i: line for share in self.ranks.gather(found) for i, line in share.items()}
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

    def save_checkpoint(self, step: int) -> None:
        """The first rank makes the folder and lists the files; all write into it."""
        if self.ranks.first:
            self.run_dir.save_checkpoint(step, self.save, self.config.keep_checkpoints)
        else:
            self.save(None, step)

    def save(self, folder: Path | None, step: int) -> None:
        """Fills a checkpoint folder, the first rank's: model, tokenizer, optimiser, and where the run stands."""
        folder = self.ranks.broadcast(folder)
        assert folder is not None
        self.engine.save(folder, self.tokenizer)
        if self.ranks.first:
            state = {"step": step, "totals": dict(self.totals), "data": self.fingerprint}
            (folder / "trainer.json").write_text(json.dumps(state))
        self.ranks.barrier()

    def readable(self, rows: Sequence[Completion], advantages: Tensor, groups: int = 2) -> list[dict[str, Any]]:
        """The first groups of a step as a person wants to see them."""
        return [
            {
                "prompt": self.problems[row.problem_index].prompt_text,
                "answer": self.problems[row.problem_index].problem.answer,
                "completion": row.text,
                "off_policy": row.off_policy,
                "reward": row.reward if row.judged else None,
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
    run, ranks = RunDirectory(run_dir), join(config)
    with run.locked() if ranks.first else nullcontext():
        if ranks.first:
            run.start(config, make_manifest(config.seed))
        for stage, path in methods.stages(config, run.path):
            if ranks.first and path != run.path:
                RunDirectory(path).start(stage, make_manifest(stage.seed))
            if not ranks.broadcast(RunDirectory(path).is_complete):
                Trainer(stage, RunDirectory(path), ranks).train()
    return run


def resume(run_dir: str | Path) -> RunDirectory:
    """Goes on with the run in a directory; does nothing if it is complete. Raises RunError if there is none."""
    return train(RunDirectory(run_dir).config(), run_dir)
