"""Connections that misbehave below the level of a request: slow, cut, lying about length, flooding frames."""

from __future__ import annotations

import contextlib
import resource
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import h2.config
import h2.connection
import h2.exceptions
from bad_requests import INFER, good_body

Port = int


@contextmanager
def connected(port: Port, timeout: float = 5.0, source: str = "127.0.0.1") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=timeout, source_address=(source, 0)) as opened:
        yield opened


def head(length: int | None, *more: str) -> bytes:
    lines = [f"POST {INFER} HTTP/1.1", "Host: tailor", *more]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def answer(opened: socket.socket) -> bytes:
    """What comes back until the other side closes or says no more."""
    received = b""
    with contextlib.suppress(OSError):
        while piece := opened.recv(65536):
            received += piece
    return received


def status_of(received: bytes) -> int:
    """The status of an HTTP/1 answer, 0 where the connection was closed without one."""
    return int(received.split(b" ", 2)[1]) if received.startswith(b"HTTP/1") else 0


def cut_body(port: Port) -> int:
    body, headers = good_body()
    with connected(port) as opened:
        more = [f"{name}: {value}" for name, value in headers.items()]
        opened.sendall(head(len(body), *more) + body[: len(body) // 2])
        opened.shutdown(socket.SHUT_WR)
        return status_of(answer(opened))


def garbage(port: Port) -> int:
    with connected(port) as opened:
        opened.sendall(bytes(range(256)) * 8 + b"\r\n\r\n")
        return status_of(answer(opened))


def two_lengths(port: Port) -> int:
    with connected(port) as opened:
        opened.sendall(head(5, "Content-Length: 6") + b"xxxxxx")
        return status_of(answer(opened))


def length_and_chunks(port: Port) -> int:
    with connected(port) as opened:
        opened.sendall(head(5, "Transfer-Encoding: chunked") + b"0\r\n\r\n")
        return status_of(answer(opened))


def huge_length(port: Port) -> int:
    with connected(port) as opened:
        opened.sendall(head(8 * 1024**3, "Inference-Header-Content-Length: 10") + b"{" * 100)
        return status_of(answer(opened))


def endless_chunks(port: Port, most: int = 200_000) -> int:
    """One-byte chunks until the other side has had enough; the raw server dies of three million."""
    with connected(port) as opened:
        opened.sendall(head(None, "Transfer-Encoding: chunked", "Inference-Header-Content-Length: 10"))
        sent = 0
        with contextlib.suppress(OSError):
            while sent < most:
                opened.sendall(b"1\r\nx\r\n" * 1000)
                sent += 1000
            opened.sendall(b"0\r\n\r\n")
        return status_of(answer(opened))


@contextmanager
def body_without_end(port: Port, most: int) -> Iterator[socket.socket]:
    """A connection that has announced 8 GiB and sent the first `most` bytes of them, or as many as were taken."""
    with connected(port) as opened:
        opened.sendall(head(8 * 1024**3, "Inference-Header-Content-Length: 10"))
        with contextlib.suppress(OSError):
            for _ in range(most // 2**20):
                opened.sendall(bytes(2**20))
        yield opened


def header_flood(port: Port) -> int:
    with connected(port) as opened:
        with contextlib.suppress(OSError):
            opened.sendall(b"GET /v2 HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(20_000)))
        return status_of(answer(opened))


HTTP_CONNECTIONS: dict[str, tuple[Callable[[Port], int], tuple[int, ...]]] = {
    "connection: cut body": (cut_body, (0, 400)),
    "connection: garbage": (garbage, (0, 400)),
    "connection: two lengths": (two_lengths, (400,)),
    "connection: length and chunks": (length_and_chunks, (400, 411)),
    "connection: length of 8 GiB": (huge_length, (413,)),
    "connection: endless chunks": (endless_chunks, (0, 411)),
    "connection: header flood": (header_flood, (0, 400, 494)),
}


def slow_headers(port: Port, seconds: float) -> float:
    """A letter of a header every now and then; how long the other side stood it, at most `seconds`."""
    started = time.monotonic()
    with connected(port) as opened, contextlib.suppress(OSError):
        opened.sendall(b"GET /v2 HTTP/1.1\r\n")
        opened.settimeout(0.2)
        while time.monotonic() - started < seconds:
            opened.sendall(b"X")
            with contextlib.suppress(TimeoutError):
                if opened.recv(4096) == b"":
                    break
    return time.monotonic() - started


def slow_body(port: Port, seconds: float) -> float:
    """Half a body and then nothing; how long the other side stood it, at most `seconds`."""
    started = time.monotonic()
    body, headers = good_body()
    with connected(port, seconds) as opened, contextlib.suppress(OSError):
        opened.sendall(head(len(body), *(f"{name}: {value}" for name, value in headers.items())) + body[:100])
        opened.recv(4096)
    return time.monotonic() - started


@contextmanager
def http2(port: Port) -> Iterator[tuple[socket.socket, h2.connection.H2Connection]]:
    connection = h2.connection.H2Connection(
        h2.config.H2Configuration(client_side=True, validate_outbound_headers=False)
    )
    connection.initiate_connection()
    with connected(port) as opened:
        opened.sendall(connection.data_to_send())
        yield opened, connection


HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "tailor"),
    (":path", "/inference.GRPCInferenceService/ModelInfer"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]


def rapid_reset(port: Port, streams: int = 300) -> None:
    """Streams that are opened and reset at once (CVE-2023-44487), within reason."""
    with http2(port) as (opened, connection), contextlib.suppress(OSError, h2.exceptions.ProtocolError):
        for _ in range(streams):
            stream = connection.get_next_available_stream_id()
            connection.send_headers(stream, HEADERS)
            connection.reset_stream(stream)
            opened.sendall(connection.data_to_send())


def ping_flood(port: Port, pings: int = 1000) -> None:
    with http2(port) as (opened, connection), contextlib.suppress(OSError):
        for _ in range(pings):
            connection.ping(b"12345678")
        opened.sendall(connection.data_to_send())
        opened.settimeout(0.5)
        answer(opened)


def settings_flood(port: Port, frames: int = 1000) -> None:
    with http2(port) as (opened, _), contextlib.suppress(OSError):
        opened.sendall(b"\0\0\0\4\0\0\0\0\0" * frames)
        opened.settimeout(0.5)
        answer(opened)


def continuation_flood(port: Port, frames: int = 2000) -> None:
    """Headers that never end (CVE-2024-27316)."""
    with http2(port) as (opened, _), contextlib.suppress(OSError):
        opened.sendall(b"\0\0\1\1\0\0\0\0\1\x82" + b"\0\0\x10\x09\0\0\0\0\1" + b"\x40\x01a\x01b" * 3 + b"\0")
        for _ in range(frames):
            opened.sendall(b"\0\0\x05\x09\0\0\0\0\1\x40\x01a\x01b")
        opened.settimeout(0.5)
        answer(opened)


def idle_streams(port: Port, streams: int = 100) -> None:
    """Streams that send headers and never a message."""
    with http2(port) as (opened, connection), contextlib.suppress(OSError, h2.exceptions.ProtocolError):
        for _ in range(streams):
            connection.send_headers(connection.get_next_available_stream_id(), HEADERS)
        opened.sendall(connection.data_to_send())
        opened.settimeout(0.5)
        answer(opened)


def not_http2(port: Port) -> None:
    with connected(port) as opened, contextlib.suppress(OSError):
        opened.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(500))
        answer(opened)


GRPC_CONNECTIONS: dict[str, Callable[[Port], None]] = {
    "http/2: rapid reset": rapid_reset,
    "http/2: pings": ping_flood,
    "http/2: settings": settings_flood,
    "http/2: endless headers": continuation_flood,
    "http/2: idle streams": idle_streams,
    "http/2: something else": not_http2,
}


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # with an empty SETTINGS frame


def client_hello() -> bytes:
    """The first message of a TLS handshake."""
    context, outgoing = ssl.create_default_context(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


# What each of thousands of connections of one address sends before it stays silent, and the port: HTTP or gRPC, with TLS
# or without.
CROWDS: dict[str, tuple[str, bool, bytes]] = {
    "crowd: silent TCP": ("http", False, b""),
    "crowd: half-sent headers": ("http", False, b"GET /v2 HTTP/1.1\r\nHost: tai"),
    "crowd: idle keep-alive": ("http", False, b"GET /gateway/health HTTP/1.1\r\nHost: tailor\r\n\r\n"),
    "crowd: half-sent http/2 preface": ("grpc", False, PREFACE[:10]),
    "crowd: idle http/2": ("grpc", False, PREFACE),
    "crowd: half-sent http/2 headers": ("grpc", False, PREFACE + b"\0\0\1\1\0\0\0\0\1\x82"),
    "crowd: silent TCP to TLS": ("grpc", True, b""),
    "crowd: half-sent TLS handshake": ("http", True, client_hello()[:50]),
    "crowd: unfinished TLS handshake": ("http", True, client_hello()),
}


@contextmanager
def crowd(port: Port, first_bytes: bytes, connections: int, source: str) -> Iterator[None]:
    """Connections of one address that send their first bytes and then nothing; each that is closed is replaced."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(2 * connections, hard)), hard))
    stopping = threading.Event()
    with selectors.DefaultSelector() as opened:

        def open_one() -> None:
            with contextlib.suppress(OSError):  # the other side may close it at once
                one = socket.create_connection(("127.0.0.1", port), timeout=5, source_address=(source, 0))
                opened.register(one, selectors.EVENT_READ)
                one.sendall(first_bytes)

        def replace_closed() -> None:
            while not stopping.wait(0.2):
                for key, _ in opened.select(0):
                    with contextlib.suppress(OSError):
                        if key.fileobj.recv(65536):
                            continue
                    opened.unregister(key.fileobj)
                    key.fileobj.close()
                for _ in range(min(connections - len(opened.get_map()), 200)):
                    open_one()

        for _ in range(connections):
            open_one()
        replacing = threading.Thread(target=replace_closed)
        replacing.start()
        try:
            yield
        finally:
            stopping.set()
            replacing.join()
            for key in list(opened.get_map().values()):
                key.fileobj.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
