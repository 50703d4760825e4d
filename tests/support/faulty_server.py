"""Loopback proxies in front of the real server that inject faults into the first connections or calls."""

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
PATIENCE = 10.0  # timeout of a test's connection in seconds


class FaultyHttp:
    """Accepts connections; the first ones get one fault each, the others a tunnel to `target` (host, port).

    forever: repeat the last fault for all further connections. requests: received bytes, one entry per connection.
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
        """Close every open connection, like a server that restarts."""
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
            except OSError:  # wrap_socket has closed the connection
                return
        with contextlib.suppress(OSError), connection:
            self._open.append(connection)
            fault = None
            if self._faults:
                fault = self._faults[0] if self._forever and len(self._faults) == 1 else self._faults.popleft()
            index = len(self.requests)
            self.requests.append(b"")
            if fault:
                self.requests[index] = read_request(connection)
                fault(connection)
            elif self._target:
                self._tunnel(connection, index)

    def _tunnel(self, connection: socket.socket, index: int) -> None:
        """Copy in both directions in one thread: with two threads on an SSLSocket, 1 of 1,500 connections hung."""
        with socket.create_connection(self._target, timeout=PATIENCE) as server:
            while True:
                buffered = isinstance(connection, ssl.SSLSocket) and connection.pending()
                readable = [connection] if buffered else select.select([connection, server], [], [])[0]
                for source in readable:
                    if not (data := source.recv(65536)):
                        return
                    if source is connection:
                        self.requests[index] += data
                        server.sendall(data)
                    else:
                        connection.sendall(data)


def read_request(connection: socket.socket) -> bytes:
    """Read one request: head and body."""
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
    """Fault: end the connection with RST instead of a response."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def hang_up(_connection: socket.socket) -> None:
    """Fault: close without a response."""


def silent(connection: socket.socket) -> None:
    """Fault: send nothing until the client closes."""
    connection.recv(1)


def answers(status: str, body: bytes = b"", **headers: object) -> Fault:
    """Fault: send a fixed complete response."""
    return says(http_answer(status, body, **headers))


def says(data: bytes) -> Fault:
    """Fault: send these bytes, then close the connection."""
    return lambda connection: connection.sendall(data)


def trickles(data: bytes, pause: float = 0.05) -> Fault:
    """Fault: send these bytes one by one, so that no single wait is long."""

    def fault(connection: socket.socket) -> None:
        for index in range(len(data)):
            connection.sendall(data[index : index + 1])
            time.sleep(pause)

    return fault


def http_answer(status: str, body: bytes = b"", **headers: object) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class FaultyGrpc(grpc.GenericRpcHandler):
    """A gRPC server whose first calls fail with the given codes; the others are forwarded to `target` unchanged.

    calls: method and metadata of each received call.
    """

    def __init__(self, target: str | None, faults: Sequence[grpc.StatusCode | float] = ()) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._faults = deque(faults)
        self._delay = 0.0
        self._channel = grpc.insecure_channel(target) if target else None

    def delay_inference(self, seconds: float) -> None:
        """Delay each further inference by `seconds`."""
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
    """Serve the handler; yields its URL."""
    server = grpc.server(ThreadPoolExecutor(8), handlers=[handler])
    open_port = (lambda a: server.add_secure_port(a, credentials)) if credentials else server.add_insecure_port
    port = open_port("127.0.0.1:0")
    server.start()
    try:
        yield f"{'grpcs' if credentials else 'grpc'}://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
        handler.close()
