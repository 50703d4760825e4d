"""Thousands of connections from one address that never send a request."""

from __future__ import annotations

import contextlib
import resource
import selectors
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # with an empty SETTINGS frame


def client_hello() -> bytes:
    """Return the first message of a TLS handshake."""
    context, outgoing = ssl.create_default_context(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


# Port (HTTP or gRPC), TLS, and the bytes that each connection sends before it stays silent.
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
def crowd(port: int, first_bytes: bytes, connections: int, source: str) -> Iterator[None]:
    """Keep connections from one address open that send their first bytes and then nothing; replace closed ones."""
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
