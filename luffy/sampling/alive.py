"""Signs of life between the processes of a launcher, so that a machine that falls silent is noticed.

A process that ends closes its connections, which the others see at once. One whose machine has lost power or network
closes nothing: the others would wait for it as long as for one that evaluates or writes a checkpoint, which may take
hours. So each process counts up in the launcher's store from a thread of its own, and ends itself if another has not
counted for too long; its launcher then starts it again, with those that are left.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

log = logging.getLogger(__name__)

TIMEOUT_NAME = "LUFFY_NODE_TIMEOUT"
"""Environment variable that the launcher hands on: seconds of silence after which a process counts as lost."""
TIMEOUT_S = 300.0
LEFT = 1 << 40  # a count that says goodbye


def watch(rank: int, size: int) -> None:
    """Gives signs of life from now to the end of this process, and ends it if another falls silent. Without a launcher
    (torchrun), whose store outlives the processes, nothing is watched."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    import torch.distributed as dist
    from torch.distributed import DistError

    timeout_s = float(os.environ.get(TIMEOUT_NAME, TIMEOUT_S))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # a connection of its own: others are blocked while the process waits in them
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s))
    counts = dist.PrefixStore("alive", store)
    counts.set(str(rank), "0")  # also of a process that was here before
    leaving = threading.Event()
    thread = threading.Thread(target=_watch, args=(counts, rank, size, timeout_s, leaving), daemon=True)
    thread.start()

    def leave() -> None:
        """The thread ends first: one that is inside the store as Python ends is unwound there, which aborts the
        process, so that a run that is complete would count as failed."""
        leaving.set()
        thread.join()
        with suppress(DistError):  # the store has gone first, with its launcher
            counts.add(str(rank), LEFT)

    atexit.register(leave)


def _watch(counts: Store, rank: int, size: int, timeout_s: float, leaving: threading.Event) -> None:
    from torch.distributed import DistError

    others = [other for other in range(size) if other != rank]
    last, seen = dict.fromkeys(others, -1), dict.fromkeys(others, time.monotonic())
    while not leaving.wait(timeout_s / 20):
        try:
            counts.add(str(rank), 1)
            found = {other: counts.add(str(other), 0) for other in others}
        except DistError:  # the launcher that has the store is gone, and with it a machine or the whole run
            found = {}
        now = time.monotonic()
        for other in others:
            if other in found and (found[other] != last[other] or found[other] >= LEFT):
                last[other], seen[other] = found[other], now
        silent = [other for other in others if now - seen[other] > timeout_s]
        if silent:
            log.error("no sign of life from rank %s for %.0f s", ", ".join(map(str, silent)), timeout_s)
            logging.shutdown()
            os._exit(1)  # the main thread waits in a library, where no exception reaches it
