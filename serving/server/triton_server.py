"""The local Triton server: start it on checked files, send golden requests, stop it and remove what it left."""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import psutil

from serving.client.sync_client import Client
from serving.golden.dry_run import dry_run
from serving.golden.requests import ask_student, check_golden
from serving.repository.lock import locked
from serving.repository.release import Release, find_releases
from serving.server.arguments import admin_key, new_admin_key, triton_arguments
from serving.server.installation import Installation, find_installation
from serving.server.leftovers import is_stopped, new_prefix, runtime_folder, stubs_of, sweep, sweep_dead_runs
from serving.server.local_tree import link_tree
from serving.server.running import RunningServer, leave_note
from serving.server.server_options import grpc_tls_options
from serving.server.watchdog import dismiss, start_watchdog
from serving.shared import priority
from serving.shared.errors import ServingError
from serving.shared.logs import ServerLog
from serving.shared.ports import choose_ports
from serving.shared.process import POLL, check_open_files, end_process, start_process, wait_for

GRACE = 10  # seconds that Triton grants running requests, and a dead stub, on SIGTERM
KILL_AFTER = 5.0  # seconds more; a load that hangs makes Triton ignore SIGTERM
CANARY_TIMEOUT = 60.0  # seconds
DIAGNOSIS_TIMEOUT = 30.0  # seconds for ONNX Runtime, after a start that failed


