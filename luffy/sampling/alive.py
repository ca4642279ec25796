"""Signs of life between the processes of a launcher, so that a machine that falls silent is noticed.

A process that ends closes its connections, which the others see at once. One whose machine has lost power or network
closes nothing: the others would wait for it as long as for one that evaluates or writes a checkpoint, which may take
hours. So each process counts up in the launcher's store from a thread of its own, and ends itself if another has not
counted for too long; its launcher then starts it again, with those that are left. Where the store's own machine falls
silent, nobody is seen to count.
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
CONNECT_S = 60.0
LEAVE_S = 10.0  # for the last answer of the store


def watch(rank: int, size: int) -> None:
    """Gives signs of life from now to the end of this process, and ends it if another falls silent, or the store does.
    Without a launcher (torchrun), whose store outlives the processes, nothing is watched."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    import torch.distributed as dist
    from torch.distributed import DistError

    timeout_s = float(os.environ.get(TIMEOUT_NAME, TIMEOUT_S))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # a connection of its own: others are blocked while the process waits in them
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=CONNECT_S))
    counts = dist.PrefixStore("alive", store)
    counts.set(str(rank), "0")  # also of a process that was here before
    leaving = threading.Event()
    seen = {other: time.monotonic() for other in range(size) if other != rank}
    # two threads, as the one that asks a store whose machine is gone may wait for its answer for hours
    counting = threading.Thread(target=_count, args=(counts, rank, seen, timeout_s / 20, leaving), daemon=True)
    watching = threading.Thread(target=_watch, args=(seen, timeout_s, leaving), daemon=True)
    counting.start()
    watching.start()

    def leave() -> None:
        """The threads end first: one that comes out of the store while Python ends would abort the process, so that a
        run that is complete counts as failed."""
        leaving.set()
        watching.join()
        counting.join(LEAVE_S)
        if not counting.is_alive():  # (otherwise the store does not answer)
            with suppress(DistError):  # the store has gone first, with its launcher
                counts.add(str(rank), LEFT)

    atexit.register(leave)


def _count(counts: Store, rank: int, seen: dict[int, float], period_s: float, leaving: threading.Event) -> None:
    """Counts up, and notes when each of the others was last seen to."""
    from torch.distributed import DistError

    last = dict.fromkeys(seen, -1)
    while not leaving.wait(period_s):
        try:
            counts.add(str(rank), 1)
            for other in seen:
                found = counts.add(str(other), 0)
                if found != last[other] or found >= LEFT:
                    last[other], seen[other] = found, time.monotonic()
        except DistError:  # the launcher that has the store is gone, and with it a machine or the whole run
            continue


def _watch(seen: dict[int, float], timeout_s: float, leaving: threading.Event) -> None:
    while not leaving.wait(timeout_s / 20):
        now = time.monotonic()
        silent = [other for other, when in seen.items() if now - when > timeout_s]
        if silent:
            log.error("no sign of life from rank %s for %.0f s", ", ".join(map(str, silent)), timeout_s)
            logging.shutdown()
            os._exit(1)  # the main thread waits in a library, where no exception reaches it
