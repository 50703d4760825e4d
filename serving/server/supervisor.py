"""Supervise a server: restart it when it exits; reload a model whose inference process died, is stopped or hangs.

Triton never restarts an inference process (its "stub") that died, and reports its model as ready. So the supervisor
checks every second that each expected process runs, and sends golden requests every 15 s, every 3 s while requests
fail.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from serving.repository.lock import RepositoryBusy, locked
from serving.repository.release import Release, find_releases, instances
from serving.repository.version_policy import mark_changed, served_versions
from serving.server.canary import GoldenRequestCheck, ProcessHangs, ServerOverloaded
from serving.server.leftovers import inference_processes, is_stopped
from serving.server.local_tree import refresh_trees
from serving.server.model_control import ModelControl
from serving.server.triton_server import TritonServer
from serving.shared.errors import ServingError
from serving.shared.names import image_model, models_of
from serving.shared.terminal import counted


@dataclass(frozen=True)
class SupervisionLimits:
    """Intervals and limits of a supervisor, in seconds.

    canary_timeout: timeout of one golden request. Two failures in a row start a repair; a timeout caused by load does
    not count. ending: time that a replaced inference process gets to exit before it is killed. A server that ran for
    more than `served` seconds is restarted at once. One that failed earlier, or did not start, is a failed start: after
    n of them in a row the delay is first_delay * 2^(n-1), at most longest_delay, and after more than `restarts` (None:
    no limit) the supervisor raises RestartLimitExceeded.
    """

    poll: float = 1.0
    canary_every: float = 15.0
    canary_timeout: float = 30.0
    load_timeout: float = 60.0
    ending: float = 10.0
    first_delay: float = 1.0
    longest_delay: float = 30.0
    served: float = 5.0
    restarts: int | None = 8


class RestartLimitExceeded(ServingError):
    """The server failed more often than `SupervisionLimits.restarts` allows; the message has the cause and the log's end."""


