"""Lifetime of clients: one-line errors after `close` and for an AsyncClient in a second event loop, both protocols."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from serving.client.async_client import AsyncClient
from serving.client.sync_client import Client
from serving.shared.errors import InputError, ServingError
from tests.support.faulty_server import FaultyHttp, answers

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


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_second_event_loop_raises_an_error(protocol: str) -> None:
    with FaultyHttp(None, [answers("400 Bad Request", b'{"error": "no"}')], forever=True) as server:
        client = AsyncClient(f"{protocol}://127.0.0.1:{server.port}", timeout=2.0)
        with pytest.raises(ServingError):
            asyncio.run(client.status())
        with pytest.raises(InputError, match="was used in another event loop; make a client in each loop"):
            asyncio.run(client.status())
