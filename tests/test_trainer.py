"""The training loop with real components: runs, resumes after real kills, refuses what it must."""

import copy
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from luffy import METHODS, ConfigError, RunError, make_config, resume, train
from luffy.batching import pack
from luffy.data import DataError
from luffy.engine import learning_rate_factor
from luffy.rewards import make_reward
from luffy.rollouts import Completion, rollout_metrics
from luffy.runs import NonFiniteError, RunDirectory, damage
from luffy.sampling import SamplerError
from luffy.trainer import Trainer


def comparable(rows):
    """Metrics without what depends on the machine and its load."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "machine/"))} for row in rows]


def weights(run):
    return load_file(run.path / "final" / "model.safetensors")


def assert_same_run(a, b):
    assert comparable(a.metrics()) == comparable(b.metrics())
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert a.evaluation() == b.evaluation()


@pytest.fixture(scope="module")
def luffy_run(tmp_path_factory, short_run):
    return train(make_config("luffy", **short_run), tmp_path_factory.mktemp("runs") / "luffy")


# --- what a run leaves behind ----------------------------------------------------------------------------------------


def test_run_directory(luffy_run, short_run):
    assert luffy_run.is_complete
    assert luffy_run.config() == make_config("luffy", **short_run)
    manifest = json.loads((luffy_run.path / "manifest.json").read_text())
    assert {"luffy", "packages", "machine", "seed", "data", "seconds"} <= manifest.keys()
    assert manifest["data"]["problems"] == 40 and manifest["seconds"]["update"] > 0
    rows = luffy_run.metrics()
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert {"eval/id", "eval/ood"} <= rows[0].keys() and {"eval/id", "time/eval"} <= rows[4].keys()
    for name in (
        "reward/on",
        "reward/off",
        "groups/all_wrong",
        "entropy/on",
        "entropy/off",
        "off_ratio_mean",
        "grad_norm",
        "truncated/on",
        "time/sample",
        "time/update",
        "machine/peak_memory_mb",
        "total/generated_tokens",
    ):
        assert all(name in row for row in rows[1:]), name
    assert [p.name for p in sorted((luffy_run.path / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    assert {"chain", "words"} <= luffy_run.evaluation()["families"].keys()
    sample = json.loads((luffy_run.path / "samples" / "step-000002.json").read_text())
    assert len(sample) == 8 and [row["off_policy"] for row in sample[:4]] == [False, False, False, True]
    assert sum(row["advantage"] for row in sample[:4]) == pytest.approx(0, abs=1e-5)


def test_checkpoint_loads_with_plain_transformers(luffy_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = luffy_run.path / "final"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "84+1?"}], tokenize=False)
    assert model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=3).shape[1] == 8


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, tmp_path, short_run):
    values = {**short_run, "steps": 2, "final_eval_problems": 4}
    run = train(make_config(method, **values), tmp_path / method)
    rows = run.metrics()
    assert run.is_complete and len(rows) == 3
    assert all(row["grad_norm"] > 0 for row in rows[1:])
    demonstrations = METHODS[method].fixed.get("num_off_policy", 1) > 0
    assert all((row["groups/off_policy_share"] > 0) == demonstrations for row in rows[1:])
    if method == "sft":
        assert all(row["groups/off_policy_share"] == 1 for row in rows[1:])
        assert rows[-1]["total/generated_tokens"] == 0 < rows[-1]["total/trained_tokens"]
    if method == "sft_rl":
        first = RunDirectory(run.path / "first_stage")
        assert first.is_complete and first.config().supervised
        trained = {name: not torch.equal(w, weights(first)[name]) for name, w in weights(run).items()}
        assert any(trained.values())


# --- the numbers -----------------------------------------------------------------------------------------------------


def trainer(tmp_path, **values):
    return Trainer(make_config(values.pop("method", "luffy"), **values), RunDirectory(tmp_path))


def rows_of(trainer, step=0):
    from luffy.rewards import make_reward

    trainer.reward = make_reward(trainer.config)
    rows = []
    for row in trainer.sample(step):
        trainer.submit(row)
        rows.append(row)
    for row, reward in zip(rows, trainer.reward.finish(), strict=True):
        row.reward = reward
    trainer.reward.close()
    return sorted(rows, key=lambda row: (row.group, row.index))


def gradient_of(tmp_path, rows=None, **values):
    """The gradient that the first optimiser step of a configuration sees, and the rows it was computed from."""
    one = trainer(tmp_path, num_problems=40, max_grad_norm=1e9, warmup_steps=0, **values)
    rows = rows or rows_of(one)
    gradients = {}
    one.engine.optimizer.step = lambda: gradients.update({n: p.grad.clone() for n, p in one.model.named_parameters()})
    one.update(rows, one.advantages(rows), one.old_logps(rows))
    return gradients, rows


@pytest.mark.parametrize("method", ["luffy", "rl_sft_loss"])
def test_gradient_does_not_depend_on_micro_batches(tmp_path, method):
    """Policy, entropy, SFT and KL terms together, in one micro-batch and in many."""
    values = dict(method=method, rollout_batch_size=4, mini_batch_size=4, entropy_coef=0.01, beta=0.1)
    whole, rows = gradient_of(tmp_path / "a", micro_batch_tokens=100_000, row_tokens=256, **values)
    for micro_batch_tokens, row_tokens in [(64, 64), (200, 100)]:
        split, _ = gradient_of(
            tmp_path / "b", rows, micro_batch_tokens=micro_batch_tokens, row_tokens=row_tokens, **values
        )
        for name, gradient in whole.items():
            torch.testing.assert_close(split[name], gradient, atol=1e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


FORMULAS = {
    "luffy": dict(),
    "mixed": dict(),
    "on_policy_shaping": dict(),
    "rl_sft_loss": dict(sft_loss_coef=0.7),
    "sft": dict(sft_loss_coef=0.7),
}


@pytest.mark.parametrize("method", FORMULAS)
def test_gradient_is_that_of_the_formulas(tmp_path, method):
    """Each method's loss written out sequence by sequence with plain logits, on a policy that has moved since it
    sampled (so that ratios, clip and KL act): off- and on-policy terms, entropy, SFT and KL with their normalisers."""
    terms = dict(entropy_coef=0.01, beta=0.05)
    values = dict(method=method, rollout_batch_size=4, mini_batch_size=4, num_problems=40, **terms, **FORMULAS[method])
    one = trainer(tmp_path, max_grad_norm=1e9, **values)
    config, rows = one.config, rows_of(one)
    old = one.old_logps(rows)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    gradients = {}
    one.engine.optimizer.step = lambda: gradients.update({n: p.grad.clone() for n, p in one.model.named_parameters()})
    metrics = one.update(rows, one.advantages(rows), old)

    baseline = [
        [r.reward for r in rows if r.group == g and not (method == "rl_sft_loss" and r.off_policy)] for g in range(4)
    ]
    in_policy = [not (row.off_policy and method in ("rl_sft_loss", "sft")) for row in rows]
    tokens = sum(len(row.token_ids) for row in rows)
    off_tokens = sum(len(row.token_ids) for row in rows if row.off_policy)
    shape = lambda p: p / (p + 0.1)  # noqa: E731
    loss, clipped = 0.0, 0
    for row, old_logp, counts in zip(rows, old, in_policy, strict=True):
        ids, first = torch.tensor([row.prompt_ids + row.token_ids]), len(row.prompt_ids)
        logp = one.model(ids).logits[0].log_softmax(-1)[first - 1 : -1]
        taken = logp.gather(-1, ids[0, first:, None])[:, 0]
        advantage = row.reward - sum(baseline[row.group]) / max(1, len(baseline[row.group]))
        if row.off_policy:
            gain = advantage * (taken.exp() if method == "mixed" else shape(taken.exp()))
        else:
            ratio = (taken - old_logp).exp()
            if method == "on_policy_shaping":
                ratio = shape(taken.exp()) / shape(old_logp.exp())
            gain = advantage * ratio
            if method in ("mixed", "on_policy_shaping"):
                bounded = advantage * ratio.clamp(0.8, 1.2)
                clipped += int((bounded < gain).sum())
                gain = torch.minimum(gain, bounded)
            if one.reference is not None:
                reference = one.reference(ids).logits[0].log_softmax(-1)[first - 1 : -1]
                gap = reference.gather(-1, ids[0, first:, None])[:, 0] - taken
                loss = loss + config.beta * (gap.exp() - gap - 1).sum() / (tokens - off_tokens)
        if counts:
            loss = loss - gain.sum() / (sum(in_policy) * config.max_completion_length)
        if row.off_policy:
            loss = loss - config.sft_loss_coef * taken.sum() / off_tokens
        loss = loss + config.entropy_coef * (logp.exp() * logp).sum() / tokens
    one.model.zero_grad()
    loss.backward()
    for name, parameter in one.model.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, atol=2e-6, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert (metrics["kl"] > 1e-4) == (method != "sft")
    assert (metrics["pg_clipfrac"] > 0) == (clipped > 0) and (clipped > 0 or method != "mixed")


def test_options_reach_the_loss(tmp_path):
    values = dict(rollout_batch_size=4, mini_batch_size=4, num_problems=40)
    plain = trainer(tmp_path / "a", **values)
    rows = rows_of(plain)
    bounded = trainer(tmp_path / "b", **values, off_ratio_max=0.5, scale_rewards="group")
    metrics = [one.update(rows, one.advantages(rows), one.old_logps(rows)) for one in (plain, bounded)]
    assert metrics[0]["off_ratio_max_clip_frac"] == 0 < metrics[1]["off_ratio_max_clip_frac"]
    assert metrics[1]["off_ratio_mean"] <= 0.5
    assert bounded.advantages(rows).abs().max() > plain.advantages(rows).abs().max()


def test_learning_rate_by_hand():
    constant = [learning_rate_factor(i, 10, 3, "constant") for i in range(5)]
    assert constant == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = [learning_rate_factor(i, 10, 2, "linear") for i in range(10)]
    assert linear == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_old_logps_from_sampler_and_policy_agree(tmp_path):
    one = trainer(tmp_path, num_problems=40, rollout_batch_size=4, mini_batch_size=4)
    rows = rows_of(one)
    for row, sampled, computed in zip(rows, one.old_logps(rows), one.logprobs(rows), strict=True):
        if not row.off_policy:
            torch.testing.assert_close(sampled, computed, atol=1e-5, rtol=1e-5)


def test_without_demonstrations_and_clip_luffy_is_dr_grpo(tmp_path):
    """num_off_policy = 0: nothing of LUFFY is left but R - mean and the plain ratio."""
    values = dict(rollout_batch_size=4, mini_batch_size=4, num_off_policy=0)
    luffy, rows = gradient_of(tmp_path / "a", **values)
    plain, _ = gradient_of(tmp_path / "b", rows, method="on_policy_no_clip", **values)
    assert all(torch.equal(luffy[name], plain[name]) for name in luffy)


def test_rl_sft_loss_takes_its_baseline_from_the_rollouts(tmp_path):
    one = trainer(tmp_path, method="rl_sft_loss", num_problems=40)
    rows = [
        Completion(0, 0, i, [5], [1], off_policy=i == 3, truncated=False, reward=r) for i, r in enumerate([1, 0, 0, 1])
    ]
    assert one.advantages(rows).tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 2 / 3])


def test_gradient_checkpointing_recomputes_and_changes_nothing(tmp_path, monkeypatch):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    values = dict(rollout_batch_size=4, mini_batch_size=4)
    plain, rows = gradient_of(tmp_path / "a", **values)
    calls, forward = [], Qwen2DecoderLayer.forward
    monkeypatch.setattr(Qwen2DecoderLayer, "forward", lambda *a, **k: calls.append(0) or forward(*a, **k))
    gradient_of(tmp_path / "b", rows, **values)
    without = len(calls)
    recomputed, _ = gradient_of(tmp_path / "c", rows, gradient_checkpointing=True, **values)
    layers = 3  # the model is also run when it is loaded, to check its head
    assert len(calls) - without == without + layers
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-7, rtol=1e-4)


def test_bfloat16_and_checkpointing_train(tmp_path, short_run):
    values = dict(steps=2, precision="bfloat16", recompute_old_logp=True, gradient_checkpointing=True)
    run = train(make_config("luffy", **{**short_run, **values}), tmp_path / "run")
    assert run.is_complete and {w.dtype for w in weights(run).values()} == {torch.float32}
    full = train(make_config("luffy", **{**short_run, "steps": 2}), tmp_path / "full")
    loss, expected = (r.metrics()[1]["sft_loss"] for r in (run, full))
    assert loss != expected and loss == pytest.approx(expected, rel=0.02)


def test_kl_to_the_base_model_is_zero_at_the_start_and_grows(tmp_path, short_run):
    run = train(
        make_config("luffy", **{**short_run, "beta": 0.01, "learning_rate": 1e-3, "warmup_steps": 0}), tmp_path / "kl"
    )
    kl = [row["kl"] for row in run.metrics()[1:]]
    assert kl[0] < kl[-1] and all(value >= 0 for value in kl)


def test_rollout_metrics_by_hand():
    rows = [
        Completion(0, 0, 0, [5, 5], [3, 1], False, False, reward=1.0),
        Completion(0, 0, 1, [5, 5], [3, 3, 3, 3], False, True, reward=0.0),
        Completion(0, 0, 2, [5, 5], [3, 3, 1], True, False, reward=1.0),
        Completion(1, 1, 0, [5], [1], False, False, reward=0.0),
        Completion(1, 1, 1, [5], [1], False, False, reward=0.0),
    ]
    metrics = rollout_metrics(rows, torch.tensor([1 / 3, -2 / 3, 1 / 3, 0.0, 0.0]), num_off_policy=1)
    assert metrics["reward/mean"] == 0.4 and metrics["reward/on"] == 0.25 and metrics["reward/off"] == 1.0
    assert metrics["groups/all_wrong"] == 0.5 and metrics["groups/all_right"] == 0.0
    assert metrics["length/on"] == 2.0 and metrics["length/off"] == 3.0 and metrics["length/max"] == 4
    assert metrics["truncated/on"] == 0.25 and metrics["groups/off_policy_share"] == 0.2
    assert metrics["groups/without_trace"] == 0.5
    assert rollout_metrics([], torch.zeros(0), 1)["reward/mean"] == 0.0


# --- determinism, death and resumption -------------------------------------------------------------------------------


def test_same_configuration_same_bits(luffy_run, tmp_path):
    assert_same_run(train(luffy_run.config(), tmp_path / "again"), luffy_run)


def test_seed_changes_the_run(luffy_run, tmp_path):
    other = train(luffy_run.config().replace(seed=1), tmp_path / "other")
    assert comparable(other.metrics())[1:] != comparable(luffy_run.metrics())[1:]


def kill_and_resume(directory, config, delays):
    """Starts `luffy` as a user would, kills it after each delay (s, from the first sign of training), then resumes."""
    run = RunDirectory(directory)
    run.start(config, {})
    command = [sys.executable, "-m", "luffy", "resume", str(directory)]
    killed = 0
    for delay in delays:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        known, deadline = len(run.metrics()), time.monotonic() + 60
        while process.poll() is None and len(run.metrics()) <= known and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, capture_output=True).returncode == 0
    return killed, run


def test_killed_at_random_moments_equals_uninterrupted(tmp_path, short_run):
    """kill -9, several times, at moments that differ between runs of this test."""
    config = make_config("luffy", **{**short_run, "steps": 14})
    reference = train(config, tmp_path / "whole")
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    killed, run = kill_and_resume(tmp_path / "killed", config, [rng.uniform(0, 0.5) for _ in range(3)])
    print(f"delays from seed {seed}, {killed} kills")
    assert killed >= 1
    assert_same_run(run, reference)


def test_killed_during_a_checkpoint(tmp_path, short_run, luffy_run):
    """A process that dies after writing half of a checkpoint leaves one that is not taken for whole."""
    directory = tmp_path / "half"
    code = (
        "import os, sys, luffy.runs\n"
        "from luffy import resume\n"
        "write = luffy.runs.write_json\n"
        "def dying(path, value):\n"
        "    if path.name == 'checkpoint.json' and value['step'] == 4:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    write(path, value)\n"
        "luffy.runs.write_json = dying\n"
        "resume(sys.argv[1])\n"
    )
    run = RunDirectory(directory)
    run.start(luffy_run.config(), {})
    assert (
        subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True).returncode == -signal.SIGKILL
    )
    assert (directory / "checkpoints" / ".writing-step-000004").is_dir()
    assert run.latest_checkpoint()[0] == 2
    assert_same_run(resume(directory), luffy_run)


def test_damaged_checkpoints_do_not_push_out_good_ones(tmp_path, luffy_run):
    """Both checkpoints damaged: the run starts over, and what it saves then is kept and used."""
    directory = tmp_path / "run"
    shutil.copytree(luffy_run.path, directory, symlinks=True)
    (directory / "evaluation.json").unlink()
    for checkpoint in (directory / "checkpoints").iterdir():
        (checkpoint / "optimizer.pt").write_bytes(b"")
    run = RunDirectory(directory)
    one = Trainer(run.config(), run)
    assert one.start_step == 0
    run.save_checkpoint(2, one.save, keep=1)
    assert run.latest_checkpoint()[0] == 2
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize("harm", ["cut", "flip", "missing", "list"])
def test_damaged_checkpoint_is_passed_over(tmp_path, luffy_run, harm, caplog):
    directory = tmp_path / "run"
    shutil.copytree(luffy_run.path, directory, symlinks=True)
    (directory / "evaluation.json").unlink()
    newest = directory / "checkpoints" / "step-000004"
    file = newest / "model.safetensors"
    if harm == "cut":
        os.truncate(file, 1000)
    elif harm == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif harm == "missing":
        (newest / "optimizer.pt").unlink()
    else:
        (newest / "checkpoint.json").write_text('{"step": 4')
    assert damage(newest) is not None
    run = resume(directory)
    assert "is damaged" in caplog.text and "the one before it" in caplog.text
    assert_same_run(run, luffy_run)


def test_missing_metrics_rows_are_not_papered_over(tmp_path, luffy_run):
    directory = tmp_path / "run"
    shutil.copytree(luffy_run.path, directory, symlinks=True)
    (directory / "evaluation.json").unlink()
    rows = (directory / "metrics.jsonl").read_text().splitlines()
    (directory / "metrics.jsonl").write_text("\n".join([*rows[:2], "{", *rows[3:]]) + "\n")
    with pytest.raises(RunError, match="lacks rows"):
        resume(directory)
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 5


def test_half_written_metrics_row_is_dropped(tmp_path, luffy_run):
    directory = tmp_path / "run"
    shutil.copytree(luffy_run.path, directory, symlinks=True)
    (directory / "evaluation.json").unlink()
    shutil.rmtree(directory / "checkpoints" / "step-000004")
    with open(directory / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 5, "rew')
    assert_same_run(resume(directory), luffy_run)


def test_sft_rl_killed_in_its_first_stage_resumes(tmp_path, short_run):
    """Started by train(), not prepared by anybody: the directory must be resumable from its first moment."""
    config = make_config("sft_rl", **short_run)
    code = (
        "import json, os, sys, luffy.trainer\n"
        "from luffy.config import from_dict\n"
        "luffy.trainer.Trainer.train_step = lambda self, step: os.kill(os.getpid(), 9)\n"
        "luffy.trainer.train(from_dict(json.loads(sys.argv[1])), sys.argv[2])\n"
    )
    arguments = [sys.executable, "-c", code, json.dumps(config.to_dict()), str(tmp_path / "killed")]
    assert subprocess.run(arguments, capture_output=True).returncode == -signal.SIGKILL
    assert resume(tmp_path / "killed").is_complete


def test_sft_rl_resumes_in_its_second_stage(tmp_path, short_run):
    config = make_config("sft_rl", **short_run)
    whole = train(config, tmp_path / "whole")
    directory = tmp_path / "cut"
    shutil.copytree(whole.path, directory, symlinks=True)
    (directory / "evaluation.json").unlink()
    shutil.rmtree(directory / "checkpoints" / "step-000004")
    assert_same_run(resume(directory), whole)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_directory_of_another_configuration_is_refused(luffy_run):
    with pytest.raises(RunError, match="differs in gamma"):
        train(luffy_run.config().replace(gamma=0.3), luffy_run.path)


def test_directory_in_use_is_refused(luffy_run):
    with luffy_run.locked(), pytest.raises(RunError, match="another process"):
        resume(luffy_run.path)


def test_not_a_run_directory(tmp_path):
    with pytest.raises(RunError, match=r"no config\.json"):
        resume(tmp_path)


@pytest.mark.parametrize("phase", ["sample", "update"])
def test_non_finite_numbers_stop_the_run_and_harm_nothing(tmp_path, short_run, luffy_run, phase):
    directory = tmp_path / "run"
    shutil.copytree(luffy_run.path, directory, symlinks=True)
    (directory / "evaluation.json").unlink()
    shutil.rmtree(directory / "checkpoints" / "step-000004")
    run = RunDirectory(directory)
    one = Trainer(run.config(), run)
    if phase == "sample":
        with torch.no_grad():
            next(one.model.parameters()).fill_(float("nan"))
    else:
        one.advantages = lambda rows: torch.full((len(rows),), float("inf"))
    with pytest.raises(NonFiniteError, match=f"step 3, {phase}.*failed-step-000003"):
        one.train()
    saved = torch.load(directory / "failed-step-000003.pt", weights_only=True)
    assert saved["phase"] == phase and isinstance(saved["rows"], list)
    assert any(row["off_policy"] for row in saved["rows"])  # also what there was before sampling failed
    assert run.latest_checkpoint()[0] == 2 and not run.is_complete
    assert_same_run(resume(directory), luffy_run)


def test_other_data_than_before_is_refused(tmp_path, luffy_run, monkeypatch):
    directory = tmp_path / "run"
    shutil.copytree(luffy_run.path, directory, symlinks=True)
    (directory / "evaluation.json").unlink()
    monkeypatch.setattr("luffy.trainer.fingerprint", lambda problems: "other")
    with pytest.raises(RunError, match="not the data"):
        resume(directory)


def test_impossible_sizes_are_refused_before_training(tmp_path, short_run):
    with pytest.raises(ConfigError, match="the model has 512 positions"):
        trainer(tmp_path / "a", **{**short_run, "max_completion_length": 500})
    with pytest.raises(ConfigError, match="exceeds the 3 problems"):
        trainer(tmp_path / "b", **{**short_run, "num_problems": 3})


def test_unknown_reward_function(tmp_path, short_run):
    with pytest.raises(ConfigError, match="no reward function"):
        train(make_config("luffy", **short_run, reward="nowhere:reward"), tmp_path / "run")


def test_rows_that_a_reward_does_not_judge_take_no_part(tmp_path, short_run, monkeypatch):
    """None for every second completion: no advantage, out of the baseline and of the mean reward, but counted."""
    (tmp_path / "half.py").write_text(
        "def reward(prompts, completions, answer, **columns):\n"
        "    return [float(a in c) if len(c) % 2 else None for a, c in zip(answer, completions)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = train(make_config("luffy", **{**short_run, "final_eval_problems": 0}, reward="half:reward"), tmp_path / "run")
    samples = json.loads((run.path / "samples" / "step-000002.json").read_text())
    unjudged = [row for row in samples if len(row["completion"]) % 2 == 0]
    assert unjudged and all(row["reward"] is None and row["advantage"] == 0 for row in unjudged)
    for group in range(2):
        judged = [row for row in samples[group * 4 : group * 4 + 4] if row["reward"] is not None]
        assert sum(row["advantage"] for row in judged) == pytest.approx(0, abs=1e-4)
    row = run.metrics()[-1]
    assert all(math.isfinite(value) for value in row.values()) and row["machine/verifier_unjudged"] > 0


def test_rows_without_traces_are_refused_or_warned_of(tmp_path, short_run, caplog):
    """A method that learns from traces does not train on-policy unseen."""
    rows = [{"problem": f"8{i}+1?", "answer": f"{i}", "generations": ["x"]} for i in range(8)]
    path = tmp_path / "raw.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    values = {**short_run, "num_problems": 0, "dataset": str(path)}
    for method in ("luffy", "sft", "rl_sft_loss"):
        with pytest.raises(DataError, match="luffy data openr1"):
            trainer(tmp_path / method, method=method, **values)
    trainer(tmp_path / "on_policy", method="on_policy", **values).sampler.close()
    few = [row | ({"traces": ["<think>1</think>2"]} if i < 3 else {}) for i, row in enumerate(rows)]
    path.write_text("\n".join(map(json.dumps, few)))
    trainer(tmp_path / "few", **values)
    assert "only 3 of 8 problems have a trace" in caplog.text


def test_traces_that_are_all_dropped_are_refused(tmp_path, short_run):
    with pytest.raises(DataError, match="no trace of tinyworld fits max_completion_length 3"):
        trainer(tmp_path / "run", **{**short_run, "max_completion_length": 3}, long_traces="drop")


def test_prompts_that_are_all_too_long_name_the_bound(tmp_path, short_run):
    with pytest.raises(DataError, match=r"max_prompt_length is 3, and the longest prompt has \d+ tokens"):
        trainer(tmp_path / "run", **short_run, max_prompt_length=3)


def test_an_adapter_is_no_model(tmp_path, short_run):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="merge it into its base model"):
        trainer(tmp_path / "run", **short_run, model=str(tmp_path / "adapter"))


def test_own_reward_and_own_data(tmp_path, short_run, monkeypatch):
    """A JSON-lines file in the plain schema, one row without a trace and one with two, and a user's reward."""
    (tmp_path / "mine.py").write_text(
        "def reward(prompts, completions, answer, level, **columns):\n"
        "    return [0.5 * ('boxed' in c) + level_ for c, level_ in zip(completions, level)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [
        {
            "problem": "84+1?",
            "answer": "85",
            "traces": ["<think>84+1=85</think>\\boxed{85}", "\\boxed{85}"],
            "level": 0,
        },
        {"problem": "84-1?", "answer": "83", "traces": [], "level": 0},
        {"problem": "84-2?", "answer": "82", "traces": ["\\boxed{82}"], "level": 0},
        {"problem": "84-3?", "answer": "81", "traces": ["\\boxed{81}"], "level": 0},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {**short_run, "dataset": str(tmp_path / "p.jsonl"), "eval_datasets": [str(tmp_path / "p.jsonl")]}
    run = train(make_config("luffy", **values, reward="mine:reward", num_off_policy=2), tmp_path / "run")
    rows = run.metrics()[1:]
    assert all(row["groups/without_trace"] == 0.75 for row in rows)  # three of the four have fewer than two
    assert all(row["reward/off"] == 0.5 for row in rows)
    assert run.is_complete


def test_supervised_run_leaves_out_problems_without_a_trace(tmp_path, short_run):
    rows = [{"problem": f"84+{i}?", "answer": str(84 + i), "traces": ["\\boxed{1}"] * (i == 1)} for i in range(1, 6)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {
        **short_run,
        "dataset": str(tmp_path / "p.jsonl"),
        "steps": 2,
        "rollout_batch_size": 1,
        "mini_batch_size": 1,
    }
    assert len(trainer(tmp_path / "a", method="sft", **values).problems) == 1
    assert train(make_config("sft", **values), tmp_path / "run").is_complete
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[1]))
    with pytest.raises(ValueError, match="no traces"):
        trainer(tmp_path / "b", method="sft", **values)


