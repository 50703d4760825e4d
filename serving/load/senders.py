"""Who sends a prepared request and reads no more of the answer than it must: the version that answered."""

from __future__ import annotations

import json
from http.client import HTTPException
from typing import Any, Protocol

from serving.calls import HEADER_LENGTH, SERVICE, Infer
from serving.connection import CONNECT_TIMEOUT, GRPC_OPTIONS, Connection

CONNECTIONS = 4096  # more than a process has users or arrivals in flight


class Failed(Exception):
    """A request of the test was not answered with a prediction."""


class Sender(Protocol):
    """Sends for all users of a process. kind: what reports call it."""

    kind: str

    def send(self, call: Infer) -> tuple[int, int]:
        """The version that answered, and the answer's bytes. Raises Failed."""

    def close(self) -> None: ...


class HttpSender:
    """HTTP in Triton's binary form over kept connections, as many as are needed at once (geventhttpclient)."""

    kind = "HTTP"

    def __init__(self, connection: Connection, timeout: float) -> None:
        from geventhttpclient import HTTPClient

        self._path, self._headers = connection.path, dict(connection.headers)
        tls: dict[str, Any] = {"ssl": True, "ssl_context_factory": connection.ssl_context} if connection.secure else {}
        self._client = HTTPClient(
            connection.host,
            connection.port,
            connection_timeout=min(timeout, CONNECT_TIMEOUT),
            network_timeout=timeout,
            concurrency=CONNECTIONS,
            **tls,
        )

    def send(self, call: Infer) -> tuple[int, int]:
        request = call.http
        headers = {**self._headers, **request.headers}
        try:
            response = self._client.post(self._path + request.path, body=request.body, headers=headers)
            body = bytes(response.read())
        except (OSError, HTTPException) as error:
            raise Failed(f"{type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise Failed(f"HTTP {response.status_code}: {_shown(body)}")
        try:
            length = response.get(HEADER_LENGTH)
            return int(json.loads(body[: int(length)] if length else body)["model_version"]), len(body)
        except (ValueError, KeyError, TypeError):
            raise Failed(f"the answer is not Triton's: {_shown(body)}") from None

    def close(self) -> None:
        self._client.close()


class GrpcSender:
    """gRPC over one channel. In a gevent process grpc.experimental.gevent.init_gevent() must have been called before."""

    kind = "gRPC"

    def __init__(self, connection: Connection, timeout: float) -> None:
        import grpc

        self._timeout, self._metadata, self._error = timeout, tuple(connection.headers.items()), grpc.RpcError
        credentials = connection.grpc_credentials()
        if credentials is None:
            self._channel = grpc.insecure_channel(connection.address, options=GRPC_OPTIONS)
        else:
            self._channel = grpc.secure_channel(connection.address, credentials, options=GRPC_OPTIONS)
        self._method = self._channel.unary_unary(SERVICE + Infer.rpc)

    def send(self, call: Infer) -> tuple[int, int]:
        from tritonclient.grpc.service_pb2 import ModelInferResponse

        try:
            data = self._method(call.message, timeout=self._timeout, metadata=self._metadata)
        except self._error as error:
            raise Failed(f"{error.code().name}: {_shown((error.details() or '').encode())}") from None
        return int(ModelInferResponse.FromString(data).model_version), len(data)

    def close(self) -> None:
        self._channel.close()


def make_sender(connection: Connection, timeout: float) -> Sender:
    """The sender that the address asks for."""
    return (HttpSender if connection.protocol == "http" else GrpcSender)(connection, timeout)


def _shown(body: bytes) -> str:
    """The beginning of an answer on one line; reports group failures by it."""
    return " ".join(body[:200].decode("utf-8", "replace").split())
