"""Lifetime of clients: one-line errors after `close` and for an AsyncClient in a second event loop, both protocols."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from serving.client.async_client import AsyncClient
from serving.client.sync_client import Client
from serving.shared.errors import InputError, ServingError
from serving.transport.retries import Retries
from tests.support.faulty_server import FaultyGrpc, FaultyHttp, answers, grpc_server

IMAGE = np.zeros((16, 16, 3), np.uint8)
URLS = ("http://127.0.0.1:9", "grpc://127.0.0.1:9")


@pytest.mark.parametrize("url", URLS)
def test_a_closed_client_raises_an_error_without_a_request(url: str) -> None:
    client = Client(url)
    client.close()
    client.close()
    for method in (
        lambda: client.predict([IMAGE]),
        client.status,
        client.class_names,
        lambda: list(client.stream([IMAGE])),
    ):
        with pytest.raises(InputError, match=f"the client of {url} is closed; make a new one"):
            method()


@pytest.mark.parametrize("url", URLS)
def test_a_closed_async_client_raises_an_error(url: str) -> None:
    async def use() -> None:
        client = AsyncClient(url)
        await client.close()
        with pytest.raises(InputError, match="is closed; make a new one"):
            await client.predict([IMAGE])

    asyncio.run(use())


# A wait of up to 0.5 s between two attempts, in which the client is closed.
SLOW_RETRIES = Retries(attempts=100, first_wait=0.5, longest_wait=0.5)


@pytest.fixture(params=["http", "grpc"])
def unavailable(request: pytest.FixtureRequest) -> Iterator[tuple[str, list]]:
    """The URL of a server that is not available, and the list of its received requests."""
    if request.param == "http":
        with FaultyHttp(None, [answers("503 Service Unavailable")], forever=True) as server:
            yield server.url, server.requests
    else:
        handler = FaultyGrpc(None, [grpc.StatusCode.UNAVAILABLE] * 100)
        with grpc_server(handler) as url:
            yield url, handler.calls


def test_close_ends_the_retries_of_a_running_call(unavailable: tuple[str, list]) -> None:
    url, requests = unavailable
    client = Client(url, retries=SLOW_RETRIES, timeout=20.0)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.status)
        while not requests:
            time.sleep(0.01)
        time.sleep(0.1)
        client.close()
        with pytest.raises(InputError, match="is closed; make a new one"):
            running.result(10)


def test_close_ends_the_retries_of_a_running_async_call(unavailable: tuple[str, list]) -> None:
    url, requests = unavailable

    async def use() -> None:
        client = AsyncClient(url, retries=SLOW_RETRIES, timeout=20.0)
        running = asyncio.create_task(client.status())
        while not requests:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await client.close()
        with pytest.raises(InputError, match="is closed; make a new one"):
            await running

    asyncio.run(use())


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_second_event_loop_raises_an_error(protocol: str) -> None:
    with FaultyHttp(None, [answers("400 Bad Request", b'{"error": "no"}')], forever=True) as server:
        client = AsyncClient(f"{protocol}://127.0.0.1:{server.port}", timeout=2.0)
        with pytest.raises(ServingError):
            asyncio.run(client.status())
        with pytest.raises(InputError, match="was used in another event loop; make a client in each loop"):
            asyncio.run(client.status())
