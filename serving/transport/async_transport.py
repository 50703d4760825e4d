"""The asyncio transport: the calls and errors of sync_transport over aiohttp and grpc.aio."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import tenacity

from serving.shared.errors import InputError
from serving.transport.connection import CONNECT_TIMEOUT, RESPONSE_BYTES, Connection
from serving.transport.failures import (
    check_http_status,
    deadline_exceeded,
    decode_response,
    grpc_error,
    tls_error,
    unreachable,
)
from serving.transport.messages import SERVICE, Call
from serving.transport.retries import Deadline, Retries
from serving.transport.sync_transport import check_open


class AsyncTransport:
    """Connections to one Triton server, opened at the first call and bound to its event loop. Errors: as Transport."""

    def __init__(self, connection: Connection, retries: Retries) -> None:
        self.url = connection.url
        self._retries = retries
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._wire = (AsyncHttpWire if connection.protocol == "http" else AsyncGrpcWire)(connection)

    async def send(self, call: Call, deadline: Deadline) -> Any:
        """Send a call and return its response. Raises InputError after `close` and in a second event loop."""
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            raise InputError(f"the client of {self.url} was used in another event loop; make a client in each loop")
        self._loop = loop
        return await tenacity.AsyncRetrying(**self._retries.policy(deadline))(self._send_once, call, deadline)

    async def close(self) -> None:
        """Close the connections; open connections would delay the server's shutdown."""
        self._closed = True
        await self._wire.close()

    async def _send_once(self, call: Call, deadline: Deadline) -> Any:
        check_open(self.url, self._closed)  # at each attempt: another task may close the client between two
        return await self._wire.send_once(call, deadline)


class AsyncHttpWire:
    """HTTP/1.1 with keep-alive connections (aiohttp)."""

    def __init__(self, connection: Connection) -> None:
        import aiohttp  # here, because send_once runs within the deadline of a request

        self._aiohttp = aiohttp
        self._connection = connection
        self._context = connection.ssl_context()
        self._session: Any = None

    async def send_once(self, call: Call, deadline: Deadline) -> Any:
        from yarl import URL

        aiohttp, connection, url = self._aiohttp, self._connection, self._connection.url
        if self._session is None:
            # limit=0: the client already limits the requests in flight. Cookies of a server are ignored.
            connector = aiohttp.TCPConnector(limit=0, ssl=self._context if self._context else True)
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
            )
        request, remaining = call.http, deadline.remaining(url)
        scheme = "https" if connection.secure else "http"
        target = URL(f"{scheme}://{connection.address}{connection.path}{request.path}", encoded=True)
        try:
            async with self._session.request(
                request.method,
                target,
                data=request.body,
                headers={**connection.headers, **request.headers, "accept-encoding": "identity"},
                timeout=aiohttp.ClientTimeout(total=remaining, sock_connect=min(remaining, CONNECT_TIMEOUT)),
                allow_redirects=False,
            ) as response:
                body = await _read_body(response)
                headers = {name.lower(): value for name, value in response.headers.items()}
                status = response.status
        except aiohttp.ClientSSLError as error:
            raise tls_error(url, error) from error
        except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError) as error:
            if deadline.passed():
                raise deadline_exceeded(url, deadline.budget) from error
            raise unreachable(url) from error
        check_http_status(url, status, headers, body, deadline.budget)
        return decode_response(url, call.read_http, headers, body)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


class AsyncGrpcWire:
    """gRPC on one channel (grpc.aio)."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        connection.grpc_credentials()  # an invalid PEM file fails here and not at the first request
        self._metadata = tuple(connection.headers.items())
        self._channel: Any = None

    async def send_once(self, call: Call, deadline: Deadline) -> Any:
        import grpc

        url = self._connection.url
        if self._channel is None:
            self._channel = self._connection.grpc_channel(asynchronous=True)  # belongs to the running event loop
        try:
            method = self._channel.unary_unary(SERVICE + call.rpc)
            data = await method(call.message, timeout=deadline.remaining(url), metadata=self._metadata)
        except grpc.RpcError as error:
            raise grpc_error(url, error, deadline.budget) from error
        return decode_response(url, call.read_message, data)

    async def close(self) -> None:
        if self._channel is not None:
            with suppress(ValueError):
                await self._channel.close()


async def _read_body(response: Any) -> bytes:
    """Read the whole body; stop after RESPONSE_BYTES and close the connection."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > RESPONSE_BYTES:
            response.close()
            break
    return bytes(body)