class TritonServer:
    """One Triton server on a model repository, in a process group of its own, with a watchdog beside it.

    A port of 0 means any free one, chosen at the first start and kept. What the server and its stubs print goes to the
    file `log` and to the stream `forward`, where they are given. grace: seconds that running requests get when it is
    stopped. niceness: how far it stands back for other work, 0 to 19. grpc_tls: PEM files of a certificate and its key,
    with which gRPC speaks TLS alone. options: further ones of Triton's own (see server_options); environment: further
    variables for it and its models. Use it as a context manager, or call start and stop; it may be started again. start
    leaves nothing running when it raises.
    """

    def __init__(
        self,
        repository: Path,
        host: str = "127.0.0.1",
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        log: Path | None = None,
        start_timeout: float = 300.0,
        *,
        forward: TextIO | None = None,
        grace: int = GRACE,
        niceness: int = 0,
        grpc_tls: tuple[Path, Path] | None = None,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.repository = repository
        self.host = host
        self.ports = {"--http-port": http_port, "--grpc-port": grpc_port, "--metrics-port": metrics_port}
        self.log = log
        self.start_timeout = start_timeout
        self.grace = grace
        self.niceness = niceness
        self.environment = environment or {}
        self.certificate = grpc_tls[0].absolute() if grpc_tls else None
        self.options = [*options, *(grpc_tls_options(*grpc_tls) if grpc_tls else [])]
        self.releases: list[Release] = []
        self.prefix = new_prefix()
        self.example: Path | None = None  # a file with one golden image, while it runs
        self._forward = forward
        self._output: ServerLog | None = None
        self._tail = ""  # of the log of the last run
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._running: RunningServer | None = None
        self._away: Path | None = None  # the runtime folder of the next start, while it is about to come back
        self._unswept: list[str] = []  # prefixes of runs that may have left something

    @property
    def http_url(self) -> str:
        """Address for HTTP clients, known after start."""
        return f"http://{self.host}:{self.ports['--http-port']}"

    @property
    def grpc_url(self) -> str:
        """Address for gRPC clients, known after start."""
        scheme = "grpcs" if self.certificate else "grpc"
        return f"{scheme}://{self.host}:{self.ports['--grpc-port']}"

    @property
    def metrics_url(self) -> str:
        """Address of the Prometheus metrics, known after start."""
        return f"http://{self.host}:{self.ports['--metrics-port']}/metrics"

    @property
    def process_id(self) -> int | None:
        """The server's process id, which is its process group too; None when it does not run."""
        return self._process.pid if self._process else None

    @property
    def running(self) -> RunningServer:
        """How promotion and healing reach it. Raises ServingError when it does not run."""
        if self._running is None:
            raise ServingError("this server does not run; start it first")
        return self._running

    def start(self) -> TritonServer:
        """Check the files, start the server, load both models and send each the golden requests of every release.

        What killed runs left on this machine is cleared first; a promotion that is under way is waited for. Raises
        ServingError, or a subclass, in one line; if the server itself failed, the end of its log follows, unless ONNX
        Runtime rejects a graph by itself, which is then the error. Raises OSError where this machine lacks what a process
        needs: a place for temporary files, memory.
        """
        if self._process:
            raise ServingError("this server runs already; stop it first")
        self._clear()  # what a stop that failed has left
        self._tail = ""
        check_open_files()
        key = admin_key() or new_admin_key()
        self.ports = choose_ports(self.host, self.ports)
        self.releases = find_releases(self.repository)
        installation = find_installation()
        sweep_dead_runs()
        comes_back = self._away is not None
        with locked(self.repository, shared=True, timeout=self.start_timeout):
            self.releases = find_releases(self.repository, hashes=False)  # as that promotion has left them
            try:
                self._launch(installation, key)
                self._await_http()
                self.canary()
            except BaseException as error:
                self.stop(comes_back=comes_back)
                if isinstance(error, ServingError):  # a fault of a graph has a shorter message than Triton's log
                    dry_run(self.repository, self.releases, min(DIAGNOSIS_TIMEOUT, self.start_timeout))
                raise
        return self

    def canary(self, timeout: float = CANARY_TIMEOUT) -> None:
        """Send both models the golden requests of every release. Raises ServingError when an answer fails or is wrong."""
        with Client(self.http_url, timeout=timeout) as client:
            for release in self.releases:
                check_golden(client, release, rest=False)
                ask_student(self.http_url, release, timeout, rest=False)

    def stubs(self) -> Counter[tuple[str, int]]:
        """How many inference processes (Triton's stubs) run by model and version; stopped ones are not counted."""
        return Counter((model, version) for stub, model, version in stubs_of(self.prefix) if not is_stopped(stub))

    def is_stopped(self) -> bool:
        """Whether the server's process is stopped by a signal."""
        return self._process is not None and is_stopped(psutil.Process(self._process.pid))

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the server to end by itself; its exit status, or None when it still runs after `timeout` seconds."""
        return wait_for(self._process, timeout)

    def stop(self, at_once: bool = False, comes_back: bool = False) -> int | None:
        """Stop the server and remove what it left: processes, shared memory, runtime folder. Safe to call twice.

        at_once: kill it, where no caller waits for a response. comes_back: its server record stays, so that a concurrent
        promotion fails and is retried instead of assuming that no server runs. Returns its exit status (0 after a clean
        stop), None when it was not running.
        """
        if not comes_back:
            self._away = None
        elif not self._away:
            with contextlib.suppress(OSError):  # a full disk: no record for promotions; the rest is still done
                self._leave_word()
        try:
            return end_process(self._process, 0 if at_once else self.grace + KILL_AFTER) if self._process else None
        finally:
            self._clear()

    def log_tail(self) -> str:
        """The last lines that the server printed, after stop those of the last run; empty when there are none."""
        if self._output is None:
            return self._tail
        if self.wait(0) is not None:
            self._output.drain()
        return self._output.tail()

    def __enter__(self) -> TritonServer:
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def _clear(self) -> None:
        """Remove what ended runs have left. After an interruption by a signal the next call continues."""
        self._running = self.example = None
        if self._process:
            end_process(self._process, 0)  # still there only where the wait for its end was cut short
            self._process = None
        coming = self.prefix if self._away else None
        for prefix in [found for found in self._unswept if found != coming]:
            sweep(prefix)  # stubs outlive a server that was killed or that lost one of them
            self._unswept.remove(prefix)
        if self._output:
            self._output.close()
            self._tail, self._output = self._output.tail(), None
        if self._watchdog:
            dismiss(self._watchdog)
            self._watchdog = None

    def _launch(self, installation: Installation, key: str) -> None:
        if self.prefix not in self._unswept:
            self._unswept.append(self.prefix)
        self._output = ServerLog(self.log, self._forward)
        self._watchdog = start_watchdog(self.prefix)
        runtime, self._away = self._away or runtime_folder(self.prefix), None
        niceness = self.niceness or priority.niceness()
        link_tree(self.repository, runtime)
        links = installation.link(runtime, niceness)
        environment = {**installation.environment, **self.environment, **links}
        command = triton_arguments(
            installation, runtime, self.prefix, self.host, self.ports, key, self.grace, self.options
        )
        self._process = start_process(command, environment, runtime, self.niceness)
        self._output.follow(self._process.stdout)
        self._running = self._note(self.prefix, key)
        leave_note(runtime, self._running)
        self.example = runtime / "example-image"
        self.example.write_bytes(self.releases[-1].golden[0].image_bytes())

    def _leave_word(self) -> None:
        """Make the runtime folder of the next start, with the note of where the server was and will be; a new prefix."""
        key = self._running.admin_key if self._running else new_admin_key()
        prefix = new_prefix()
        self._unswept.append(prefix)
        folder = runtime_folder(prefix)
        leave_note(folder, self._note(prefix, key))
        self.prefix, self._away = prefix, folder

    def _note(self, prefix: str, key: str) -> RunningServer:
        return RunningServer(
            repository=os.path.realpath(self.repository),
            http_url=self.http_url,
            grpc_url=self.grpc_url,
            admin_key=key,
            prefix=prefix,
            certificate=str(self.certificate) if self.certificate else None,
        )

    def _await_http(self) -> None:
        """Wait until HTTP answers, as it does once the models are loaded. Raises ServingError with the log's end."""
        deadline = time.monotonic() + self.start_timeout
        while not _answers(self.host, self.ports["--http-port"]):
            status = self.wait(POLL)
            if status is not None:
                raise ServingError(f"the Triton server ended with status {status} while it started:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                waited = f"{self.start_timeout:.0f} s"
                raise ServingError(f"the Triton server was not ready within {waited}:\n{self.log_tail()}")


def _answers(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
