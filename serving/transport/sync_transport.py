"""The synchronous transport: send a call to Triton over HTTP or gRPC, return its response, raise one-line errors."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import tenacity

from serving.shared.errors import InputError
from serving.transport.connection import CONNECT_TIMEOUT, RESPONSE_BYTES, Connection, parse_url
from serving.transport.failures import (
    RequestRejected,
    check_http_status,
    deadline_exceeded,
    decode_response,
    grpc_error,
    tls_error,
    unreachable,
)
from serving.transport.http_deadline import timed_connection
from serving.transport.messages import SERVICE, Call, Infer
from serving.transport.retries import Deadline, Retries

__all__ = ["RequestRejected", "Transport", "parse_url"]
POOL_SIZE = 256  # idle HTTP connections in the pool; further connections are closed after use


class Transport:
    """Connections to one Triton server, opened at the first call and kept. Thread-safe; not usable after a fork.

    connection: a URL, or a Connection with TLS and headers. timeout: seconds for a call with all its retries, unless
    the call has its own deadline. The methods raise RequestRejected, Unavailable or DeadlineExceeded.
    """

    def __init__(self, connection: Connection | str, timeout: float, retries: Retries | None = None) -> None:
        self.connection = Connection(connection) if isinstance(connection, str) else connection
        self.url = self.connection.url
        self.timeout = Deadline(timeout).budget
        self.retries = retries or Retries()
        self._closed = False
        self._wire = (HttpWire if self.connection.protocol == "http" else GrpcWire)(self.connection)

    def send(self, call: Call, deadline: Deadline | None = None) -> Any:
        """Send a call and return its response; safe retries until the deadline. Raises InputError after `close`."""
        deadline = deadline or Deadline(self.timeout)
        return tenacity.Retrying(**self.retries.policy(deadline))(self._send_once, call, deadline)

    def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, int], version: str = ""
    ) -> tuple[dict[str, np.ndarray], int]:
        """Run one inference (see messages.Infer); return the outputs by name and the model version."""
        answer = self.send(Infer(model, inputs, outputs, version))
        return answer.outputs, answer.version

    def close(self) -> None:
        """Close the connections; open connections would delay the server's shutdown."""
        self._closed = True
        self._wire.close()

    def _send_once(self, call: Call, deadline: Deadline) -> Any:
        check_open(self.url, self._closed)  # at each attempt: another thread may close the client between two
        return self._wire.send_once(call, deadline)


def check_open(url: str, closed: bool) -> None:
    """Raise InputError for a closed client."""
    if closed:
        raise InputError(f"the client of {url} is closed; make a new one")


class HttpWire:
    """HTTP/1.1 with keep-alive connections (urllib3). `send_once` does not retry; it is thread-safe."""

    def __init__(self, connection: Connection) -> None:
        import urllib3

        self._connection = connection
        self._errors, self._timeout = urllib3.exceptions, urllib3.Timeout
        # Deadline of the current call per thread, read by the thread's connection.
        current = self._current = threading.local()
        pool: Any = urllib3.HTTPSConnectionPool if connection.secure else urllib3.HTTPConnectionPool
        tls = {"ssl_context": connection.ssl_context()} if connection.secure else {}
        self._pool = pool(connection.host, connection.port, maxsize=POOL_SIZE, **tls)
        self._pool.ConnectionCls = timed_connection(
            connection.secure, lambda: current.deadline.remaining(connection.url)
        )

    def send_once(self, call: Call, deadline: Deadline) -> Any:
        url, errors = self._connection.url, self._errors
        request, remaining = call.http, deadline.remaining(self._connection.url)
        self._current.deadline = deadline
        try:
            response = self._pool.urlopen(
                request.method,
                self._connection.path + request.path,
                request.body,
                {**self._connection.headers, **request.headers},
                timeout=self._timeout(connect=min(remaining, CONNECT_TIMEOUT), read=remaining),
                retries=False,
                redirect=False,
                assert_same_host=False,
                preload_content=False,
                decode_content=False,
            )
            body = self._read_body(response)
        except errors.SSLError as error:
            raise tls_error(url, error) from error
        except (errors.HTTPError, OSError) as error:
            if deadline.passed():
                raise deadline_exceeded(url, deadline.budget) from error
            raise unreachable(url) from error
        headers = {name.lower(): value for name, value in response.headers.items()}
        check_http_status(url, response.status, headers, body, deadline.budget)
        return decode_response(url, call.read_http, headers, body)

    def close(self) -> None:
        self._pool.close()

    def _read_body(self, response: Any) -> bytes:
        """Read the whole body and return the connection to the pool; a body above RESPONSE_BYTES is truncated."""
        body = response.read(RESPONSE_BYTES + 1)
        if len(body) > RESPONSE_BYTES:
            response.close()
        response.release_conn()
        return body


class GrpcWire:
    """gRPC on one channel. `send_once` does not retry; it is thread-safe."""

    def __init__(self, connection: Connection) -> None:
        import grpc

        self._connection = connection
        self._error = grpc.RpcError
        self._channel = connection.grpc_channel()
        self._metadata = tuple(connection.headers.items())

    def send_once(self, call: Call, deadline: Deadline) -> Any:
        url = self._connection.url
        # No deserializer: gRPC returns bytes, and does not log an error for a response that is not Triton's.
        method = self._channel.unary_unary(SERVICE + call.rpc)
        try:
            data = method(call.message, timeout=deadline.remaining(url), metadata=self._metadata)
        except self._error as error:
            raise grpc_error(url, error, deadline.budget) from error
        return decode_response(url, call.read_message, data)

    def close(self) -> None:
        with suppress(ValueError):  # closed already
            self._channel.close()
