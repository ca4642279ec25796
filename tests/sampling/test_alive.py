"""Signs of life between processes: they must not spoil the end of a rank, and a store that falls silent is noticed.
(That a rank which falls silent is noticed is tested with launchers, in tests/training/test_nodes.py.)"""

import os
import signal
import subprocess
import sys

from luffy.sampling import alive, meeting

WATCHED = """
import os, time
import torch.distributed
from luffy.sampling import alive

ends = []
for _ in range(15):
    rank = os.fork()
    if not rank:
        for _ in range(4):
            alive.watch(0, 1)
        time.sleep(0.05)
        break  # and ends, as Python ends
    ends.append(os.waitpid(rank, 0)[1])
else:
    print(*ends)
"""


def test_a_process_that_is_watched_ends_well():
    """Fifteen times, as a thread may be inside the store as Python ends, or not."""
    store = meeting.store("127.0.0.1", 0, 1, leads=True)
    launcher = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    environment = {**os.environ, **launcher, alive.TIMEOUT_NAME: "0.04"}
    command = [sys.executable, "-c", WATCHED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 and "terminate" not in done.stderr, done.stderr
    assert done.stdout.split() == ["0"] * 15
    assert store.add("alive/0", 0) > 4 * alive.LEFT  # the last of them have counted and said goodbye


STORE = """
import sys, time
from luffy.sampling import meeting

store = meeting.store("127.0.0.1", 0, 1, leads=True)
print(store.port, flush=True)
time.sleep(600)
"""
WAITING = """
import sys, time
from luffy.sampling import alive

rank, size, seconds = map(int, sys.argv[1:])
alive.LEAVE_S = 2.0
alive.watch(rank, size)
print("watched", flush=True)
time.sleep(seconds)
sys.exit(3)
"""


def test_a_store_that_falls_silent():
    """Its machine stands still: ranks that would wait for each other end themselves, one that is alone and has done its
    work ends as it would have."""
    server = subprocess.Popen([sys.executable, "-c", STORE], stdout=subprocess.PIPE, text=True)
    ranks = []
    try:
        assert server.stdout
        launcher = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}
        launcher["MASTER_PORT"] = server.stdout.readline().strip()
        environment = {**os.environ, **launcher, alive.TIMEOUT_NAME: "6"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        for arguments in ("0 2 300", "1 2 300", "0 1 3"):
            command = [sys.executable, "-c", WAITING, *arguments.split()]
            ranks.append(subprocess.Popen(command, env=environment, **pipes))
        for rank in ranks:
            assert rank.stdout.readline() == "watched\n"
        server.send_signal(signal.SIGSTOP)
        said = [rank.communicate(timeout=60)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [1, 1, 3], said
        assert "no sign of life from rank 1" in said[0] and "no sign of life from rank 0" in said[1]
    finally:
        for process in (server, *ranks):
            process.kill()
            process.wait()
