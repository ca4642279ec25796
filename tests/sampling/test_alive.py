"""Signs of life between processes: giving them must not spoil the end of a rank. (That a rank which falls silent is
noticed is tested with launchers, in tests/training/test_nodes.py.)"""

import os
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
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["0"] * 15
    assert store.add("alive/0", 0) > 4 * alive.LEFT  # the last of them have counted and said goodbye
