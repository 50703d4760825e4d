"""Loopback servers in front of the real one that fail on purpose: the first connections or calls, and then no more."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

Fault = Callable[[socket.socket], None]
PATIENCE = 10.0  # seconds after which a test's connection ends by itself


class FaultyHttp:
    """Takes connections; each of the first ones meets the next fault, the others a tunnel to `target` (host, port).

    forever: the last fault is met again and again. requests: what came in, as bytes, one entry a connection.
    """

    def __init__(
        self,
        target: tuple[str, int] | None,
        faults: Sequence[Fault] = (),
        forever: bool = False,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.requests: list[bytes] = []
        self._target, self._faults, self._forever, self._context = target, deque(faults), forever, context
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return self._listener.getsockname()[1]

    @property
    def url(self) -> str:
        return f"{'https' if self._context else 'http'}://127.0.0.1:{self.port}"

    def drop_connections(self) -> None:
        """Cut every open connection, as a server that restarts does."""
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> FaultyHttp:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.drop_connections()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE)
        if self._context:
            try:
                connection = self._context.wrap_socket(connection, server_side=True)
            except OSError:  # wrap_socket has closed it
                return
        with contextlib.suppress(OSError), connection:
            self._open.append(connection)
            fault = None
            if self._faults:
                fault = self._faults[0] if self._forever and len(self._faults) == 1 else self._faults.popleft()
            place = len(self.requests)
            self.requests.append(b"")
            if fault:
                self.requests[place] = read_request(connection)
                fault(connection)
            elif self._target:
                self._tunnel(connection, place)

    def _tunnel(self, connection: socket.socket, place: int) -> None:
        """Copy both ways in one thread: two threads in one SSLSocket hung one connection in about 1,500."""
        with socket.create_connection(self._target, timeout=PATIENCE) as server:
            while True:
                buffered = isinstance(connection, ssl.SSLSocket) and connection.pending()
                readable = [connection] if buffered else select.select([connection, server], [], [])[0]
                for source in readable:
                    if not (data := source.recv(65536)):
                        return
                    if source is connection:
                        self.requests[place] += data
                        server.sendall(data)
                    else:
                        connection.sendall(data)


def read_request(connection: socket.socket) -> bytes:
    """A request's head and body."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def reset(connection: socket.socket) -> None:
    """End the connection with RST instead of an answer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def hang_up(_connection: socket.socket) -> None:
    """Close without an answer."""


def silent(connection: socket.socket) -> None:
    """Say nothing until the other end goes."""
    connection.recv(1)


def answers(status: str, body: bytes = b"", **headers: object) -> Fault:
    """A whole answer, whatever was asked."""
    return says(http_answer(status, body, **headers))


def says(data: bytes) -> Fault:
    """These bytes, then the end of the connection."""
    return lambda connection: connection.sendall(data)


def trickles(data: bytes, pause: float = 0.05) -> Fault:
    """These bytes one by one, so that no single wait is long."""

    def fault(connection: socket.socket) -> None:
        for place in range(len(data)):
            connection.sendall(data[place : place + 1])
            time.sleep(pause)

    return fault


def http_answer(status: str, body: bytes = b"", **headers: object) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class FaultyGrpc(grpc.GenericRpcHandler):
    """A gRPC server whose first calls fail with the given codes; the others are passed on to `target` as they are.

    calls: the method and metadata of each call that came in.
    """

    def __init__(self, target: str | None, faults: Sequence[grpc.StatusCode | float] = ()) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._faults = deque(faults)
        self._delay = 0.0
        self._channel = grpc.insecure_channel(target) if target else None

    def delay_inference(self, seconds: float) -> None:
        """Answer each inference that much later from now on."""
        self._delay = seconds

    def close(self) -> None:
        if self._channel:
            self._channel.close()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.calls.append((details.method, dict(context.invocation_metadata())))
            fault = self._faults.popleft() if self._faults else None
            if isinstance(fault, float):
                time.sleep(fault)
            elif fault is not None:
                context.abort(fault, f"made to fail: {fault.name}")
            if self._delay and details.method.endswith("/ModelInfer"):
                time.sleep(self._delay)
            if self._channel is None:
                return b"\xff\xff\xff"
            try:
                return self._channel.unary_unary(details.method)(request, timeout=PATIENCE)
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())

        return grpc.unary_unary_rpc_method_handler(handle)


@contextlib.contextmanager
def grpc_server(handler: FaultyGrpc, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """Serve the handler; yields its url."""
    server = grpc.server(ThreadPoolExecutor(8), handlers=[handler])
    open_port = (lambda a: server.add_secure_port(a, credentials)) if credentials else server.add_insecure_port
    port = open_port("127.0.0.1:0")
    server.start()
    try:
        yield f"{'grpcs' if credentials else 'grpc'}://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
        handler.close()
