"""The least that a client can be: prepared bytes out, answers counted. What Locust costs is measured against it.

    python -m serving.load.bare --host http://127.0.0.1:8000 --images photos --users 16 --seconds 3

Prints one line of JSON: requests answered, seconds, processor seconds. The first failure ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import selectors
import socket
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from serving.calls import SERVICE, Infer
from serving.client import Client
from serving.connection import GRPC_OPTIONS, Connection
from serving.errors import InputError, ServingError
from serving.load.mix import ADJUSTED, BALANCED, make_mix
from serving.load.plan import HEADERS_VARIABLE
from serving.terminal import print

PATIENCE = 10.0  # seconds without an answer


def http_loop(connection: Connection, calls: Iterator[Infer], users: int, seconds: float) -> int:
    """Keep `users` connections busy for `seconds`; returns the requests that were answered. No TLS."""
    heads: dict[int, bytes] = {}

    def request() -> bytes:
        call = next(calls)
        if id(call) not in heads:
            asked = call.http
            headers = {**connection.headers, **asked.headers, "host": connection.address}
            headers["content-length"] = str(len(asked.body or b""))
            lines = [f"POST {connection.path}{asked.path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
            heads[id(call)] = "\r\n".join(lines).encode() + (asked.body or b"")
        return heads[id(call)]

    selector = selectors.DefaultSelector()
    for _ in range(users):
        sock = socket.create_connection((connection.host, connection.port), timeout=PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(sock, selectors.EVENT_READ, bytearray())
        sock.sendall(request())
    answered, ends = 0, time.perf_counter() + seconds
    while time.perf_counter() < ends:
        ready = selector.select(PATIENCE)
        if not ready:
            raise ServingError(f"{connection.url} did not answer within {PATIENCE:g} s")
        for key, _ in ready:
            data = key.fileobj.recv(65536)  # type: ignore[union-attr]
            if not data:
                raise ServingError(f"{connection.url} closed a connection")
            key.data.extend(data)
            if _whole(key.data, connection.url):
                key.data.clear()
                answered += 1
                key.fileobj.sendall(request())  # type: ignore[union-attr]
    for key in list(selector.get_map().values()):
        key.fileobj.close()  # type: ignore[union-attr]
    return answered


def grpc_loop(connection: Connection, calls: Iterator[Infer], users: int, seconds: float) -> int:
    """Keep `users` calls in flight for `seconds`; returns the requests that were answered."""
    import grpc

    credentials = connection.grpc_credentials()
    if credentials is None:
        channel = grpc.insecure_channel(connection.address, options=GRPC_OPTIONS)
    else:
        channel = grpc.secure_channel(connection.address, credentials, options=GRPC_OPTIONS)
    with channel:
        method = channel.unary_unary(SERVICE + Infer.rpc)
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def send() -> None:
            future = method.future(next(calls).message, timeout=PATIENCE, metadata=tuple(connection.headers.items()))
            future.add_done_callback(done.put)

        for _ in range(users):
            send()
        answered, ends = 0, time.perf_counter() + seconds
        while time.perf_counter() < ends:
            future = done.get(timeout=2 * PATIENCE)
            if future.code() is not grpc.StatusCode.OK:
                raise ServingError(f"{connection.url} refused: {future.details()}")
            answered += 1
            send()
    return answered


def main(arguments: list[str] | None = None) -> int:
    """Run one loop; an error is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m serving.load.bare", description="A bare client loop.")
    parser.add_argument("--host", required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--prior", default="train")
    parser.add_argument("--adjusted-share", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--ca-file", type=Path, default=None)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args(arguments)
    try:
        headers = json.loads(os.environ.get(HEADERS_VARIABLE, "{}"))
        connection = Connection(options.host, headers, options.ca_file)
        if connection.secure and connection.protocol == "http":
            raise InputError(f"--host is {options.host}; the bare HTTP loop speaks no TLS")
        with Client(options.host, headers=headers, ca_file=options.ca_file) as client:
            mix = make_mix(client, options.images, options.prior, options.adjusted_share, options.batch)
        loop: Callable[..., int] = http_loop if connection.protocol == "http" else grpc_loop
        calls = cycle([call for label in (BALANCED, ADJUSTED) for call in mix.requests[label]])
        began, used = time.perf_counter(), time.process_time()
        answered = loop(connection, calls, options.users, options.seconds)
        seconds, processor = time.perf_counter() - began, time.process_time() - used
    except ServingError as error:
        print(f"bare client: {error}", file=sys.stderr)
        return error.exit_code
    except (OSError, queue.Empty) as error:
        print(f"bare client: {options.host}: {error or 'no answer'}", file=sys.stderr)
        return 1
    print(json.dumps({"requests": answered, "seconds": seconds, "processor_seconds": processor}))
    return 0


def _whole(answer: bytearray, url: str) -> bool:
    """Whether an HTTP answer has come in whole. Raises ServingError when it is not a 200."""
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return False
    if not answer.startswith(b"HTTP/1.1 200"):
        status = answer.partition(b"\r")[0].decode("latin-1")
        raise ServingError(f"{url} refused: {status}")
    place = answer.lower().find(b"content-length:", 0, end)
    if place < 0:
        raise ServingError(f"{url}: an answer without Content-Length")
    return len(answer) >= end + 4 + int(answer[place + 15 : answer.find(b"\r", place)])


if __name__ == "__main__":
    sys.exit(main())