def test_packed_rows_hold_prompt_and_completion(tmp_path):
    one = trainer(tmp_path, num_problems=40)
    rows = rows_of(one)[:5]
    [batch] = pack([row.sequence for row in rows], row_tokens=512, micro_batch_tokens=4096)
    assert batch.targets[batch.token_index.argsort()].tolist() == [t for row in rows for t in row.token_ids]


# --- sampler and trainer ---------------------------------------------------------------------------------------------


def test_stale_weights_end_the_run(tmp_path, short_run):
    """A sampler that goes on with other weights than the policy's is found at once, before they do any harm."""
    one = trainer(tmp_path, **short_run)
    one.reward = make_reward(one.config)
    stale = copy.deepcopy(one.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in stale.parameters():
            parameter.add_(0.5 * parameter.std() * torch.randn_like(parameter))
    one.sampler.model = stale
    one.sampler.load_weights = lambda weights: None
    before = {name: weight.clone() for name, weight in one.model.state_dict().items()}
    with pytest.raises(SamplerError, match="does not have the policy's weights"):
        one.train_step(0)
    assert all(torch.equal(weight, before[name]) for name, weight in one.model.state_dict().items())
    one.reward.close()


def test_a_copy_gets_the_weights_before_every_step(tmp_path, short_run):
    """A sampler with a model of its own, as under ZeRO-3: the same run, and no mismatch."""
    runs = []
    for name in ("shared", "copied"):
        one = trainer(tmp_path / name, **{**short_run, "final_eval_problems": 0})
        if name == "copied":
            one.sampler.model = copy.deepcopy(one.model)
        one.run_dir.start(one.config, {})
        one.train()
        runs.append(one.run_dir)
        assert all(row["sampler_gap/max"] < 1e-4 for row in one.run_dir.metrics()[1:])
    assert comparable(runs[0].metrics()) == comparable(runs[1].metrics())


def test_truncated_importance_sampling(tmp_path, short_run):
    """On-policy advantages are weighted with min(cap, pi / pi_sampler), those of demonstrations are not."""
    gradients = {}
    for cap in (None, 1e9, 1.5):
        values = dict(importance_sampling_cap=cap, recompute_old_logp=True, sampler_gap_limit=10.0, entropy_coef=0.0)
        one = trainer(tmp_path / str(cap), num_problems=40, max_grad_norm=1e9, warmup_steps=0, **values)
        rows = rows_of(one)
        for row in rows:
            row.sampler_logprobs = [logp - math.log(2.0) for logp in row.sampler_logprobs]  # pi / pi_sampler = 2
        found = {}
        one.engine.optimizer.step = lambda found=found, one=one: found.update(
            {n: p.grad.clone() for n, p in one.model.named_parameters()}
        )
        metrics = one.update(rows, one.advantages(rows), one.old_logps(rows))
        assert metrics["importance_weight"] == pytest.approx({None: 1.0, 1e9: 2.0, 1.5: 1.5}[cap], abs=1e-4)
        assert metrics["sampler_gap/mean"] == pytest.approx(math.log(2.0), abs=1e-4)
        assert metrics["sampler_gap/above"] == 1.0
        gradients[cap] = found
    # The gradient is linear in the weight: off + w on.
    for name, plain in gradients[None].items():
        torch.testing.assert_close(
            gradients[1.5][name], (plain + gradients[1e9][name]) / 2, atol=1e-7, rtol=1e-4, msg=name
        )
    assert any(not torch.allclose(gradients[1e9][n], g, rtol=1e-2) for n, g in gradients[None].items())


def test_torch_engine_refuses_several_ranks(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="use engine deepspeed"):
        train(make_config("luffy", steps=1), tmp_path / "run")
