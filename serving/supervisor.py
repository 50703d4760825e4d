"""Keeps a server answering: starts it again when it dies, revives a model whose stub died, within bounds.

Triton never restarts a stub that died, and its model stays "ready" all the same. So two things are watched: whether
every stub that should live does, each second, and what the server answers to its golden requests, from time to time.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from serving.canary import Busy, Canary, Hanging
from serving.errors import ServingError
from serving.leftovers import stubs_of
from serving.local_tree import refresh_trees
from serving.model_config import CLASSIFIER, STUDENT
from serving.model_control import ModelControl
from serving.release import Release, find_releases, instances
from serving.repository_lock import RepositoryBusy, locked
from serving.server import TritonServer
from serving.version_policy import served_versions


@dataclass(frozen=True)
class Patience:
    """How often a supervisor looks and how long it goes on, in seconds.

    canary_timeout is what a golden request may take; a second failure in a row counts, and none that load explains.
    ending is what a stub that has been replaced gets to finish, before it is killed. After
    `restarts` starts that were not followed by `stable` seconds of health it gives up, waiting between them twice as
    long each time, from `first_delay` to `longest_delay`.
    """

    poll: float = 1.0
    canary_every: float = 15.0
    canary_timeout: float = 30.0
    load_timeout: float = 60.0
    ending: float = 10.0
    first_delay: float = 1.0
    longest_delay: float = 30.0
    stable: float = 120.0
    restarts: int = 8


class GivenUp(ServingError):
    """The server cannot be kept up; the message says why and ends with its log."""


class Supervisor:
    """Watches a started server. report: takes one line for whoever runs the service."""

    def __init__(self, server: TritonServer, report: Callable[[str], None], patience: Patience | None = None) -> None:
        self.server = server
        self.report = report
        self.patience = patience or Patience()
        self._canary = Canary(server, self.patience.canary_timeout)
        self._failures = 0
        self._restarts = 0
        self._resting = 0.0  # until when no repair is tried, the last one having been impossible
        self._healthy_since = self._asked = time.monotonic()
        self._lacking: dict[tuple[str, int], int] = {}
        self._expected: dict[tuple[str, int], int] = {}

    def run(self, stopping: threading.Event) -> None:
        """Watch until `stopping` is set. Raises GivenUp when the server cannot be kept up."""
        while not stopping.is_set():
            ended = self.server.wait(self.patience.poll)
            if ended is not None or self.server.process_id is None:
                self._restart(f"the Triton server ended by itself with status {ended}", stopping)
                continue
            with contextlib.suppress(ServingError):  # the disk is gone: what was seen stays
                refresh_trees(self.server.repository, self.server.prefix)  # for a promotion that cannot reach them
            try:
                with locked(self.server.repository, shared=True, timeout=0):
                    self._look(stopping)
            except GivenUp:
                raise
            except RepositoryBusy:  # it loads and unloads just now, and asks golden requests itself
                self._lacking = {}
            except (ServingError, OSError):  # the disk is gone: what is loaded answers on, and is still asked
                self._ask_canary(stopping)
            if time.monotonic() - self._healthy_since > self.patience.stable:
                self._restarts = 0

    def _look(self, stopping: threading.Event) -> None:
        """One look at stubs and, when it is time, at answers."""
        self._learn_releases()
        lacking = self._count_lacking()
        # Seen twice: a stub that has just been started, or that a load has just taken down, is no dead one.
        dead = sorted(place for place, number in lacking.items() if self._lacking.get(place) == number)
        self._lacking = lacking
        if dead and time.monotonic() > self._resting:
            self._lacking = {}
            names = ", ".join(f"{model} {version}" for model, version in dead)
            self._heal(f"a stub of {names} died", sorted({model for model, _ in dead}, reverse=True), stopping)
        else:
            self._ask_canary(stopping)

    def _learn_releases(self) -> None:
        """What should be served now; a promotion may have changed it since the last look."""
        root = self.server.repository
        self._expected = {
            (model, version): instances(root, model)
            for model in self.server.stub_models
            for version in served_versions(root, model)
        }
        versions = tuple(release.version for release in self.server.releases)
        if versions != served_versions(root, CLASSIFIER):
            self.server.releases = find_releases(root, hashes=False)

    def _count_lacking(self) -> dict[tuple[str, int], int]:
        living = self.server.stubs()
        return {place: wanted - living[place] for place, wanted in self._expected.items() if living[place] < wanted}

    def _ask_canary(self, stopping: threading.Event) -> None:
        if time.monotonic() - self._asked < self.patience.canary_every * (0.2 if self._failures else 1):
            return
        try:
            self._canary.ask()
            self._failures = 0
        except Busy as error:  # nothing is broken, and to load anything now would take from those that work
            self._failures = 0
            self.report(f"{error}; left alone")
        except (ServingError, OSError) as error:
            self._failures += 1
            if self._failures < 2 and not isinstance(error, Hanging):
                self.report(f"{error}; asking once more")
            else:
                self._failures = 0
                self._heal(str(error), [STUDENT, CLASSIFIER], stopping)
        self._asked = time.monotonic()

    def _heal(self, fault: str, models: list[str], stopping: threading.Event) -> None:
        """Load models again, beside what still answers; where that does not help, start the server again."""
        self._healthy_since = time.monotonic()
        try:
            # Their sha256 too: a load of other files would lose what still works.
            releases = find_releases(self.server.repository)
        except (ServingError, OSError) as error:
            # What is loaded in part is worth more than a server that would not start again from these files.
            self.report(f"{fault}, and the repository cannot replace it: {error}; serving on with what is loaded")
            self._asked = time.monotonic()
            self._resting = self._asked + self.patience.longest_delay
            return
        self.report(f"{fault}; loading {' and '.join(models)} again")
        try:
            replaced = [
                stub
                for stub, model, version in stubs_of(self.server.prefix)
                if model in models and version in {release.version for release in releases}
            ]
            with ModelControl(self.server.running, self.patience.load_timeout) as control:
                for model in models:
                    _reload(control, self.server.repository, model, releases)
            # Triton asks a stub to end; one that hangs never will.
            for stub in psutil.wait_procs(replaced, self.patience.ending)[1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    stub.kill()
            with contextlib.suppress(Busy):
                self._canary.ask()
            if lacking := self._count_lacking():
                raise ServingError(f"stubs of {sorted(lacking)} are still missing")
        except (ServingError, OSError) as error:
            self._restart(f"loading again did not help: {error}", stopping)
            return
        self._asked = time.monotonic()
        self.report(f"{' and '.join(models)} answers again")

    def _restart(self, fault: str, stopping: threading.Event) -> None:
        """Start the server again, on the same ports, after a pause. Raises GivenUp after too many tries.

        Descriptors, memory or the disk may be short for a while, which is no reason to end either.
        """
        tail = self.server.log_tail()
        while not stopping.is_set():
            if self._restarts >= self.patience.restarts:
                with contextlib.suppress(OSError):
                    self.server.stop()
                raise GivenUp(f"{fault}; given up after {self._restarts} restarts" + (f":\n{tail}" if tail else ""))
            delay = self._delay()
            self._restarts += 1
            self.report(f"{fault}; starting it again in {delay:g} s ({self._restarts} of {self.patience.restarts})")
            with contextlib.suppress(OSError):  # the start goes on with what is left
                self.server.stop(comes_back=True)
            if stopping.wait(delay):
                return
            try:
                self.server.start()
            except (ServingError, OSError) as error:
                fault, _, tail = str(error).partition("\n")
                continue
            self._failures, self._lacking = 0, {}
            self._healthy_since = self._asked = time.monotonic()
            self.report(f"ready again at {self.server.http_url} {self.server.grpc_url}")
            return

    def _delay(self) -> float:
        return min(self.patience.first_delay * 2**self._restarts, self.patience.longest_delay)


def _reload(control: ModelControl, root: Path, model: str, releases: list[Release]) -> None:
    """Have Triton load a model's versions anew, the new ones before it lets the old ones go.

    It only does so where a model file has changed, so each is touched; where that is not allowed the model is unloaded
    first, and requests are refused for a moment.
    """
    touched = False
    with contextlib.suppress(OSError):
        for release in releases:
            os.utime(root / model / str(release.version) / "model.py")
            touched = True
    if not touched:
        control.unload(model)
    control.load(model)
