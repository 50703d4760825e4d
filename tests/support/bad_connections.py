"""Misbehaving connections: slow, cut off, with a wrong length, or flooding frames."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from tests.support.bad_requests import INFER, good_body

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
    """Receive until the server closes the connection or a timeout."""
    received = b""
    with contextlib.suppress(OSError):
        while chunk := opened.recv(65536):
            received += chunk
    return received


def status_of(received: bytes) -> int:
    """Return the status of an HTTP/1 response; 0 where the connection was closed without a response."""
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


def endless_chunks(port: Port, limit: int = 200_000) -> int:
    """Send up to `limit` one-byte chunks until the server closes; three million crash Triton without a gateway."""
    with connected(port) as opened:
        opened.sendall(head(None, "Transfer-Encoding: chunked", "Inference-Header-Content-Length: 10"))
        sent = 0
        with contextlib.suppress(OSError):
            while sent < limit:
                opened.sendall(b"1\r\nx\r\n" * 1000)
                sent += 1000
            opened.sendall(b"0\r\n\r\n")
        return status_of(answer(opened))


@contextmanager
def body_without_end(port: Port, limit: int) -> Iterator[socket.socket]:
    """A connection that announces 8 GiB and sends the first `limit` bytes, or as many as the server accepts."""
    with connected(port) as opened:
        opened.sendall(head(8 * 1024**3, "Inference-Header-Content-Length: 10"))
        with contextlib.suppress(OSError):
            for _ in range(limit // 2**20):
                opened.sendall(bytes(2**20))
        yield opened


def header_flood(port: Port) -> int:
    with connected(port) as opened:
        with contextlib.suppress(OSError):
            opened.sendall(b"GET /v2 HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(20_000)))
        return status_of(answer(opened))


def odd(first_line: str, *more: str, body: str = "") -> bytes:
    return ("\r\n".join([first_line, "Host: tailor", *more]) + "\r\n\r\n" + body).encode()


# Requests that nginx itself rejects, most of them before it selects a location, with the response status.
ODD_REQUESTS: dict[str, tuple[bytes, int]] = {
    "odd: gzip and chunked": (odd(f"POST {INFER} HTTP/1.1", "Transfer-Encoding: gzip, chunked", body="0\r\n\r\n"), 501),
    "odd: unknown encoding": (odd(f"POST {INFER} HTTP/1.1", "Transfer-Encoding: x"), 501),
    "odd: identity": (odd(f"POST {INFER} HTTP/1.1", "Transfer-Encoding: identity"), 501),
    "odd: chunked twice": (odd(f"POST {INFER} HTTP/1.1", *["Transfer-Encoding: chunked"] * 2, body="0\r\n\r\n"), 400),
    "odd: chunked in HTTP/1.0": (odd(f"POST {INFER} HTTP/1.0", "Transfer-Encoding: chunked", body="0\r\n\r\n"), 400),
    "odd: malformed chunk": (odd(f"POST {INFER} HTTP/1.1", "Transfer-Encoding: chunked", body="zz\r\n\r\n"), 400),
    "odd: HTTP/2.0": (odd("GET /v2 HTTP/2.0"), 505),
    "odd: HTTP/3.0": (odd("GET /v2 HTTP/3.0"), 505),
    "odd: HTTP/0.1": (odd("GET /v2 HTTP/0.1"), 400),
    "odd: no version": (odd("GET /v2 SPEECH/1.1"), 400),
    "odd: request line": (odd("HELLO"), 400),
    "odd: lower case method": (odd("get /v2 HTTP/1.1"), 400),
    "odd: unknown method": (odd("FETCH /v2 HTTP/1.1"), 405),
    "odd: TRACE": (odd("TRACE /v2 HTTP/1.1"), 405),
    "odd: CONNECT": (odd("CONNECT tailor:443 HTTP/1.1"), 400),
    "odd: two hosts": (odd("GET /v2 HTTP/1.1", "Host: other"), 400),
    "odd: zero byte": (odd("GET /v2 HTTP/1.1", "X-Odd: a\0b"), 400),
    "odd: condition": (odd("GET /gateway/health HTTP/1.1", 'If-Match: "x"'), 412),
    "odd: PROXY line": (b"PROXY TCP4 10.0.0.1 10.0.0.1 1 2\r\n" + odd("GET /gateway/health HTTP/1.1"), 400),
}


def odd_answer(port: Port, name: str) -> bytes:
    with connected(port, timeout=1.5) as opened:
        opened.sendall(ODD_REQUESTS[name][0])
        return answer(opened)


def odd_status(port: Port, name: str) -> int:
    return status_of(odd_answer(port, name))


HTTP_CONNECTIONS: dict[str, tuple[Callable[[Port], int], tuple[int, ...]]] = {
    "connection: cut body": (cut_body, (0, 400)),
    "connection: garbage": (garbage, (0, 400)),
    "connection: two lengths": (two_lengths, (400,)),
    "connection: length and chunks": (length_and_chunks, (400, 411)),
    "connection: length of 8 GiB": (huge_length, (413,)),
    "connection: endless chunks": (endless_chunks, (0, 411)),
    "connection: header flood": (header_flood, (0, 400, 494)),
    **{name: (partial(odd_status, name=name), (status,)) for name, (_, status) in ODD_REQUESTS.items()},
}


def slow_headers(port: Port, seconds: float) -> float:
    """Send a header byte by byte with pauses; return the seconds until the server closes, at most `seconds`."""
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
    """Send part of a body and then nothing; return the seconds until the server closes, at most `seconds`."""
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


def http2_headers(port: Port, headers: list[tuple[str, str]]) -> dict[str, str]:
    """Send an HTTP/2 request without a body; return the headers and trailers of the response."""
    received: dict[str, str] = {}
    with http2(port) as (opened, connection):
        stream = connection.get_next_available_stream_id()
        connection.send_headers(stream, headers, end_stream=True)
        opened.sendall(connection.data_to_send())
        while data := opened.recv(65536):
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    received |= {name.decode(): value.decode() for name, value in event.headers}
                if isinstance(event, h2.events.StreamEnded):
                    return received
    raise AssertionError("closed before the end of the stream")


def rapid_reset(port: Port, streams: int = 300) -> None:
    """Open streams and reset them immediately (CVE-2023-44487), a bounded number."""
    with http2(port) as (opened, connection), contextlib.suppress(OSError, h2.exceptions.ProtocolError):
        for _ in range(streams):
            stream = connection.get_next_available_stream_id()
            connection.send_headers(stream, HEADERS)
            connection.reset_stream(stream)
            opened.sendall(connection.data_to_send())


GOAWAY = 7


def frame_types(data: bytes) -> list[int]:
    """Return the types of the complete HTTP/2 frames in `data`."""
    types, position = [], 0
    while position + 9 <= len(data):
        types.append(data[position + 3])
        position += 9 + int.from_bytes(data[position : position + 3], "big")
    return types


def resets_until_goaway(port: Port, limit: int) -> int:
    """Open and reset streams on one connection until GOAWAY; return their number, at most `limit`."""
    received = b""
    with http2(port) as (opened, connection):
        for count in range(1, limit + 1):
            stream = connection.get_next_available_stream_id()
            connection.send_headers(stream, HEADERS)
            connection.reset_stream(stream)
            opened.sendall(connection.data_to_send())
            if select.select([opened], [], [], 0)[0]:
                received += opened.recv(65536)
                if GOAWAY in frame_types(received):
                    return count
    return limit


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
    """Send CONTINUATION frames without an end of the headers (CVE-2024-27316)."""
    with http2(port) as (opened, _), contextlib.suppress(OSError):
        opened.sendall(b"\0\0\1\1\0\0\0\0\1\x82" + b"\0\0\x10\x09\0\0\0\0\1" + b"\x40\x01a\x01b" * 3 + b"\0")
        for _ in range(frames):
            opened.sendall(b"\0\0\x05\x09\0\0\0\0\1\x40\x01a\x01b")
        opened.settimeout(0.5)
        answer(opened)


def idle_streams(port: Port, streams: int = 100) -> None:
    """Open streams that send headers but no message."""
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
    "http/2: not HTTP/2": not_http2,
}
