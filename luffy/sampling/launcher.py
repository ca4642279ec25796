"""torch's launcher for ranks that are all on one machine: `python -m luffy.sampling.launcher`, with torchrun's flags
of processes and restarts.

The ranks meet at a store of the launcher's. With `torchrun --standalone` this store listens on all interfaces, and
torch has no setting for it. So the store here is given a socket that listens on loopback alone.
"""

from __future__ import annotations

import sys
from datetime import timedelta

from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.run import main

from . import meeting

BACKEND = "loopback"
ADDRESS = "127.0.0.1"
TIMEOUT_S = 600  # torch's, of a rendezvous of fixed size


class Loopback(StaticTCPRendezvous):
    """The rendezvous of one launcher alone, whose stores listen on loopback, at a free port."""

    def __init__(self, params: RendezvousParameters) -> None:
        super().__init__(ADDRESS, 0, rank=0, world_size=1, run_id=params.run_id, timeout=TIMEOUT_S)

    def next_rendezvous(self) -> RendezvousInfo:
        """A store for every start of the ranks: in that of an earlier one they would find its addresses."""
        store = meeting.store(ADDRESS, 0, 1, leads=True, timeout=timedelta(seconds=TIMEOUT_S))
        self._store, self.master_port = store, store.port  # which the class then takes
        return super().next_rendezvous()

    def get_backend(self) -> str:
        return BACKEND


if __name__ == "__main__":
    rendezvous_handler_registry.register(BACKEND, Loopback)
    # without an endpoint, which is not used, torch warns that the address it would have by itself is not used
    main([f"--rdzv-backend={BACKEND}", f"--rdzv-endpoint={ADDRESS}", *sys.argv[1:]])
