"""Several machines: torch's launcher gets its flags, and a machine that is lost costs the steps since the checkpoint.
Two launchers on loopback stand for two machines."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import LOOPBACK, children, comparable, listening, weights

from luffy.cli import main
from luffy.runs import RunDirectory
from luffy.sampling.tensor_parallel import free_port

pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")

VALUES = dict(
    engine="deepspeed", steps=8, rollout_batch_size=4, mini_batch_size=2, num_generations=4, max_completion_length=48,
    num_problems=40, eval_steps=0, final_eval_problems=0, save_steps=2, save_total_limit=8,
)  # fmt: skip
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in VALUES.items()]
LUFFY = [sys.executable, "-m", "luffy.cli"]
WAIT_S = 240


@pytest.mark.parametrize("silent", [False, True], ids=["ends", "falls silent"])
def test_a_lost_machine_costs_the_steps_since_the_checkpoint(tmp_path, silent):
    """One of two is killed with its process, or stands still; the other goes on alone from the last checkpoint, with
    the numbers of a run that is resumed from there."""
    run, copy, port = RunDirectory(tmp_path / "run"), tmp_path / "copy", free_port()
    nodes = ["--nnodes=1:2", f"--rdzv=127.0.0.1:{port}", "--max-restarts=2", "--node-timeout=20"]
    patience = "last_call_timeout=15,join_timeout=200,read_timeout=200"  # also on a busy machine
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PET_RDZV_CONF": patience}
    command = [*LUFFY, "train", *FLAGS, *nodes, "--run-dir", str(run.path)]
    logs = [open(tmp_path / f"{name}.log", "w") for name in ("host", "other")]  # noqa: SIM115
    host = other = launched(command, logs[0], environment)
    try:
        wait_for(lambda: listens(port), host, tmp_path)  # the one where they find each other must stay
        other = launched(command, logs[1], environment)
        wait_for(lambda: run.path.joinpath("metrics.jsonl").exists() and len(run.metrics()) >= 3, host, tmp_path)
        assert json.loads((run.path / "manifest.json").read_text())["ranks"] == 2
        for process in (host, other):  # the checkpoint that the rest begins from
            to_all(process, signal.SIGSTOP)
        shutil.copytree(run.path, copy, symlinks=True)
        if silent:
            to_all(host, signal.SIGCONT)
            wait_for(lambda: "no sign of life" in (tmp_path / "host.log").read_text(), host, tmp_path)
        to_all(other, signal.SIGKILL)
        to_all(host, signal.SIGCONT)
        assert host.wait(timeout=WAIT_S) == 0, (tmp_path / "host.log").read_text()[-3000:]
    finally:
        for process, log in zip((host, other), logs, strict=True):
            if process.poll() is None:
                to_all(process, signal.SIGKILL)
            log.close()
    assert run.is_complete and [row["step"] for row in run.metrics()] == list(range(1, 9))
    done = subprocess.run([*LUFFY, "resume", str(copy)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert comparable(run.metrics()) == comparable(RunDirectory(copy).metrics())
    first, second = weights(run), weights(RunDirectory(copy))
    assert all(bool((first[name] == second[name]).all()) for name in first)


def launched(command, log, environment):
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def to_all(process, sent):
    """To a launcher and the processes that it has started, each in a session of its own."""
    for pid in [process.pid, *children(process.pid)]:
        os.kill(pid, sent)


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition, process, folder):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert process.poll() is None, (folder / "host.log").read_text()[-3000:]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--nnodes=2"], "several machines need --rdzv"),
        (["--nnodes=two", "--rdzv=a:1"], "is a number or MIN:MAX"),
        (["--nproc=2", "--node-timeout=1"], "at least 10 s"),
        (["--nproc=2", "--engine=torch"], "--nproc 2 needs engine deepspeed"),
        (["--nnodes=2", "--rdzv=a:1", "--engine=torch"], "--nnodes 2 needs engine deepspeed"),
    ],
)
def test_what_cannot_be_launched(tmp_path, flags, told):
    with pytest.raises(SystemExit, match=told):
        main(["train", "--run-dir", str(tmp_path / "run"), "--engine=deepspeed", *flags])


def test_ranks_of_one_machine_meet_on_its_loopback(tmp_path):
    """Nothing that the launcher or a rank listens at can be reached from outside."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*LUFFY, "train", *FLAGS, "--nproc", "2", "--run-dir", str(tmp_path / "run")]
    with open(tmp_path / "host.log", "w") as log:
        launcher = launched(command, log, environment)
    try:
        wait_for(lambda: RunDirectory(tmp_path / "run").last_row().get("step", 0) >= 1, launcher, tmp_path)
        ranks = children(launcher.pid)
        found = {process: listening(process) for process in [launcher.pid, *ranks]}
        assert len(ranks) == 2 and all(found.values())
        for rank in ranks:  # (a host whose name is that of its loopback would be there without)
            environment = Path(f"/proc/{rank}/environ").read_bytes().split(b"\0")
            assert {b"GLOO_SOCKET_IFNAME=lo", b"NCCL_SOCKET_IFNAME=lo"} <= set(environment)
        assert {address for addresses in found.values() for address in addresses} <= LOOPBACK
    finally:
        to_all(launcher, signal.SIGKILL)


@pytest.mark.parametrize("silent", [False, True], ids=["ends", "falls silent"])
def test_a_rank_that_is_lost_is_started_again(tmp_path, silent):
    """On one machine: its launcher starts both again, and they go on from the last checkpoint."""
    run = RunDirectory(tmp_path / "run")
    more = ["--nproc=2", "--max-restarts=1", "--node-timeout=20"]
    with open(tmp_path / "host.log", "w") as log:
        command = [*LUFFY, "train", *FLAGS, *more, "--run-dir", str(run.path)]
        host = launched(command, log, {**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_for(lambda: run.path.joinpath("metrics.jsonl").exists() and len(run.metrics()) >= 3, host, tmp_path)
        first = children(host.pid)
        os.kill(first[1], signal.SIGSTOP if silent else signal.SIGKILL)
        assert host.wait(timeout=WAIT_S) == 0, (tmp_path / "host.log").read_text()[-3000:]
    finally:
        if host.poll() is None:
            to_all(host, signal.SIGKILL)
    assert run.is_complete and [row["step"] for row in run.metrics()] == list(range(1, 9))
    assert not any(Path(f"/proc/{rank}").exists() for rank in first)
    assert ("no sign of life" in (tmp_path / "host.log").read_text()) == silent
