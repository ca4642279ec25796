"""Mixed-policy GRPO with policy shaping: the training loop.

A step, as in Section 3 of the paper:

    collect   the groups: rollouts of the policy, beside demonstrations of a stronger one, each with its reward (Eq. 1)
    signal    what every token counts for: the advantage over the union of the group (Eq. 4), and its weights
    update    policy gradient: pi/pi_old on-policy, shaped pi off-policy, mini-batch by mini-batch (Eq. 5, 6)
    record    metrics, samples, a checkpoint

Which rows are in a group and what their tokens count for is the method's to say (luffy/methods); nothing here depends
on which method it is. Differences from the paper's text, as in its experiments: no standard deviation, pi_phi = 1.
Difference from the reference implementation: the loss of an optimiser step is defined over its whole mini-batch
(update.py), so that the gradient does not depend on how that is cut into micro-batches.

Every random number derives from (seed, step, index), so a run that is resumed from a checkpoint draws the
same ones.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..data.problems import fingerprint
from ..data.templates import turn_end
from ..errors import ConfigError, NonFiniteError, RunError, SamplerError
from ..evaluation import ask
from ..evaluation.rewards import make_reward
from ..methods.rows import Batch, Memory, Row, Signal
from ..model import adapters
from ..model.loading import eos_ids, load_tokenizer, pick_device, tune_cpu
from ..model.packing import MicroBatch, TokenSequence, pack
from ..runs import RunDirectory, damaged_weights, make_manifest
from ..sampling.make import make_sampler
from ..sampling.ranks import Ranks, join
from .clock import Clock
from .collect import Collector
from .engine import model_logprobs
from .engines import check_installed, load_policy, load_reference, make_engine
from .keeper import Keeper, keep_failed, machine_metrics
from .metrics import Metrics, readable, rollout_metrics
from .problems import tokenized, training_problems
from .restart import Restarting
from .update import MiniBatch, loss_terms, mini_batches, packed
from .validation import Validation

log = logging.getLogger(__name__)

MEMORY_FILE = "memory.npz"  # whatever loads the model may take every .safetensors beside it

Forward = Callable[[MicroBatch], tuple[Tensor, Tensor]]


class Trainer:
    """One run of one configuration in one run directory, from its last checkpoint or from the start.

    `ranks`: the processes that train it together; each has a Trainer of its own.
    """

    def __init__(self, config: Config, run: RunDirectory, ranks: Ranks | None = None) -> None:
        self.config, self.run = config, run
        check_installed(config)
        self.ranks = ranks or join(config)
        if pick_device(config.engine.device).type == "cpu":
            tune_cpu(config.engine.num_threads)
        self.tokenizer = load_tokenizer(config.model)
        self.ends = eos_ids(config.model, self.tokenizer, config.data.template)
        day = self.ranks.broadcast(run.day())
        problems = training_problems(config)
        self.fingerprint = fingerprint(problems)
        self.problems, counts = tokenized(config, problems, self.tokenizer, day)
        families = ask.tokenize_families(ask.load_families(config), self.tokenizer, config, day)
        found = self.ranks.broadcast(run.latest_checkpoint() if self.ranks.first else None)
        self.model = load_policy(config, found[1] if found else config.model)
        self.clock, self.memory = Clock(), Memory()
        self._check_window()
        self.together = config.sampling.vllm_tensor_parallel_size
        sampler = make_sampler(self.model, self.tokenizer, config, self.ends, self.ranks)
        per_step = config.sampling.rollout_batch_size // config.update.mini_batch_size * config.update.num_iterations
        self.engine = make_engine(self.model, config, config.max_steps * per_step, self.ranks)
        self.sampler = Restarting(sampler, self.engine.weights, self.ranks, self.clock, together=self.together)
        self.start_step, self.totals = 0, Counter(prompts=0, demonstrations=0, generated_tokens=0, trained_tokens=0)
        if found:
            self.start_step, folder = found
            self.load(folder)
        if self.ranks.first:
            run.add_to_manifest(data={"fingerprint": self.fingerprint, **counts}, ranks=self.ranks.size)
        self.reference_name = config.method.reference(config.model)
        without_adapters = bool(config.engine.lora_r) and self.reference_name == config.model
        self.reference = None
        if self.reference_name and not without_adapters:
            self.reference = load_reference(config, self.reference_name, self.tokenizer)
        self.reward = make_reward(config.reward)
        self.collector = Collector(
            config, self.problems, self.tokenizer, self.reward,
            turn_end(self.tokenizer, config.data.template), self.ends, self.memory, self.clock,
        )  # fmt: skip
        self.validation = Validation(config, families, self.tokenizer, self.ends, self.reward, self.sampler, self.here)

    def _check_window(self) -> None:
        """Raises ConfigError if prompt and completion exceed the model's positions."""
        window = self.config.data.max_prompt_length + self.config.data.max_completion_length
        positions = self.model.config.max_position_embeddings
        if window > positions:
            raise ConfigError(
                f"max_prompt_length + max_completion_length is {window}, the model has {positions} positions"
            )

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what runs beside the trainer, and gives its memory back."""
        self.reward.close()
        self.sampler.close()
        self.engine.close()

    # --- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains to the last step and evaluates; leaves the run directory complete."""
        config, every = self.config, self.config.evaluation.eval_steps
        keeper = Keeper(self.run, config, self.ranks, self.start_step)
        try:
            if self.start_step == 0 and every:
                keeper.row({"step": 0, **self.validation.row()})
            for step in range(self.start_step, config.max_steps):
                done = step + 1
                self.clock.clear()
                with self.clock.phase("step"):
                    row = {"step": done, **self.train_step(step, keeper)}
                if every and (done % every == 0 or done == config.max_steps):
                    with self.clock.phase("eval"):
                        row |= self.validation.row()
                keeper.row(row | self.clock.row() | machine_metrics(self.model.device, self.reward.counts))
                keeper.checkpoint(done, self.save)
            keeper.trained()
            keeper.complete(self.validation.final(self.totals))
        finally:
            keeper.close()
            self.close()

    def train_step(self, step: int, keeper: Keeper | None = None) -> dict[str, float]:
        """One pass of the algorithm. Returns the step's metrics. Raises NonFiniteError, with the batch saved."""
        config, rows = self.config, []
        try:
            rows = self.collect(step)
            batch = Batch.of(rows, step)
            with self.clock.phase("signal"):
                signal = config.method.signal(batch)
                parts = self.mini_batches(batch, signal)
                passes = parts * config.update.num_iterations
            with self.clock.phase("update"):
                updates = [self.update(part, fresh=number == 0) for number, part in enumerate(passes)]
        except NonFiniteError as error:
            raise self._failed(error, step, rows or error.rows) from error
        config.method.remember(self.memory, batch)
        advantages = signal.advantage[batch.first + batch.lengths - 1]  # of the rows: a beginning may have its own
        if keeper is not None:
            keeper.samples(step + 1, lambda: readable(rows, advantages, self.problems))
        # (what is learned apart has no rollouts to report of)
        updates = [found for found, part in zip(updates, passes, strict=True) if not part.apart] or updates
        first = updates[0] if updates else {}
        metrics = {name: sum(update[name] for update in updates) / len(updates) for name in first}
        # of the policy that has sampled: it has moved on in the other updates
        metrics |= {name: value for name, value in first.items() if name.startswith("sampler_gap/")}
        totals = {f"total/{name}": value for name, value in self.totals.items()}
        unused = set(range(len(rows))) - set(signal.rows[signal.active].tolist())
        return rollout_metrics(rows, advantages, config.method.traces_wanted(), unused) | metrics | totals

    def collect(self, step: int) -> list[Row]:
        """All rows of a step on every rank, with rewards, by group and place. The policy is not changed."""
        share = [group for group in range(self.config.sampling.rollout_batch_size) if self.here(group)]
        if self.config.method.samples:
            mine: list[Row] = self.sampler.use(lambda sampler: self.collector.collect(step, sampler, share), lambda: [])
        else:
            mine = self.collector.collect(step, self.sampler.sampler, share)
        rows = sorted((row for rows in self.ranks.gather(mine) for row in rows), key=lambda row: (row.group, row.index))
        self.totals["prompts"] += self.config.sampling.rollout_batch_size
        self.totals["demonstrations"] += sum(row.foreign > 0 and not row.replayed for row in rows)
        self.totals["generated_tokens"] += sum(len(row.token_ids) - row.foreign for row in rows)
        return rows

    def mini_batches(self, batch: Batch, signal: Signal) -> list[MiniBatch]:
        """The step's rows by optimiser step, with the log-probs that do not depend on later updates."""
        config = self.config
        parts = mini_batches(
            batch,
            signal,
            config.update.mini_batch_size,
            self.pack,
            config.method,
            loss_type=config.update.loss_type,
            window=config.data.max_completion_length,
            device=self.model.device,
        )
        for number, part in enumerate(parts):
            own = torch.tensor([not row.off_policy for row in part.rows])
            scored = torch.ones_like(own) if config.method.scores_foreign else own
            if number and (config.update.recompute_old_logp or config.method.scores_foreign):
                self.take_old_logp(part, self.logprobs(part.rows, self.engine.token_logprobs, scored))
            if self.reference_name:
                part.reference_logp = self.logprobs(part.rows, self.reference_logprobs, own)
        return parts

    def update(self, part: MiniBatch, *, fresh: bool = True) -> dict[str, float]:
        """One optimiser step. fresh: the policy is still the one that has sampled the rows, so that its log-probs are
        the old ones (recompute_old_logp takes them from here) and must be the sampler's. Raises SamplerError if they
        are not; the weights are then as they were."""
        config = self.config
        metrics = Metrics(self.model.device)
        cap = config.sampling.vllm_importance_sampling_cap

        def loss(batch: MicroBatch) -> Tensor:
            logp, entropy = self.engine.token_logprobs(batch)
            if fresh:
                self.take_old_logp(part, logp.detach(), batch.token_index)
            terms = loss_terms(part, batch.token_index, logp, entropy, config.method, metrics, cap)
            return torch.stack(list(terms.values())).sum()

        for batch in part.micro_batches:
            self.engine.backward(loss(batch))
        with torch.no_grad():
            for batch in part.watched:
                loss(batch)
        values = metrics.values(self.ranks)
        gap, limit = values["sampler_gap/mean"], config.sampling.sampler_gap_limit
        if fresh and gap > limit:
            raise SamplerError(
                f"the sampler's log-probs differ from the trainer's by {gap:.3f} nats on average (sampler_gap_limit "
                f"{limit}): it does not have the policy's weights"
            )
        self.totals["trained_tokens"] += len(part.old_logp)
        return self.engine.step() | values

    # --- beside the algorithm ------------------------------------------------------------------------------------

    def here(self, index: int) -> bool:
        """Whether a group of the step, or an evaluation problem, is sampled and verified on this rank."""
        return self.ranks.mine(index, self.together)

    def pack(self, sequences: Sequence[TokenSequence]) -> list[MicroBatch]:
        """This rank's micro-batches, on the model's device."""
        batches = pack(
            sequences,
            micro_batch_tokens=self.config.update.micro_batch_tokens,
            part=self.ranks.rank,
            parts=self.ranks.size,
        )
        return [batch.to(self.model.device) for batch in batches]

    def take_old_logp(self, part: MiniBatch, logp: Tensor, at: Tensor | slice = slice(None)) -> None:
        """Takes log-probs of the policy that has sampled for the old ones of all tokens, or of the foreign ones, as the
        configuration and the method want."""
        if self.config.update.recompute_old_logp:
            part.old_logp[at] = logp
        elif self.config.method.scores_foreign:
            part.old_logp[at] = torch.where(part.signal.foreign[at], logp, part.old_logp[at])

    @torch.no_grad()
    def logprobs(self, rows: Sequence[Row], forward: Forward, chosen: Tensor | None = None) -> Tensor:
        """(N,) float32: log-probs of all tokens of the rows, or of those of the chosen ones, (B,) bool; else zeros."""
        chosen = torch.ones(len(rows), dtype=torch.bool) if chosen is None else chosen
        flat = torch.zeros(sum(len(row.token_ids) for row in rows), device=self.model.device)
        for batch in packed(rows, self.pack, chosen):
            flat[batch.token_index] = forward(batch)[0]
        return self.ranks.sum(flat)

    def reference_logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        if self.reference is None:  # the policy without its adapters
            with adapters.off(self.model):
                return self.engine.token_logprobs(batch)
        return model_logprobs(self.reference, batch, self.config)

    def save(self, folder: Path, step: int) -> None:
        """Fills a checkpoint folder: model, tokenizer, optimiser, what the method remembers, where the run stands."""
        self.engine.save(folder, self.tokenizer)
        if self.ranks.first:
            state = {"step": step, "totals": dict(self.totals), "data": self.fingerprint}
            state["config"] = self.config.to_dict()
            (folder / "trainer.json").write_text(json.dumps(state))
            if self.memory:
                np.savez(folder / MEMORY_FILE, **self.memory.arrays())  # type: ignore[arg-type]

    def load(self, folder: Path) -> None:
        """Takes up what `save` wrote, but for the model. Raises RunError if it is of another configuration or data."""
        state = json.loads((folder / "trainer.json").read_text())
        # (the model may be of an earlier stage, in a folder that has moved)
        if other := set(self.config.differing(state.get("config", {}))) - {"model"}:
            raise RunError(f"{folder} is of another configuration than {self.run.path} (in {', '.join(sorted(other))})")
        if state["data"] != self.fingerprint:
            raise RunError(f"{self.config.data.dataset} is not the data that {self.run.path} was trained on so far")
        self.totals.update(state["totals"])
        if (folder / MEMORY_FILE).exists():
            with np.load(folder / MEMORY_FILE, allow_pickle=False) as arrays:
                self.memory.restore(dict(arrays))
        self.engine.load_optimizer(folder)

    def _failed(self, error: NonFiniteError, step: int, rows: Sequence[Row]) -> NonFiniteError:
        """The error with the step and phase in which it came up, its rows saved."""
        rank = f"-rank-{self.ranks.rank}" if self.ranks.size > 1 else ""
        path = self.run.path / f"failed-step-{step + 1:06d}{rank}.pt"
        said = keep_failed(path, {"step": step + 1, "phase": self.clock.failed}, rows)
        return NonFiniteError(f"step {step + 1}, {self.clock.failed}: {error}. {said}")


def train(config: Config, run_dir: str | Path) -> RunDirectory:
    """Trains a configuration in a run directory, stage by stage, or goes on where it was left; returns the run.

    Raises RunError if the directory is taken or holds another configuration, ConfigError for an impossible one.
    """
    run, ranks = RunDirectory(run_dir), join(config)
    with run.locked() if ranks.first else nullcontext():
        if ranks.first:
            run.start(config, make_manifest(config.seed))
        if ranks.first and run.is_complete:
            log.info("%s is complete: nothing is left to do", run.path)
        for stage, path in run.stages(config):
            if ranks.first and path != run.path:
                RunDirectory(path).start(stage, make_manifest(stage.seed))
            if not ranks.broadcast(RunDirectory(path).is_complete):
                for model in (stage.model, stage.method.reference(stage.model)) if ranks.first else ():
                    if problem := damaged_weights(model):
                        raise RunError(f"the checkpoint {model} is not as it was written: {problem}")
                Trainer(stage, RunDirectory(path), ranks).train()
    return run


def resume(run_dir: str | Path) -> RunDirectory:
    """Resumes the run in a directory; does nothing if it is complete. Raises RunError if there is none."""
    return train(RunDirectory(run_dir).config(), run_dir)
