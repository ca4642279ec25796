"""What the tests of generation with vLLM have in common: small models, servers, requests, and what to compare."""

import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import torch
from helpers import children

from luffy.sampling.protocol import SamplingParams, SamplingRequest

EOS = 1
WINDOW = 256
START_S = 240  # of a server
SMALL = dict(
    steps=4, rollout_batch_size=4, mini_batch_size=2, num_generations=4, max_completion_length=48, num_problems=40,
    eval_steps=0, final_eval_problems=4, final_eval_samples=2, save_steps=1, sampler="vllm",
)  # fmt: skip


def options(model, **values):
    from luffy.sampling.vllm_sampler import VLLMOptions

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return VLLMOptions(
        **{
            "model": str(model),
            "eos_ids": (EOS,),
            "max_model_len": WINDOW,
            "dtype": "float32",
            "device": device,
            **values,
        }
    )


@contextmanager
def serving(folder, *ports):
    """Starts servers that want a key, which stands in the environment, and yields their addresses."""
    os.environ["VLLM_API_KEY"] = "secret"
    addresses, started = [], []
    for number, port in enumerate(ports):
        command = [sys.executable, "-m", "luffy.cli", "serve", "--model", "tiny", "--max-model-len", str(WINDOW)]
        flags = ["--precision", "float32", "--port", str(port), "--cache-mb", "64"]
        with open(folder / f"{number}.log", "w") as log:
            started.append(subprocess.Popen([*command, *flags], stdout=log, stderr=log, start_new_session=True))
        addresses.append(f"127.0.0.1:{port}")
    try:
        for number, address in enumerate(addresses):
            deadline = time.monotonic() + START_S
            while not _healthy(address):
                assert started[number].poll() is None, (folder / f"{number}.log").read_text()[-3000:]
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.5)
        yield addresses
    finally:
        del os.environ["VLLM_API_KEY"]
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)


def _healthy(address):
    try:
        return httpx.get(f"http://{address}/health").is_success
    except httpx.HTTPError:
        return False


def workers(parent):
    """The processes of vLLM that a process has started."""
    found = []
    for pid in children(parent):
        with suppress(OSError):  # it has ended
            if b"luffy.sampling.vllm_worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def connect(servers, model, **values):
    from luffy.sampling.servers import ServerSampler

    usual = {"eos_ids": [EOS], "max_model_len": WINDOW, "sends": True, "token": secrets.token_hex(4)}
    usual["device"] = model.device
    return ServerSampler(servers, model, **{**usual, **values})


def moved(model, seed, scale=0.05):
    """Changes every weight, as an optimiser step would, only more."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale * (parameter.std() + 1e-3))
    return model


def weights(model):
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())


def requests(lengths=(3, 9, 150), generations=3, vocabulary=40):
    """Prompts, one of them longer than a block of the prefix cache by far."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, vocabulary, (n,), generator=generator).numpy() for n in lengths]
    return [SamplingRequest(prompt, i, g) for i, prompt in enumerate(prompts) for g in range(generations)]


def sample(sampler, reqs, *, temperature, step=0, seed=0):
    found = dict(sampler.sample(reqs, SamplingParams(24, temperature, seed=seed, step=step)))
    return [found[i] for i in range(len(reqs))]


def tokens(rollouts):
    return [rollout.token_ids.tolist() for rollout in rollouts]


def comparable(run):
    """Metrics without what depends on the machine; rounded, because vLLM batches rows as they come."""
    rows = run.metrics()
    return [{k: round(v, 4) for k, v in r.items() if not k.startswith(("time/", "machine/", "grad"))} for r in rows]
