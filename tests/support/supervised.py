"""Run Triton under a supervisor in a thread, and send requests to it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from conftest import picture

from serving.client.sync_client import Client
from serving.server.leftovers import processes_of
from serving.server.supervisor import RestartLimitExceeded, SupervisionLimits, Supervisor
from serving.server.triton_server import TritonServer
from serving.shared.errors import ServingError
from serving.transport.retries import Retries

SHORT_LIMITS = SupervisionLimits(
    poll=0.2,
    canary_every=1.0,
    canary_timeout=2.0,
    load_timeout=15.0,
    ending=2.0,
    first_delay=0.2,
    longest_delay=1.0,
    restarts=2,
)


class Watched:
    """A server under a supervisor that runs in a thread, and the supervisor's reports."""

    def __init__(
        self, root: Path, limits: SupervisionLimits = SHORT_LIMITS, server: TritonServer | None = None
    ) -> None:
        self.root = root
        self.limits = limits
        self.server = (server or TritonServer(root, http_port=0, grpc_port=0, metrics_port=0)).start()
        self.reports: list[str] = []
        self.ended: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def kill_stub(self, model: str, signal: str = "kill") -> psutil.Process:
        for process in processes_of(self.server.prefix):
            if any(f"/{model}/1/model.py" in argument for argument in process.cmdline()):
                getattr(process, signal)()
                return process
        raise AssertionError(f"{model} has no stub")

    def await_report(self, text: str, timeout: float = 40.0) -> None:
        self.await_that(lambda: any(text in line for line in self.reports), timeout)

    def await_that(self, holds: Callable[[], bool], timeout: float = 40.0) -> None:
        deadline = time.monotonic() + timeout
        while not holds():
            assert time.monotonic() < deadline, self.reports
            time.sleep(0.05)

    def answers(self) -> int:
        """Return how many of eight consecutive requests succeed."""
        answered = 0
        with Client(self.server.http_url, timeout=10) as client:
            for seed in range(8):
                try:
                    answered += client.predict([picture(seed)])[0].version
                except ServingError:
                    continue
        return answered

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(60)
        self.server.stop(at_once=True)

    def _run(self) -> None:
        try:
            Supervisor(self.server, self.reports.append, self.limits).run(self._stopping)
        except RestartLimitExceeded as error:
            self.ended = error


@contextlib.contextmanager
def failures_under_load(server: TritonServer) -> Iterator[list[float]]:
    """Send requests from four threads without retries; yields the list of the times of failed requests."""
    over, failed = threading.Event(), []

    def call(seed: int) -> None:
        with Client(server.http_url, timeout=20, retries=Retries(attempts=1)) as client:
            while not over.wait(0.1):
                try:
                    client.predict([picture(seed)])
                except ServingError:
                    failed.append(time.monotonic())

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(call, seed) for seed in range(4)]
        try:
            yield failed
        finally:
            over.set()
    assert [call.exception() for call in calls] == [None] * 4
