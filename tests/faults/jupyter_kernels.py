"""A notebook that follows a training: its kernel alone is killed, or lives as long as a long training."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers import assert_same_run
from jupyter_client import BlockingKernelClient, KernelManager
from kills import config_of
from outcome import Outcome

from luffy import train
from luffy.runs import RunDirectory

CELL = """
from pathlib import Path
from luffy.runs import RunDirectory
from luffy.study import experiments, plots
job = experiments.Job(RunDirectory({path!r}).config(), Path({path!r}))
plots.follow(experiments.run([job], poll_s=0.2), every_s=1)
"""
LONGEST_S = 1800.0


@contextmanager
def kernel() -> Iterator[tuple[int, BlockingKernelClient]]:
    """A kernel's process and its client."""
    manager = KernelManager()
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        client.iopub_channel.stop()  # outputs that nobody reads would pile up in the kernel
        yield manager.provisioner.pid, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def followed(client: BlockingKernelClient, run: RunDirectory) -> str:
    """Has a kernel follow a run, which it starts or resumes if nobody trains there. Returns the cell's message id."""
    return client.execute(CELL.format(path=str(run.path)))


def finished(client: BlockingKernelClient, message: str) -> None:
    """Waits for the end of a cell."""
    deadline = time.monotonic() + LONGEST_S
    while (reply := client.get_shell_msg(timeout=deadline - time.monotonic()))["parent_header"]["msg_id"] != message:
        pass
    assert reply["content"]["status"] == "ok", reply["content"].get("evalue")


def kernel_kills(folder: Path, count: int, steps: int = 60, seed: int = 0) -> Iterator[Outcome]:
    """The kernel alone is killed: the training goes on, and the same cell in another kernel follows it to its end."""
    rng, config = random.Random(seed), config_of("luffy", steps=steps)
    whole = train(config, folder / "whole")
    for i in range(count):
        run, step = RunDirectory(folder / f"run-{i}"), rng.randrange(1, steps // 2)
        run.start(config, {})
        try:
            with kernel() as (pid, client):
                followed(client, run)
                while run.last_row().get("step", 0) < step:
                    time.sleep(0.02)
                os.kill(pid, signal.SIGKILL)
            assert run.is_running, "the training has ended with the kernel"
            with kernel() as (_, client):
                finished(client, followed(client, run))
            assert_same_run(run, whole)
            assert (run.path / "log.txt").read_text().count("training problems") == 1, "it was started twice"
            lost = ""
        except Exception as error:
            lost = f"{type(error).__name__}: {error}"
        yield Outcome("kill -9 of a notebook's kernel", f"at step {step}", lost)