class Supervisor:
    """Supervises a started server. report: called with one line for the operator at each fault and repair."""

    def __init__(
        self, server: TritonServer, report: Callable[[str], None], limits: SupervisionLimits | None = None
    ) -> None:
        self.server = server
        self.report = report
        self.limits = limits or SupervisionLimits()
        self._check = GoldenRequestCheck(server, self.limits.canary_timeout)
        self._failures = 0  # of golden requests in a row
        self._failed_starts = 0  # in a row
        self._backend_failures = 0.0
        self._suspicious = False  # requests failed since the last golden requests
        self._server_stopped = False
        self._no_repair_before = 0.0  # no repair before this time, because the last one was impossible
        self._started = self._last_golden_requests = time.monotonic()
        self._missing: dict[tuple[str, int], int] = {}
        self._expected: dict[tuple[str, int], int] = {}

    def run(self, stopping: threading.Event) -> None:
        """Check and repair the server until `stopping` is set. Raises RestartLimitExceeded after too many failed starts."""
        while not stopping.is_set():
            ended = self.server.wait(self.limits.poll)
            if ended is not None or self.server.process_id is None:
                self._restart(f"the Triton server ended by itself with status {ended}", stopping)
                continue
            before, self._server_stopped = self._server_stopped, self.server.is_stopped()
            if self._server_stopped:
                # In two checks: after a suspend of the machine the processes do not all resume at the same time.
                if before:
                    self._restart("the process of the Triton server is stopped (SIGSTOP)", stopping)
                continue
            with contextlib.suppress(ServingError):  # the repository cannot be read: keep the tree
                # For a promotion that cannot write this tree (of another user, or with another folder for temporary
                # files).
                refresh_trees(self.server.repository, self.server.prefix)
            try:
                with locked(self.server.repository, shared=True, timeout=0):
                    self._check_processes(stopping)
            except RestartLimitExceeded:
                raise
            except RepositoryBusy:  # a promotion loads and unloads models, and sends golden requests itself
                self._missing = {}
            except (ServingError, OSError):  # the repository cannot be read: check the models that are loaded
                self._send_golden_requests(stopping)

    def _check_processes(self, stopping: threading.Event) -> None:
        """Check the inference processes and, when it is due, send golden requests; repair what fails."""
        self._update_expected()
        missing = self._count_missing()
        # Missing in two checks: a load may be about to start or end a process.
        dead = sorted(key for key, number in missing.items() if self._missing.get(key) == number)
        self._missing = missing
        if dead and time.monotonic() > self._no_repair_before:
            self._missing = {}
            names = ", ".join(f"{model} {version}" for model, version in dead)
            models = sorted({model for model, _ in dead}, reverse=True)
            self._repair(f"an inference process of {names} died or is stopped", models, stopping)
        else:
            self._send_golden_requests(stopping)

    def _update_expected(self) -> None:
        """Update the expected inference processes and the releases, which a promotion may have changed."""
        root = self.server.repository
        self._expected = {
            (model, version): instances(root, model)
            for model in models_of(root)
            for version in served_versions(root, model)
        }
        versions = tuple(release.version for release in self.server.releases)
        if versions != served_versions(root, image_model(root)):
            self.server.releases = find_releases(root, hashes=False)

    def _count_missing(self) -> dict[tuple[str, int], int]:
        running = self.server.process_counts()
        return {key: number - running[key] for key, number in self._expected.items() if running[key] < number}

    def _send_golden_requests(self, stopping: threading.Event) -> None:
        before, self._backend_failures = self._backend_failures, self._check.backend_failures()
        self._suspicious |= self._failures > 0 or self._backend_failures > before
        if time.monotonic() - self._last_golden_requests < self.limits.canary_every * (0.2 if self._suspicious else 1):
            return
        self._suspicious = False
        try:
            self._check.send()
            self._failures = 0
        except ServerOverloaded as error:  # nothing is broken, and a load would slow the working processes
            self._failures = 0
            self.report(f"{error}; no repair is needed")
        except (ServingError, OSError) as error:
            self._failures += 1
            if self._failures < 2 and not isinstance(error, ProcessHangs):
                self.report(f"{error}; the golden requests are sent once more")
            else:
                self._failures = 0
                models = error.models if isinstance(error, ProcessHangs) else list(models_of(self.server.repository))
                self._repair(str(error), models, stopping)
        self._last_golden_requests = time.monotonic()

    def _repair(self, fault: str, models: list[str], stopping: threading.Event) -> None:
        """Reload models while the working processes serve; if the fault remains, restart the server."""
        try:
            # With sha256: loading damaged files would replace models that still work.
            releases = find_releases(self.server.repository)
        except (ServingError, OSError) as error:
            # Keep what is loaded: a server would not start from these files.
            self.report(f"{fault}, and the repository cannot be read: {error}; the loaded versions continue to serve")
            self._last_golden_requests = time.monotonic()
            self._no_repair_before = self._last_golden_requests + self.limits.longest_delay
            return
        self.report(f"{fault}; loading {' and '.join(models)} again")
        try:
            replaced = [
                process
                for process, model, version in inference_processes(self.server.prefix)
                if model in models and version in {release.version for release in releases}
            ]
            with ModelControl(self.server.running, self.limits.load_timeout) as control:
                for model in models:
                    _reload(control, self.server.repository, model, releases)
            with contextlib.suppress(ServerOverloaded):
                self._check.send()
            # Triton requests the old processes to exit; a process that hangs or is stopped does not.
            _kill([process for process in replaced if is_stopped(process)])
            _kill(psutil.wait_procs(replaced, self.limits.ending)[1])
            if missing := self._count_missing():
                raise ServingError(f"inference processes of {sorted(missing)} are still missing")
        except (ServingError, OSError) as error:
            self._restart(f"the reload did not repair it: {error}", stopping)
            return
        self._last_golden_requests = time.monotonic()
        self.report(f"{' and '.join(models)}: ready again")

    def _restart(self, fault: str, stopping: threading.Event) -> None:
        """Kill the remaining processes and start the server again on the same ports.

        Raises RestartLimitExceeded after too many failed starts in a row, whatever their cause (also no memory or a full disk).
        """
        limit = self.limits.restarts
        if time.monotonic() - self._started > self.limits.served:
            self._failed_starts = -1  # the last start was successful: the loop counts the next one as 0
        while not stopping.is_set():
            self._failed_starts += 1
            if limit is not None and self._failed_starts > limit:
                with contextlib.suppress(OSError):
                    self.server.stop(at_once=True)
                tail = self.server.log_tail()
                raise RestartLimitExceeded(
                    f"{fault}; stopped after {counted(limit, 'restart')}" + (f":\n{tail}" if tail else "")
                )
            failed = self._failed_starts
            delay = min(self.limits.first_delay * 2 ** (failed - 1), self.limits.longest_delay) if failed else 0.0
            number = f"{failed}" + ("" if limit is None else f" of {limit}")
            self.report(f"{fault}; starting it again " + (f"in {delay:g} s ({number})" if delay else "at once"))
            with contextlib.suppress(OSError):  # the next start removes the rest
                self.server.stop(at_once=True, restart_pending=True)
            if stopping.wait(delay):
                return
            try:
                self.server.start()
            except (ServingError, OSError) as error:
                fault = str(error).partition("\n")[0]
                continue
            self._failures, self._missing, self._server_stopped, self._suspicious = 0, {}, False, False
            self._backend_failures = 0.0
            self._started = self._last_golden_requests = time.monotonic()
            self.report(f"ready again at {self.server.http_url} {self.server.grpc_url}")
            return


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _reload(control: ModelControl, root: Path, model: str, releases: list[Release]) -> None:
    """Make Triton reload the versions of a model; it unloads the old ones after the new ones are ready.

    Triton reloads a version only if a file of it has changed, so each model.py gets a new modification time. If the
    repository is not writable, the model is unloaded first, and requests fail until it is loaded.
    """
    touched = False
    with contextlib.suppress(OSError):
        for release in releases:
            mark_changed(root, model, root / model / str(release.version) / "model.py")
            touched = True
    if not touched:
        control.unload(model)
    control.load(model)
