"""A network between a trainer and its server that cuts, garbles, delays or swallows what the server says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from outcome import Outcome
from vllm_runs import connect, requests, sample, tokens, weights

from luffy.errors import SamplerError
from luffy.model.loading import load_model
from luffy.sampling.servers import ServerSampler

TIMEOUT_S = 4.0  # of the sampler
LIMIT_S = 3 * TIMEOUT_S  # within which a fault must have shown, on a busy machine
START = ("/v1/models", "/get_world_size", "/abort_requests", "/init_weight_transfer_engine")
WEIGHTS = ("/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume")
SAMPLING = ("/weight_info", "/inference/v1/generate")
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"


def _body(text: bytes) -> bytes:
    return OK + b"Content-Length: %d\r\n\r\n" % len(text) + text


def cut(answer: bytes, to: socket.socket) -> None:
    to.sendall(answer[: len(answer) // 2])


def swallowed(answer: bytes, to: socket.socket) -> None:
    time.sleep(LIMIT_S)


def garbled(answer: bytes, to: socket.socket) -> None:
    to.sendall(_body(b'{"choices": [{"tok'))


def of_another_shape(answer: bytes, to: socket.socket) -> None:
    to.sendall(_body(b"[]"))


def refused(answer: bytes, to: socket.socket) -> None:
    to.sendall(b"HTTP/1.1 500 Internal Server Error\r\nConnection: close\r\nContent-Length: 4\r\n\r\nfull")


def slow(answer: bytes, to: socket.socket) -> None:
    """In ten pieces, over half a second."""
    size = len(answer) // 10 + 1
    for first in range(0, len(answer), size):
        to.sendall(answer[first : first + size])
        time.sleep(0.05)


class Proxy:
    """A port on loopback in front of a server's. fault: what happens to the answers of a route; None: nothing."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self.server = (host, int(port))
        self.fault: Callable[[bytes, socket.socket], None] | None = None
        self.route = ""
        self.hit = 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # it is closed
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._pass, args=(connection,), daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        """One request and its answer; the connection ends with it."""
        with suppress(OSError), client, socket.create_connection(self.server) as server:
            request = _whole(client)
            path = request.split(b" ", 2)[1].decode().partition("?")[0] if request else ""
            head, _, body = request.partition(b"\r\n\r\n")
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
            server.sendall(b"\r\n".join([*lines, b"Connection: close", b"", body]))
            answer = b"".join(iter(lambda: server.recv(1 << 16), b""))
            if self.fault is not None and path == self.route:
                self.hit += 1
                self.fault(answer, client)
            else:
                client.sendall(answer)

    def close(self) -> None:
        self.listener.close()


def _whole(connection: socket.socket) -> bytes:
    """A request with all of its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (part := connection.recv(1 << 16)):
            return b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    sizes = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while len(body) < int(sizes[0] if sizes else 0):
        body += connection.recv(1 << 16)
    return head + b"\r\n\r\n" + body


KINDS = (cut, swallowed, garbled, of_another_shape, refused, slow)


def faults(server: str, kinds: Sequence[Callable[[bytes, socket.socket], None]] = KINDS) -> Iterator[Outcome]:
    """Every fault at every route: an error in time, unless the right tokens come all the same. Afterwards a sampler
    that is started again, as the trainer does, gives these tokens. A slow network is no fault."""
    model = load_model("tiny", device="cpu").eval()
    asked = requests(lengths=(9, 30), generations=2)
    proxy = Proxy(server)

    def started() -> ServerSampler:
        return connect([proxy.address], model, timeout_s=TIMEOUT_S)

    def answers(sampler: ServerSampler) -> list[list[int]]:
        sampler.load_weights(weights(model))
        return tokens(sample(sampler, asked, temperature=0.0))

    sampler = started()
    right = answers(sampler)
    for route in (*START, *WEIGHTS, *SAMPLING):
        for fault in kinds:
            proxy.fault, proxy.route, proxy.hit = fault, route, 0
            begun, told, lost = time.monotonic(), "", ""
            try:
                if route in START:
                    sampler.close()
                    sampler = started()
                lost = "" if answers(sampler) == right else "other tokens"
            except SamplerError as error:
                told = str(error)
                lost = f"an error: {told}" if fault is slow else ""
            except Exception as error:
                lost = f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - begun
            lost = lost or ("" if proxy.hit else "it was not asked") or ("" if seconds < LIMIT_S else "too late")
            proxy.fault = None
            try:
                if route in START:
                    sampler = started()
                else:
                    sampler.restart()
                lost = lost or ("" if answers(sampler) == right else "other tokens afterwards")
            except Exception as error:
                lost = lost or f"afterwards {type(error).__name__}: {error}"
            what = fault.__name__.replace("_", " ")
            yield Outcome(f"a server's answer, {what}", f"{route}, {seconds:.1f} s, {told[:150]}", lost)
    sampler.close()
    proxy.close()
