"""What several test files need: small models, trainers, comparing runs, runs that are cut short."""

from __future__ import annotations

import os
import shutil
import socket
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

from luffy import Trainer, make_config
from luffy.methods.rows import Batch
from luffy.model.logprobs import prepare, token_logprobs
from luffy.model.packing import TokenSequence, pack
from luffy.runs import RunDirectory

ARCHITECTURES = [(name, tied) for name in ("Qwen2", "Qwen3", "Llama") for tied in (True, False)]


def random_model(architecture: str, tied: bool = True, vocab_size: int = 61, seed: int = 0, **values):
    """A small random-weight causal language model of an architecture, in float32, as the trainer has it."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{architecture}Config")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocab_size, tie_word_embeddings=tied, initializer_range=0.2, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, **{"head_dim": 8, "max_position_embeddings": 256, "sliding_window": None, **values},
    )  # fmt: skip
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    prepare(model)
    return model


def trained_logprobs(model, reqs, rollouts, temperature=1.0):
    """The trainer's log-probs of the rollouts' tokens."""
    sequences = [TokenSequence(r.prompt_ids, o.token_ids) for r, o in zip(reqs, rollouts, strict=True)]
    flat = torch.empty(sum(len(rollout.token_ids) for rollout in rollouts))
    for batch in pack(sequences, micro_batch_tokens=256):
        flat[batch.token_index] = token_logprobs(model, batch, temperature=temperature)[0].detach()
    return flat


def comparable(rows):
    """Metrics without what depends on the machine and its load."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "machine/"))} for row in rows]


def weights(run):
    (file,) = (run.path / "final").glob("*model.safetensors")  # or adapter_model.safetensors
    return load_file(file)


def assert_same_run(a, b):
    assert comparable(a.metrics()) == comparable(b.metrics())
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert a.evaluation() == b.evaluation()


def differences(a, b):
    """Largest difference of a metric over all steps, by name, and of a weight."""
    rows = list(zip(comparable(a.metrics()), comparable(b.metrics()), strict=True))
    first, second = weights(a), weights(b)
    weight = max((first[name] - second[name].to(first[name].dtype)).abs().max().item() for name in first)
    return {name: max(abs(x.get(name, 0) - y.get(name, 0)) for x, y in rows) for name in rows[-1][0]}, weight


def cut_short(run: Path, to: Path, *lost: int) -> Path:
    """A copy of a complete run as if it had been killed before its checkpoints of the lost steps."""
    shutil.copytree(run, to, symlinks=True)
    (to / "evaluation.json").unlink()
    (to / "final").unlink()
    for step in lost:
        shutil.rmtree(to / "checkpoints" / f"step-{step:06d}")
    return to


def forked(work) -> int:
    """Starts `work` in a process of its own, a copy of this one (whose libraries are imported), to be killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # whatever happens, also while the error is printed
    return pid


def ended(pid: int) -> int:
    """Waits for a process of `forked` and returns its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def children(pid: int) -> list[int]:
    """The processes that any thread of a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return found


def make_trainer(folder, method="luffy", **values):
    return Trainer(make_config(method, **values), RunDirectory(folder))


def first_part(trainer, rows):
    """The rows as the mini-batch of one optimiser step."""
    batch = Batch.of(rows)
    (part,) = trainer.mini_batches(batch, trainer.config.method.signal(batch))
    return part


def gradient_of(folder, rows=None, **values):
    """The gradient that the first optimiser step of a configuration sees, and the rows it was computed from."""
    one = make_trainer(folder, **{**dict(num_problems=40, max_grad_norm=1e9, warmup_steps=0), **values})
    rows = rows or one.collect(0)
    gradients = {}
    one.engine.optimizer.step = lambda: gradients.update({n: p.grad.clone() for n, p in one.model.named_parameters()})
    one.update(first_part(one, rows))
    one.close()
    return gradients, rows


LOOPBACK = {"127.0.0.1", "::1"}


def listening(pid):
    """The addresses that a process listens at."""
    found = []
    for kind, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        rows = [line.split() for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]]
        inodes = {row[9]: row[1].split(":")[0] for row in rows if row[3] == "0A"}
        links = []
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                links.append(os.readlink(link))
        for inode in (link[8:-1] for link in links if link.startswith("socket:[")):
            if inode in inodes:
                words = [inodes[inode][i : i + 8] for i in range(0, len(inodes[inode]), 8)]
                found.append(socket.inet_ntop(family, b"".join(bytes.fromhex(word)[::-1] for word in words)))
    return found
