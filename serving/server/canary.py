"""Health check of a running server: send golden requests; after a failure detect whether it hangs or is overloaded."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from functools import partial

import psutil
import urllib3

from serving.client.sync_client import Client
from serving.golden.requests import check_golden, check_student
from serving.server.leftovers import inference_processes
from serving.server.triton_server import TritonServer
from serving.shared.errors import ServingError
from serving.shared.names import STUDENT, models_of
from serving.transport.failures import DeadlineExceeded, ProcessUnhealthy
from serving.transport.retries import Retries

# An inference process that uses less than this share of a core is idle. Its threads wake once a second, which takes up
# to 0.0005 of a core. A classifier that waits for a slow student uses little more than decoding takes.
IDLE_SHARE = 0.005
TICKS = 0.02  # seconds: two clock ticks, the least CPU time that counts as work
METRICS_TIMEOUT = 5.0  # seconds
RETRIES = Retries(unhealthy=False)
# Triton's error when an inference process (its stub), named by model and instance, does not react for a second.
UNHEALTHY = re.compile(r"Stub process '(\w+)_\d+_\d+' is not healthy")


class ProcessHangs(ServingError):
    """An inference process does not work: Triton reports it, or a request timed out and the process used no CPU time.

    models: the models whose processes may be the cause, in the order in which they must be loaded.
    """

    def __init__(self, message: str, *models: str) -> None:
        super().__init__(message)
        self.models = list(models)


class ServerOverloaded(ServingError):
    """A golden request timed out because of load.

    Every inference process of the model used CPU time, and the model answered other requests.
    """


class GoldenRequestCheck:
    """Sends a server its golden requests. timeout: seconds for each request."""

    def __init__(self, server: TritonServer, timeout: float) -> None:
        self.server = server
        self.timeout = timeout

    def backend_failures(self) -> float:
        """Number of requests that failed because of an inference process, from Triton's metrics; no bad requests."""
        return self._counted("failure", 'reason="BACKEND"')

    def send(self) -> None:
        """Send both models of every release the golden requests.

        `student` gets its own, because the classifier of a small network runs the graph itself. Raises ProcessHangs,
        ServerOverloaded, and ServingError when a response is wrong or a request failed for another reason.
        """
        busy = None
        with Client(self.server.http_url, timeout=self.timeout, retries=RETRIES) as client:
            for model, version, send in self._requests(client):
                try:
                    self._check(model, version, send)
                except ServerOverloaded as error:  # the other models are still checked
                    busy = error
        if busy:
            raise busy

    def _requests(self, client: Client) -> list[tuple[str, int, Callable[[], None]]]:
        releases = self.server.releases
        student = partial(check_student, self.server.http_url, timeout=self.timeout, retries=RETRIES)
        return [
            *(
                (release.manifest.image_model, release.version, partial(check_golden, client, release))
                for release in releases
            ),
            *((STUDENT, release.version, partial(student, release)) for release in releases),
        ]

    def _check(self, model: str, version: int, send: Callable[[], None]) -> None:
        """Send golden requests to one version of a model; classify a failure by its inference processes' CPU time.

        Processes of other models and versions are ignored, because they may be idle. While requests wait, each process
        of the model has one. A process that hangs keeps its request and gets no other. A retry would not detect it: the
        other processes would answer.
        """
        cpu_before, answered, began = (
            self._cpu_seconds(model, version),
            self._answered(model, version),
            time.monotonic(),
        )
        try:
            send()
        except DeadlineExceeded as error:
            now, seconds = self._cpu_seconds(model, version), time.monotonic() - began
            used = [now[pid] - before for pid, before in cpu_before.items() if pid in now]
            if any(cpu < max(IDLE_SHARE * seconds, TICKS) for cpu in used):
                models = models_of(self.server.repository)
                raise ProcessHangs(f"{error}, although an inference process was idle", *models) from error
            others = self._answered(model, version) - answered
            if used and others > 0:
                raise ServerOverloaded(
                    f"{model} {version} is overloaded: {others:.0f} requests answered, but {error}"
                ) from error
            raise
        except ProcessUnhealthy as error:
            if unhealthy := UNHEALTHY.search(str(error)):
                raise ProcessHangs(str(error), unhealthy[1]) from error
            raise

    def _cpu_seconds(self, model: str, version: int) -> dict[int, float]:
        """CPU time in seconds (user and system) of a version's inference processes, by process id."""
        seconds = {}
        for process, *identity in inference_processes(self.server.prefix):
            with contextlib.suppress(psutil.NoSuchProcess):
                if identity == [model, version]:
                    seconds[process.pid] = sum(process.cpu_times()[:2])
        return seconds

    def _answered(self, model: str, version: int) -> float:
        """Number of requests that a version has answered, from Triton's metrics."""
        return self._counted("success", f'model="{model}"', f'version="{version}"')

    def _counted(self, result: str, *labels: str) -> float:
        """Number of requests with this result and these labels, from Triton's metrics; 0 if these are not available."""
        try:
            # Closed at once, because an open connection delays a stop of the server.
            with urllib3.PoolManager(timeout=METRICS_TIMEOUT, retries=False) as pool:
                metrics = pool.request("GET", self.server.metrics_url).data.decode()
        except (urllib3.exceptions.HTTPError, UnicodeDecodeError):
            return 0.0
        counted = re.findall(rf"^nv_inference_request_{result}\{{(.+)\}} (\S+)$", metrics, re.MULTILINE)
        return sum(float(value) for found_labels, value in counted if set(labels) <= set(found_labels.split(",")))
