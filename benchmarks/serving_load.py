"""Load generator of benchmarks.serving: sends prepared bytes over keep-alive connections, times and counts responses.

The generator shares the cores with the server, so it is a single epoll thread, and reports its own CPU share.
"""

from __future__ import annotations

import gc
import itertools
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

PATIENCE = 30.0  # timeout in seconds without any response
WARM_UP = 0.25  # warm-up before the measurement, as a share of its time
READ = 1 << 18


class LoadError(Exception):
    """The server sent no response or an error response; the message contains it."""


@dataclass
class TurnResult:
    """Result of one turn: images per second, latencies (ms) of the requests, the generator's share of one core.

    images: all of the turn and its warm-up; 0 if not counted.
    """

    rate: float
    latencies: np.ndarray = field(repr=False)
    own_share: float
    images: int = 0

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.latencies, share))


class Wire(Protocol):
    """A connection with at most one request on it."""

    sock: socket.socket

    def send(self, request: bytes) -> None: ...

    def receive(self) -> bool:
        """Read available bytes; return whether the response is complete. Raises LoadError for an error response."""


class HttpWire:
    """HTTP/1.1 connection; a request is head and body as bytes."""

    def __init__(self, port: int) -> None:
        self.sock = connect(port)
        self._buffer = bytearray()
        self._ends: int | None = None

    def send(self, request: bytes) -> None:
        send_all(self.sock, request)

    def receive(self) -> bool:
        data = self.sock.recv(READ)
        if not data:
            raise LoadError("the server closed a connection")
        self._buffer += data
        if self._ends is None and (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            self._ends = end + 4 + content_length(self._buffer[: end + 2])
        if self._ends is None or len(self._buffer) < self._ends:
            return False
        if self._buffer[9:12] != b"200":
            raise LoadError(f"the server answered {error_text(self._buffer)}")
        self._buffer.clear()
        self._ends = None
        return True


def content_length(head: bytearray) -> int:
    """Return the body length of a response. Raises LoadError for a response without one."""
    index = head.lower().find(b"\r\ncontent-length:")
    if index < 0:
        raise LoadError("the response has no Content-Length")
    return int(head[index + 17 : head.find(b"\r", index + 2)])


def error_text(response: bytearray) -> str:
    """Status and body of an error response, in one line; the body has the server's reason."""
    head, _, body = response.partition(b"\r\n\r\n")
    status = head.partition(b"\r\n")[0].partition(b" ")[2]
    return " ".join(f"{status.decode('latin-1')}: {body.decode('latin-1')[:500]}".split())


def connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def send_all(sock: socket.socket, data: bytes) -> None:
    """Run sendall; raises LoadError instead of OSError."""
    try:
        sock.sendall(data)
    except OSError as error:
        raise LoadError(f"a request could not be sent: {error}") from error


def http_request(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Return the bytes of an HTTP POST request."""
    lines = {"host": "127.0.0.1", "content-length": str(len(body)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


@dataclass(frozen=True)
class Load:
    """The load on a server. requests: prepared requests of `images` images each, in the form that `wire` sends.

    users: connections, each with one request in flight. rate: None (closed loop), or requests per second in total,
    scheduled at random times (Poisson) from which their latency is measured, and sent when a connection is free.
    """

    port: int
    requests: Sequence[bytes]
    images: int = 1
    users: int = 32
    rate: float | None = None
    wire: Callable[[int], Wire] = HttpWire


def run(load: Load, seconds: float) -> TurnResult:
    """Send requests for `seconds` after a warm-up. Raises LoadError, and OSError where no server listens."""
    wires = [load.wire(load.port) for _ in range(load.users)]
    gc.collect()
    gc.disable()
    began, used = time.perf_counter(), time.process_time()
    begins = began + WARM_UP * seconds
    try:
        responses = _loop(wires, itertools.cycle(load.requests), begins + seconds, load.rate)
        own_share = (time.process_time() - used) / (time.perf_counter() - began)
    finally:
        gc.enable()
        for wire in wires:
            wire.sock.close()
    # All responses have arrived, some after the end; a late one counts only if there is no other.
    counted = responses[(responses[:, 0] >= begins) & (responses[:, 0] < begins + seconds)]
    counted = counted if len(counted) else responses[-1:]
    before = responses[responses[:, 0] < counted[0, 0], 0]
    # The responses of a batch arrive together, so the span is from the last response before the measurement to the last
    # counted one: with fixed bounds a batch at a bound would be counted in full or not at all.
    span = counted[-1, 0] - (before[-1] if len(before) else began)
    took = span if span > seconds / 2 else max(seconds, responses[-1, 0] - began)
    return TurnResult(len(counted) * load.images / took, counted[:, 1] * 1000, own_share, len(responses) * load.images)


def _loop(wires: Sequence[Wire], requests: Iterator[bytes], ends: float, rate: float | None) -> np.ndarray:
    """Send requests until `ends` and wait for all responses; return arrival time and latency (s) of each, [n,2].

    Requests that were due but not sent before `ends` are dropped.
    """
    selector = selectors.EpollSelector()
    for wire in wires:
        selector.register(wire.sock, selectors.EVENT_READ, wire)
    free, sent, clock = list(wires), {}, time.perf_counter
    due = arrivals(clock(), rate) if rate else None
    next_due = next(due) if due else 0.0
    responses: list[tuple[float, float]] = []
    while True:
        now = clock()
        while free and next_due <= now < ends:
            wire = free.pop()
            # In a closed loop a request is due when it is sent.
            sent[wire] = next_due if due else clock()
            wire.send(next(requests))
            if due:
                next_due = next(due)
        if now >= ends and len(free) == len(wires):
            break
        idle = due and free and now < ends
        ready = selector.select(max(0.0, min(next_due, ends) - now) if idle else PATIENCE)
        if not ready and not idle:
            raise LoadError(f"no response for {PATIENCE:g} s")
        for key, _ in ready:
            wire = key.data
            if wire.receive():
                now = clock()
                responses.append((now, now - sent[wire]))
                free.append(wire)
    selector.close()
    return np.array(responses).reshape(-1, 2)


def arrivals(start: float, rate: float) -> Iterator[float]:
    """Yield the times of a Poisson process with a fixed seed."""
    generator = np.random.default_rng(0)
    while True:
        for gap in generator.exponential(1 / rate, 1024):
            start += gap
            yield start
