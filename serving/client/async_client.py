"""The asyncio client: the same methods as serving.client.sync_client, awaited."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, TypeVar

from serving.client.class_maps import Segmentation
from serving.client.extras import Extras
from serving.client.images import ImageLike, encode_images
from serving.client.options import BATCH, DEFAULT_URLS, ClientBase, encode_group, groups
from serving.client.predictions import Prediction, Status
from serving.client.priors import Prior, parse_prior
from serving.client.requests import Exchange
from serving.shared.errors import ServingError
from serving.transport.async_transport import AsyncTransport
from serving.transport.messages import Call
from serving.transport.retries import Deadline

Result = TypeVar("Result")


class AsyncClient(ClientBase):
    """Sends requests to a Tailor server over HTTP or gRPC from asyncio. An async context manager.

    Tasks of one event loop may share a client; the first call binds the client to the running loop. Images are read and
    checked in a thread, which keeps the loop free. Options: see ClientBase.
    """

    def __init__(self, url: str = DEFAULT_URLS["http"], timeout: float = 60.0, **options: Any) -> None:
        super().__init__(url, timeout, **options)
        self._transport = AsyncTransport(self._connection, self._retries)

    async def predict(
        self,
        images: Sequence[ImageLike],
        prior: Prior = None,
        *,
        extras: Extras | None = None,
        version: int | None = None,
        timeout: float | None = None,
        check: bool = True,
    ) -> list[Prediction]:
        """Classify images under one prior; return one Prediction per image, in order. Arguments: see Client.predict."""
        deadline = self._deadline(timeout)
        parse_prior(prior)
        encoded = await asyncio.to_thread(encode_images, images, check)
        return await self._run(self._sequence.predict(encoded, prior, version, extras), deadline)

    async def segment(
        self,
        images: Sequence[ImageLike],
        prior: Prior = None,
        *,
        version: int | None = None,
        timeout: float | None = None,
        check: bool = True,
    ) -> list[Segmentation]:
        """Return the class map of each image under one prior, in order. Arguments: see Client.segment."""
        deadline = self._deadline(timeout)
        parse_prior(prior)
        encoded = await asyncio.to_thread(encode_images, images, check)
        return await self._run(self._sequence.segment(encoded, prior, version), deadline)

    async def stream(
        self,
        images: Iterable[ImageLike],
        prior: Prior = None,
        *,
        extras: Extras | None = None,
        version: int | None = None,
        batch: int = BATCH,
        check: bool = True,
        keep_going: bool = False,
    ) -> AsyncIterator[Prediction | ServingError]:
        """Classify a stream of images in order, with few of them in memory. Arguments: see Client.stream."""
        parse_prior(prior)

        async def predict_group(group: Sequence[tuple[int, ImageLike]]) -> list[Prediction | ServingError]:
            deadline = self._deadline()
            encoded = await asyncio.to_thread(encode_group, group, check, keep_going)
            sequence = self._sequence.predict_each(encoded, prior, version, keep_going, extras)
            return await self._run(sequence, deadline)

        waiting: deque[asyncio.Task[list[Prediction | ServingError]]] = deque()
        try:
            for group in groups(images, batch):
                waiting.append(asyncio.create_task(predict_group(group)))
                if len(waiting) > self._concurrency:
                    for prediction in await waiting.popleft():
                        yield prediction
            while waiting:
                for prediction in await waiting.popleft():
                    yield prediction
        finally:
            await _cancel(waiting)

    async def class_names(self) -> list[str]:
        """Return the server's class names by index, from the labels of `student`; requested once per release."""
        return await self._run(self._sequence.class_names(), self._deadline())

    async def status(self) -> Status:
        """Return the state and versions of the server and its models. Raises ServingError when no server responds."""
        return await self._run(self._sequence.status(), self._deadline())

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    async def _run(self, exchange: Exchange[Result], deadline: Deadline) -> Result:
        """Run a request sequence: send the calls that it yields, and pass their responses or error back to it."""
        outcome: Any = None  # starts the sequence
        try:
            while True:
                calls = exchange.throw(outcome) if isinstance(outcome, ServingError) else exchange.send(outcome)
                try:
                    outcome = await self._send(calls, deadline)
                except ServingError as error:
                    outcome = error
        except StopIteration as done:
            result: Result = done.value
            return result

    async def _send(self, calls: Sequence[Call], deadline: Deadline) -> list[Any]:
        limit = asyncio.Semaphore(self._concurrency)

        async def send(call: Call) -> Any:
            async with limit:
                return await self._transport.send(call, deadline)

        tasks = [asyncio.create_task(send(call)) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel the running tasks and await them, so that asyncio does not log "exception was never retrieved"."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
