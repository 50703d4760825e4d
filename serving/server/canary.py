"""Health checks of a running server: golden requests, and whether a failed one shows a hanging or only a busy server."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from functools import partial

import psutil
import urllib3

from serving.client.sync_client import Client
from serving.golden.requests import ask_student, check_golden
from serving.server.leftovers import stubs_of
from serving.server.triton_server import TritonServer
from serving.shared.errors import ServingError
from serving.shared.names import CLASSIFIER, STUDENT
from serving.transport.failures import DeadlineExceeded, Refused

# Of a core, below which a stub is at rest: its threads look round once a second, which takes up to 0.0005. A classifier
# that waits for a slow student does little more than to decode.
IDLE_SHARE = 0.005
TICKS = 0.02  # seconds: two of the clock's, the least that counts as work
METRICS_TIMEOUT = 5.0  # seconds
# Triton's error where an inference process (Triton's stub), named by model and instance, does not react for a second.
UNHEALTHY = re.compile(r"Stub process '(\w+)_\d+_\d+' is not healthy")


class Hanging(ServingError):
    """An inference process does not work: Triton reports it, or a request timed out and the process used no CPU time.

    models: those whose processes may be the cause, in the order in which they are loaded.
    """

    def __init__(self, message: str, *models: str) -> None:
        super().__init__(message)
        self.models = list(models or (STUDENT, CLASSIFIER))


class Busy(ServingError):
    """A request was not answered in time, but others were, and every stub of the model that was asked worked on them."""


class Canary:
    """Asks a server its golden requests. timeout: seconds that each may take."""

    def __init__(self, server: TritonServer, timeout: float) -> None:
        self.server = server
        self.timeout = timeout

    def backend_failures(self) -> float:
        """How many requests Triton has failed because of an inference process; bad requests are not counted."""
        return self._counted("failure", 'reason="BACKEND"')

    def ask(self) -> None:
        """Ask both models of every release: a small network is asked nothing by its classifier.

        Raises Hanging or Busy, and ServingError when an answer is wrong or its absence has another cause.
        """
        busy = None
        with Client(self.server.http_url, timeout=self.timeout) as client:
            for model, version, question in self._questions(client):
                try:
                    self._judged(model, version, question)
                except Busy as error:  # says nothing of the other model
                    busy = error
        if busy:
            raise busy

    def _questions(self, client: Client) -> list[tuple[str, int, Callable[[], None]]]:
        releases, url = self.server.releases, self.server.http_url
        return [
            *((CLASSIFIER, release.version, partial(check_golden, client, release)) for release in releases),
            *((STUDENT, release.version, partial(ask_student, url, release, self.timeout)) for release in releases),
        ]

    def _judged(self, model: str, version: int, question: Callable[[], None]) -> None:
        """Ask one model, and judge by its own stubs alone: those of another model or version may have nothing to do.

        While requests wait for a model, each of its stubs has one. A stub that hangs keeps the request it was given and
        gets no other: asked once more, the others would answer, and nobody would notice that they are fewer.
        """
        worked, answered, began = (
            self._processor_seconds(model, version),
            self._answered(model, version),
            time.monotonic(),
        )
        try:
            question()
        except DeadlineExceeded as error:
            now, seconds = self._processor_seconds(model, version), time.monotonic() - began
            work = [now[stub] - had for stub, had in worked.items() if stub in now]
            if any(done < max(IDLE_SHARE * seconds, TICKS) for done in work):
                raise Hanging(f"{error}, though a stub was at rest") from error
            others = self._answered(model, version) - answered
            if work and others > 0:
                raise Busy(f"{model} {version} is overloaded: {others:.0f} requests answered, but {error}") from error
            raise
        except Refused as error:
            if unhealthy := UNHEALTHY.search(str(error)):
                raise Hanging(str(error), unhealthy[1]) from error
            raise

    def _processor_seconds(self, model: str, version: int) -> dict[int, float]:
        """Processor time so far of a version's stubs, by process id."""
        found = {}
        for stub, *place in stubs_of(self.server.prefix):
            with contextlib.suppress(psutil.NoSuchProcess):
                if place == [model, version]:
                    found[stub.pid] = sum(stub.cpu_times()[:2])
        return found

    def _answered(self, model: str, version: int) -> float:
        """How many requests Triton counts as answered by a version so far."""
        return self._counted("success", f'model="{model}"', f'version="{version}"')

    def _counted(self, result: str, *labels: str) -> float:
        """Triton's number of requests with this result and these labels so far; 0 where the metrics are unavailable."""
        try:
            with urllib3.PoolManager(
                timeout=METRICS_TIMEOUT, retries=False
            ) as pool:  # an open connection holds a stop up
                shown = pool.request("GET", self.server.metrics_url).data.decode()
        except (urllib3.exceptions.HTTPError, UnicodeDecodeError):
            return 0.0
        counted = re.findall(rf"^nv_inference_request_{result}\{{(.+)\}} (\S+)$", shown, re.MULTILINE)
        return sum(float(value) for present, value in counted if set(labels) <= set(present.split(",")))
