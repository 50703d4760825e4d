"""The synchronous client: classify images under a prior and return typed predictions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from serving.client.class_maps import Segmentation
from serving.client.extras import Extras
from serving.client.images import ImageLike, encode_images, read_image
from serving.client.options import BATCH, DEFAULT_URLS, ClientBase, encode_group, groups
from serving.client.predictions import ModelStatus, Prediction, Status
from serving.client.priors import Prior, parse_prior
from serving.client.requests import REQUEST_BYTES, Exchange
from serving.shared.errors import ServingError
from serving.transport.messages import Call, Infer
from serving.transport.retries import Deadline
from serving.transport.sync_transport import Transport

__all__ = ["DEFAULT_URLS", "REQUEST_BYTES", "Client", "ModelStatus", "Prediction", "Status", "read_image"]
Result = TypeVar("Result")


class Client(ClientBase):
    """Sends requests to a Tailor server over HTTP or gRPC. A context manager.

    Threads may share a client and its connections; a forked process needs a new client. Options: see ClientBase.
    """

    def __init__(self, url: str = DEFAULT_URLS["http"], timeout: float = 60.0, **options: Any) -> None:
        super().__init__(url, timeout, **options)
        self._transport = Transport(self._connection, timeout, self._retries)

    def predict(
        self,
        images: Sequence[ImageLike],
        prior: Prior = None,
        *,
        extras: Extras | None = None,
        version: int | None = None,
        timeout: float | None = None,
        check: bool = True,
    ) -> list[Prediction]:
        """Classify images under one prior; return one Prediction per image, in order.

        images: files, encoded bytes, Pillow images or numpy arrays (uint8 [H,W,3] or [H,W]), or one array [N,H,W,3].
        prior: `balanced`, `train`, `live` (the estimate of `tailor drift --write`), a strength, or a target prior as
        vector, mapping or file; None is the server's default. extras: further parts of the answers. version: the model
        version; None is the newest.
        timeout: seconds for the whole call including retries; None is the client's timeout. check: decode every image
        before the first request; False skips that, and the server detects damaged images. Images beyond one request's
        limits are split into several requests, `concurrency` in parallel. Raises InputError naming the image or the
        prior, and ServingError when the server is unreachable, rejects the request or exceeds the deadline.
        """
        deadline = self._deadline(timeout)
        parse_prior(prior)
        encoded = encode_images(images, check)
        return self._run(self._sequence.predict(encoded, prior, version, extras), deadline)

    def segment(
        self,
        images: Sequence[ImageLike],
        prior: Prior = None,
        *,
        version: int | None = None,
        timeout: float | None = None,
        check: bool = True,
    ) -> list[Segmentation]:
        """Return the class map of each image under one prior, in order, from a server of task segmentation.

        Arguments and errors: see predict.
        """
        deadline = self._deadline(timeout)
        parse_prior(prior)
        encoded = encode_images(images, check)
        return self._run(self._sequence.segment(encoded, prior, version), deadline)

    def stream(
        self,
        images: Iterable[ImageLike],
        prior: Prior = None,
        *,
        extras: Extras | None = None,
        version: int | None = None,
        batch: int = BATCH,
        check: bool = True,
        keep_going: bool = False,
    ) -> Iterator[Prediction | ServingError]:
        """Classify a stream of images of any length, in order, with few of them in memory.

        Up to `concurrency` requests of up to `batch` images are in flight, each with the client's timeout. keep_going:
        yield the error of a failed image in its position and continue; otherwise raise it. Other arguments: see
        predict.
        """
        parse_prior(prior)

        def predict_group(group: Sequence[tuple[int, ImageLike]]) -> list[Prediction | ServingError]:
            deadline = self._deadline()
            encoded = encode_group(group, check, keep_going)
            sequence = self._sequence.predict_each(encoded, prior, version, keep_going, extras)
            return self._run(sequence, deadline)

        waiting: deque[Future[list[Prediction | ServingError]]] = deque()
        pool = ThreadPoolExecutor(self._concurrency, "tailor-client")
        try:
            for group in groups(images, batch):
                waiting.append(pool.submit(predict_group, group))
                if len(waiting) > self._concurrency:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def request(self, encoded: Sequence[bytes], prior: Prior = None, *, version: int | None = None) -> Infer:
        """Build the request that predict would send for encoded images of one batch, for another sender (load test)."""
        return self._run(self._sequence.request(encoded, prior, version), self._deadline())

    def class_names(self) -> list[str]:
        """Return the server's class names by index, from the labels of `student`; requested once per release."""
        return self._run(self._sequence.class_names(), self._deadline())

    def status(self) -> Status:
        """Return the state and versions of the server and its models. Raises ServingError when no server responds."""
        return self._run(self._sequence.status(), self._deadline())

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _run(self, exchange: Exchange[Result], deadline: Deadline) -> Result:
        """Run a request sequence: send the calls that it yields, and pass their responses or error back to it."""
        outcome: Any = None  # starts the sequence
        try:
            while True:
                calls = exchange.throw(outcome) if isinstance(outcome, ServingError) else exchange.send(outcome)
                try:
                    outcome = self._send(calls, deadline)
                except ServingError as error:
                    outcome = error
        except StopIteration as done:
            result: Result = done.value
            return result

    def _send(self, calls: Sequence[Call], deadline: Deadline) -> list[Any]:
        if len(calls) == 1:
            return [self._transport.send(calls[0], deadline)]
        pool = ThreadPoolExecutor(min(self._concurrency, len(calls)), "tailor-client")
        try:
            return list(pool.map(lambda call: self._transport.send(call, deadline), calls))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
