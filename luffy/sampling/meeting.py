"""Where the processes of a run meet: at addresses that are told to them, not on all interfaces as torch has it."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}
"""Environment of processes that are all on one machine, as far as the user says nothing else."""
TIMEOUT = timedelta(minutes=30)


def store(address: str, port: int, size: int, *, leads: bool, timeout: timedelta = TIMEOUT) -> Any:
    """torch's TCPStore of `size` processes. The leader's listens at this address alone; its `port` says where, if the
    given one is 0."""
    from torch.distributed import TCPStore

    listening: dict[str, Any] = {}
    if leads:
        server = socket.create_server((address, port))
        port = server.getsockname()[1]
        listening["master_listen_fd"] = server.detach()
    return TCPStore(address, port, size, leads, timeout, wait_for_workers=False, **listening)
