"""What only GPUs can show: python tests/gpu/smoke.py

Trains small random models through the real command line and compares; one line a check, and a non-zero exit at the
first that fails. With one GPU DeepSpeed trains in one process, and the checks that need two GPUs are left out. Needs
the extras deepspeed, vllm and lora-4bit; downloads nothing; about ten minutes.

    python tests/gpu/smoke.py --checks varlen zero resume four_bits     # some of them, here those without vLLM
    python tests/gpu/smoke.py --device cpu      # the script itself, where the parts exist for CPUs
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

LUFFY = [sys.executable, "-m", "luffy.cli"]
RUN = dict(
    steps=4, rollout_batch_size=8, mini_batch_size=4, num_generations=4, max_completion_length=64, num_problems=40,
    eval_steps=0, final_eval_problems=0, save_steps=2, precision="bfloat16", recompute_old_logp=True,
    micro_batch_tokens=512, logits_chunk_size=64,
)  # fmt: skip


class FailedError(Exception):
    """What a check has found."""


class Smoke:
    """The checks, in order; each returns what it has measured, for the table."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.cuda = device == "cuda"
        self.ranks = min(2, torch.cuda.device_count()) if self.cuda else 2

    def train(self, name: str, nproc: int = 1, **values: object) -> list[dict[str, float]]:
        """A run's metrics."""
        fields = {**RUN, "device": self.device, **values}
        flags: list[str] = []
        for key, value in fields.items():
            flag = f"--{key.replace('_', '-')}"
            flags += [flag] if value is True else [flag, *value] if isinstance(value, list) else [f"{flag}={value}"]
        command = [*LUFFY, "train", *flags, "--run-dir", str(self.folder / name)]
        return self.metrics(name, [*command, "--nproc", str(nproc)])

    def metrics(self, name: str, command: list[str]) -> list[dict[str, float]]:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise FailedError(f"exit code {done.returncode}: {done.stderr[-1500:]}")
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def gap(self, rows: list[dict[str, float]]) -> str:
        """The sampler's distance from the trainer; stale weights would show."""
        gap = max(row["sampler_gap/mean"] for row in rows)
        if gap > 0.05:
            raise FailedError(f"the sampler's log-probs are {gap:.3f} nats from the trainer's")
        return f"sampler gap {gap:.4f} nats"

    # --- checks ----------------------------------------------------------------------------------------------------

    def varlen(self) -> str:
        """Packed sequences against each alone, forward and backward, in bfloat16; the head in chunks against whole."""
        from luffy import make_config
        from luffy.model.logprobs import token_logprobs
        from luffy.model.packing import TokenSequence, pack
        from luffy.training.engines import load_policy

        model = load_policy(make_config("luffy", model="tiny", device=self.device), "tiny").to(torch.bfloat16)
        sequences = [TokenSequence([5, 6, 7], list(range(3, 3 + n))) for n in (4, 9, 17)]
        results = []
        for groups, chunk in ((([sequences]), 7), ([[one] for one in sequences], 4096)):
            model.zero_grad()
            logps = []
            for group in groups:
                (batch,) = pack(group, micro_batch_tokens=4096)
                logp, entropy = token_logprobs(model, batch.to(model.device), chunk_size=chunk)
                (logp.sum() + entropy.sum()).backward()
                flat = torch.empty(len(logp))
                flat[batch.token_index] = logp.detach().float().cpu()
                logps.append(flat)
            gradient = torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])
            results.append((torch.cat(logps), gradient))
        (packed, slope), (alone, other) = results
        difference, angle = (packed - alone).abs().max().item(), torch.cosine_similarity(slope, other, dim=0).item()
        if difference > 0.1 or angle < 0.99:
            raise FailedError(f"log-probs differ by {difference:.4f}, gradients have a cosine of {angle:.5f}")
        return f"log-probs {difference:.1e}, gradients' cosine {angle:.6f}"

    def zero(self) -> str:
        """ZeRO 2 and 3 with several chunks of logits: the first step's loss is the same."""
        runs = [self.train(f"zero{stage}", self.ranks, engine="deepspeed", zero_stage=stage) for stage in (2, 3)]
        losses = [rows[0]["sft_loss"] for rows in runs]
        if abs(losses[0] - losses[1]) > 0.02:
            raise FailedError(f"sft_loss {losses}")
        return f"sft_loss {losses[0]:.4f} and {losses[1]:.4f}"

    def loads(self) -> str:
        """300 times weights to the child under ZeRO 2, then a clean exit."""
        few = dict(steps=300, save_steps=300, rollout_batch_size=4, num_generations=2, max_completion_length=8)
        rows = self.train(
            "loads", self.ranks, engine="deepspeed", sampler="vllm", vllm_gpu_memory_utilization=0.3, **few
        )
        return f"{len(rows)} loads, {self.gap(rows)}"

    def slices(self) -> str:
        """ZeRO 3, and one vLLM engine over both GPUs."""
        return self.gap(self.train("slices", 2, engine="deepspeed", zero_stage=3, sampler="vllm",
                                   vllm_tensor_parallel_size=2, vllm_gpu_memory_utilization=0.3))  # fmt: skip

    def asleep(self) -> str:
        """GPU memory of a child before it sleeps and while it does."""
        if not self.cuda:
            return "needs a GPU"
        from luffy.model.loading import model_path
        from luffy.sampling.vllm_sampler import VLLMOptions, VLLMSampler

        sampler = VLLMSampler(VLLMOptions(model_path("tiny"), (1,), 256, gpu_memory=0.5))
        awake = torch.cuda.mem_get_info()[0]
        sampler.sleep()
        freed = (torch.cuda.mem_get_info()[0] - awake) / 2**30
        sampler.close()
        total = torch.cuda.mem_get_info()[1] / 2**30
        if freed < 0.3 * total:
            raise FailedError(f"sleep frees {freed:.1f} of {total:.0f} GiB")
        return f"sleep frees {freed:.1f} of {total:.0f} GiB"

    def server(self) -> str:
        """vLLM's own server, on the second GPU, with weights by NCCL."""
        port = "8799"
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": "1"} if self.cuda else {})}
        command = [*LUFFY, "serve", "--model", "tiny", "--max-model-len", "128", "--port", port]
        with open(self.folder / "server.log", "w") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            self.wait_for(server, port)
            rows = self.train("server", sampler="vllm", vllm_servers=[f"127.0.0.1:{port}"])
        finally:
            os.killpg(server.pid, signal.SIGKILL)
        return self.gap(rows)

    def wait_for(self, server: subprocess.Popen[bytes], port: str) -> None:
        import httpx

        for _ in range(600):
            if server.poll() is not None:
                raise FailedError((self.folder / "server.log").read_text()[-1500:])
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                return
            except httpx.HTTPError:
                time.sleep(1)
        raise FailedError("the server does not start")

    def lora(self) -> str:
        """Adapters on bfloat16 weights, sampled by vLLM."""
        rows = self.train("lora", lora_r=8, learning_rate=1e-3, sampler="vllm", vllm_gpu_memory_utilization=0.3)
        return self.gap(rows)

    def four_bits(self) -> str:
        if not self.cuda:
            return "needs a GPU"
        return self.gap(self.train("four_bits", lora_r=8, load_in_4bit=True, sampler_gap_limit=1.0))

    def resume(self) -> str:
        """The run that `zero` has made with stage 3, which comes before, loses its last checkpoint and goes on to its
        end, by one process."""
        run = self.folder / "zero3"
        checkpoint = run / "checkpoints" / "step-000004"
        (run / "final").unlink()
        (run / "evaluation.json").unlink()
        checkpoint.rename(self.folder / "lost")
        rows = self.metrics("zero3", [*LUFFY, "resume", str(run)])
        if [row["step"] for row in rows] != [1, 2, 3, 4]:
            raise FailedError(f"steps {[row['step'] for row in rows]}")
        return "4 steps"


CHECKS = ("varlen", "zero", "resume", "lora", "server", "slices", "asleep", "four_bits", "loads")
TWO = ("server", "slices")  # what needs two GPUs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--checks", nargs="*", choices=CHECKS, help="default: what there are GPUs for")
    known = parser.parse_args()
    gpus = torch.cuda.device_count()
    if known.device == "cuda" and not gpus:
        sys.exit("this needs a GPU (or --device cpu)")
    alone = known.device == "cuda" and gpus == 1
    checks = known.checks or [name for name in CHECKS if not (alone and name in TWO)]
    if alone and set(checks) & set(TWO):
        sys.exit(f"{' and '.join(TWO)} need two GPUs")
    with tempfile.TemporaryDirectory() as folder:
        smoke = Smoke(known.device, Path(folder))
        for name in checks:
            started = time.monotonic()
            check: Callable[[], str] = getattr(smoke, name)
            try:
                found, outcome = check(), "ok"
            except FailedError as error:
                found, outcome = str(error), "FAILED"
            print(f"{name:<10} {outcome:<7} {time.monotonic() - started:6.0f} s  {found}", flush=True)
            if outcome == "FAILED":
                sys.exit(1)


if __name__ == "__main__":
    main()
