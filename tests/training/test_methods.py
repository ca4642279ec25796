"""Every method through the real trainer: committed numbers of a short run, prefixes, memory, weights that follow the
policy, and a method of one's own as CONTRIBUTING.md has it."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same_run, cut_short, first_part, make_trainer, weights
from paths import ROOT

from luffy import ConfigError, RunDirectory, make_config, resume, train
from luffy.methods import PAPER_METHODS, OnPolicy, RLSFTLoss, register
from luffy.methods.rows import ROLLOUT, Batch, Memory, Signal, Start, whole
from luffy.training.metrics import Metrics
from luffy.training.update import loss_terms

COMMITTED = Path(__file__).with_name("short_runs.json")
# The world before it was a family of worlds, whose numbers these are.
OLD_WORLD = dict(
    model="tiny", difficulties=(3, 4, 5, 6), verbosity=0.0, max_completion_length=96, max_grad_norm=1.0,
    learning_rate=3e-4,
)  # fmt: skip
OLD_METHODS = {"sft": {"sft_learning_rate": 1e-3}, "rl_sft_loss": {"sft_loss_coef": 0.03}}
SHORT = dict(
    steps=2, rollout_batch_size=8, mini_batch_size=4, num_problems=40, eval_steps=0, final_eval_problems=0,
    save_steps=2, sample_steps=0,
)  # fmt: skip


@pytest.mark.parametrize("method", PAPER_METHODS)
def test_metrics_of_a_short_run_are_the_committed_ones(method, tmp_path):
    """Two steps, four optimiser steps. The numbers were written before the trainer was made of parts, by another loop;
    a change that moves them on purpose writes them again and says so."""
    run = train(make_config(method, **SHORT, **OLD_WORLD, **OLD_METHODS.get(method, {})), tmp_path / method)
    rows = [row for row in run.metrics() if row["step"]]
    assert run.is_complete
    for row, expected in zip(rows, json.loads(COMMITTED.read_text())[method], strict=True):
        # the gap between sampler and trainer is rounding, of which only the size is known
        gaps = {name: value for name, value in expected.items() if name.startswith("sampler_gap/")}
        assert {name: row[name] for name in gaps} == pytest.approx(gaps, abs=1e-5), method
        # what an update moves is a difference of log-probs near 10, each known to 1e-6 in float32
        moved = {name: value for name, value in expected.items() if name.startswith("old_logp_gap/")}
        assert {name: row[name] for name in moved} == pytest.approx(moved, rel=1e-4, abs=2e-6), method
        # sums of terms that cancel, such as pg_loss, are known to the rounding of the terms
        others = {name: value for name, value in expected.items() if name not in gaps.keys() | moved.keys()}
        assert {name: row[name] for name in others} == pytest.approx(others, rel=1e-4, abs=1e-7), method
    if method == "sft_rl":
        first = RunDirectory(run.path / "first_stage")
        assert first.is_complete and first.config().method.name == "sft"
        assert any(not torch.equal(w, weights(first)[name]) for name, w in weights(run).items())


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("mixed", dict(prefix_strategy="fixed", prefix_min=0.5, prefix_max=0.5)),
        ("luffy", dict(prefix_strategy="random", prefix_min=0.2, prefix_max=0.9, num_off_policy=3)),
        ("mixed", dict(prefix_strategy="random", prefix_min=0.2, prefix_max=0.9, num_off_policy=3, prefix_shared=True)),
        ("luffy", dict(prefix_strategy="linear", prefix_max=0.8, prefix_steps=4)),
        ("luffy", dict(prefix_strategy="reverse_linear", prefix_max=0.8, prefix_steps=4)),
    ],
)
def test_prefix_strategies_train_and_resume(method, values, tmp_path):
    """A short run of each in the tiny world: rows begin in a trace and go on; their share moves as it should."""
    run = train(make_config(method, **{**SHORT, "steps": 4, **values, "num_traces": 3}), tmp_path / "run")
    rows = run.metrics()
    shares = [row["prefix/share"] for row in rows if row["groups/prefix_share"]]
    assert run.is_complete and shares and all(0 < share < 1 for share in shares)
    assert all(row["grad_norm"] > 0 and row["off_policy_prob"] > 0 for row in rows)
    assert all(row["groups/off_policy_share"] == 0 for row in rows)
    if values["prefix_strategy"] == "random":
        assert all(row["groups/prefix_share"] == pytest.approx(3 / 8) for row in rows)
    assert_same_run(resume(cut_short(run.path, tmp_path / "cut", 4)), run)


def test_known_teacher_needs_its_log_probs(tmp_path):
    with pytest.raises(ValueError, match="traces without trace_logprobs, which off_ratio known needs"):
        make_trainer(tmp_path, off_ratio="known", **SHORT)


# --- memory ----------------------------------------------------------------------------------------------------------


def replaying():
    """On-policy RL that also replays a right answer of an earlier step, with its ratio to the policy of then."""

    @register("replaying", "Replay")
    class Replaying(OnPolicy):
        def rounds(self, draw):
            old = draw.memory.of(draw.problem)[-1:]
            yield [ROLLOUT] * (draw.size - len(old)) + old

        def signal(self, batch):
            return Signal.of(batch, self.advantages(batch), teacher=batch.logprobs)

        def remember(self, memory, batch):
            for row in batch.rows:
                if row.right and row.foreign == 0:
                    memory.keep(row.problem, Start(row.token_ids, row.logprobs, whole=True), most=2)

    return Replaying


def test_a_replay_replays_and_is_resumed_to_the_bit(tmp_path):
    """Eight easy problems, all in every step: from the second step on, what was right comes back with the log-probs it
    was sampled with, and a run that was cut has the same memory."""
    replaying()
    values = {**SHORT, "num_problems": 8, "difficulties": (2,), "steps": 6, "num_generations": 4}
    run = train(make_config("replaying", **values), tmp_path / "run")
    replayed = [row["groups/off_policy_share"] for row in run.metrics()]
    assert replayed[0] == 0 and all(share > 0 for share in replayed[1:])
    assert all(row["reward/off"] == 1.0 for row in run.metrics()[1:])
    # the policy moves little in two optimiser steps: its ratio to that of the step before is near 1, and not 1
    ratios = [row["off_ratio_mean"] for row in run.metrics()[1:]]
    assert all(0.5 < ratio < 2 and ratio != 1 for ratio in ratios)
    assert (run.path / "checkpoints" / "step-000004" / "memory.npz").is_file()
    assert_same_run(resume(cut_short(run.path, tmp_path / "cut", 6)), run)


def test_memory_comes_back_as_it_was():
    memory, again = Memory(), Memory()
    memory.keep(3, Start(np.array([5, 6], np.int32), np.array([-0.5, -1.0], np.float32), whole=True), most=2)
    memory.keep(3, Start(np.array([7], np.int32)), most=2)
    memory.keep(3, Start(np.array([8, 9], np.int32), whole=True), most=2)
    memory.keep(1, Start(np.array([4], np.int32), np.array([-2.0], np.float32), whole=True), most=2)
    memory.forget(9)
    beside = Start(np.array([3], np.int32), None, whole=True, problem=7, replayed=True, apart=True)
    memory.keep(8, beside, most=1)
    again.restore(memory.arrays())
    (kept,) = again.of(8)
    assert (kept.problem, kept.replayed, kept.apart, kept.whole, kept.logprobs) == (7, True, True, True, None)
    assert again.of(1)[0].problem is None and not again.of(1)[0].replayed
    memory.forget(8)
    again.forget(8)
    assert {k: [s.tokens.tolist() for s in v] for k, v in again.starts.items()} == {3: [[7], [8, 9]], 1: [[4]]}
    assert [s.whole for s in again.of(3)] == [False, True] and again.of(3)[0].logprobs is None
    memory.keep(5, Start(np.array([1, 2], np.int32), np.array([np.nan, -1.0], np.float32)), most=1)  # an unknown prefix
    memory.keep(6, Start(np.array([1], np.int32)), most=0)
    again.restore(memory.arrays())
    assert np.isnan(again.of(5)[0].logprobs[0]) and again.of(5)[0].logprobs[1] == -1 and again.of(6) == []
    assert again.of(1)[0].logprobs.tolist() == [-2.0] and again.of(2) == []


# --- weights that follow the policy ----------------------------------------------------------------------------------


def test_live_weights_change_the_gradient_and_not_the_denominator(tmp_path):
    """A likelihood weight of p (1 - p), taken from the policy that is being updated (CHORD's)."""

    @register("live", "Live")
    class Live(RLSFTLoss):
        def live(self, signal, now):
            assert not now.logp.requires_grad and len(now.logp) == len(signal.foreign) == len(now.entropy)
            return replace(signal, likelihood=signal.likelihood * now.logp.exp() * (1 - now.logp.exp()))

    one = make_trainer(tmp_path / "run", "live", **{**SHORT, "mini_batch_size": 8, "sft_loss_coef": 0.5})
    part = first_part(one, one.collect(0))
    (micro,) = part.micro_batches
    logp, entropy = one.engine.token_logprobs(micro)
    terms = loss_terms(part, micro.token_index, logp, entropy, one.config.method, Metrics(torch.device("cpu")))
    taken = logp.detach()[part.signal.foreign[micro.token_index]]
    p = taken.exp()
    assert terms["likelihood"].item() == pytest.approx(-(0.5 * p * (1 - p) * taken).sum().item() / len(taken), rel=1e-5)
    one.close()


def test_rows_without_any_weight_take_no_part(tmp_path):
    """HPT's switch: where no rollout is right the rollouts leave the batch and the trace is imitated."""

    @register("switch", "Switch")
    class Switch(RLSFTLoss):
        def rounds(self, draw):
            group = yield [ROLLOUT] * draw.size
            if not any(row.right for row in group):
                yield [whole(trace) for trace in draw.some_traces(1)]

        def signal(self, batch):
            usual = super().signal(batch)
            guided = {row.group for row in batch.rows if row.foreign}
            left = batch.spread(batch.of_rows(lambda row: row.group in guided and not row.foreign))
            return replace(usual, policy=torch.where(left, 0.0, usual.policy))

    one = make_trainer(tmp_path / "run", "switch", **{**SHORT, "mini_batch_size": 8})
    rows = one.collect(0)
    guided = {row.group for row in rows if row.foreign}
    part = first_part(one, rows)
    assert 0 < len(guided) < 8
    kept = [row for row in rows if row.foreign or row.group not in guided]
    assert len(part.signal.rows.unique()) == len(kept) == len(guided) + 8 * (8 - len(guided))
    assert part.tokens == len(part.old_logp) == sum(len(row.token_ids) for row in kept)
    assert one.update(part)["grad_norm"] > 0
    one.close()


# --- one's own -------------------------------------------------------------------------------------------------------


def test_a_new_method_in_ten_lines(tmp_path, monkeypatch):
    """The example of CONTRIBUTING.md as it stands there: from a file, by the command line, interrupted and resumed."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "gated.py").write_text(code)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**SHORT, "gamma": 0.3}.items()]
    command = [sys.executable, "-m", "luffy.cli", "train", "--method", "gated:gated", "--run-dir", "run", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = RunDirectory(tmp_path / "run")
    first = run.metrics()[0]
    # a trace in the groups whose rollouts are all wrong, and in no others
    assert (
        first["groups/without_trace"] == pytest.approx(1 - first["groups/all_wrong"]) and first["groups/all_wrong"] < 1
    )
    assert json.loads((run.path / "config.json").read_text())["method"] == "gated:gated"
    cut = cut_short(run.path, tmp_path / "cut", 2)
    monkeypatch.syspath_prepend(tmp_path)
    resume(cut)
    ours, theirs = (RunDirectory(path).metrics() for path in (cut, run.path))
    assert [row["pg_loss"] for row in ours] == [row["pg_loss"] for row in theirs]


def test_the_other_example(tmp_path, monkeypatch):
    """A field of one's own with bounds, and weights that follow the policy."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    code = "\n".join(line[4:] for line in page.splitlines() if line.startswith("    ") or not line)
    (tmp_path / "eased.py").write_text(f"from luffy.methods import Luffy, register\n{code}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="floor must be less than or equal to 1"):
        make_config("eased:eased", floor=2)
    grad_norms = [
        train(make_config("eased:eased", **{**SHORT, "steps": 1}, floor=floor), tmp_path / str(floor)).metrics()
        for floor in (1.0, 0.1)
    ]
    plain = train(make_config("luffy", **{**SHORT, "steps": 1}), tmp_path / "luffy").metrics()
    assert grad_norms[0][0]["grad_norm"] == plain[0]["grad_norm"] != grad_norms[1][0]["grad_norm"]


def test_names_of_methods():
    with pytest.raises(ConfigError, match=r"no method 'nowhere:mine': No module named 'nowhere' \(its folder must be"):
        make_config("nowhere:mine")
    with pytest.raises(ConfigError, match="no method 'lufy': there are on_policy"):
        make_config("lufy")
    with pytest.raises(ConfigError, match="there is a method 'luffy' already"):
        register("luffy", "Mine")(type("Other", (OnPolicy,), {}))
    assert Batch.of([]).advantages().tolist() == []
