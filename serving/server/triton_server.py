"""Start and stop the local Triton server: check the files, start, send golden requests, stop, remove leftovers."""

from __future__ import annotations

import contextlib
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
from serving.golden.requests import check_golden, check_student
from serving.repository.lock import locked
from serving.repository.release import Release, find_releases
from serving.repository.signing_keys import trusted_keys
from serving.server.arguments import admin_key, grpc_tls_options, new_admin_key, triton_arguments
from serving.server.installation import Installation, find_installation
from serving.server.leftovers import inference_processes, is_stopped, new_prefix, runtime_folder, sweep, sweep_dead_runs
from serving.server.local_tree import link_tree
from serving.server.running import RunningServer, is_ready, write_server_record
from serving.server.watchdog import dismiss, start_watchdog
from serving.shared import priority
from serving.shared.errors import ServingError
from serving.shared.logs import ServerLog
from serving.shared.ports import choose_ports
from serving.shared.process import POLL, check_open_files, end_process, start_process, wait_for

GRACE = 10  # seconds after SIGTERM that Triton waits for running requests, also where an inference process has died
KILL_AFTER = 5.0  # further seconds before SIGKILL: Triton ignores SIGTERM while a load hangs
CANARY_TIMEOUT = 60.0  # seconds
DIAGNOSIS_TIMEOUT = 30.0  # seconds for the dry run in ONNX Runtime after a failed start


class TritonServer:
    """One Triton server on a model repository, in its own process group, with a watchdog process.

    Use it as a context manager, or call start and stop; it may be started again. start leaves no process when it
    raises. A port of 0 means any free port, chosen at the first start and kept. log, forward: a file and a stream that
    get the output of the server and its inference processes. grace: seconds that running requests get at a stop.
    niceness: of the server, 0 to 19; 0 keeps the caller's. grpc_tls: PEM files of a certificate and its key; gRPC then
    accepts only TLS. options: further command-line options of Triton (see server_options). environment: further
    environment variables of the server and its models.
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
        self.example: Path | None = None  # a file with one golden image, while the server runs
        self._forward = forward
        self._output: ServerLog | None = None
        self._tail = ""  # last lines of the previous run's log
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._running: RunningServer | None = None
        self._next_runtime: Path | None = None  # the runtime folder of the next start, while a restart is pending
        self._prefixes_to_sweep: list[str] = []  # prefixes of runs that may have leftovers

    @property
    def http_url(self) -> str:
        """Address for HTTP clients; a port of 0 is replaced at the start."""
        return f"http://{self.host}:{self.ports['--http-port']}"

    @property
    def grpc_url(self) -> str:
        """Address for gRPC clients; a port of 0 is replaced at the start."""
        scheme = "grpcs" if self.certificate else "grpc"
        return f"{scheme}://{self.host}:{self.ports['--grpc-port']}"

    @property
    def metrics_url(self) -> str:
        """Address of the Prometheus metrics; a port of 0 is replaced at the start."""
        return f"http://{self.host}:{self.ports['--metrics-port']}/metrics"

    @property
    def process_id(self) -> int | None:
        """The server's process id, also the id of its process group; None when it does not run."""
        return self._process.pid if self._process else None

    @property
    def running(self) -> RunningServer:
        """Addresses and admin key, for promotion and repair. Raises ServingError when the server does not run."""
        if self._running is None:
            raise ServingError("this server does not run; start it first")
        return self._running

    def start(self) -> TritonServer:
        """Check the files, start the server, load both models and send each the golden requests of every release.

        Leftovers of killed runs on this machine are removed first. The call waits for a running promotion. Raises
        ServingError or a subclass, in one line. If the server failed, the last lines of its log follow; if a dry run in
        ONNX Runtime finds a faulty graph, that is the error instead. Raises OSError if a resource of the machine is
        missing: a folder for temporary files, memory.
        """
        if self._process:
            raise ServingError("this server runs already; stop it first")
        self._remove_leftovers()  # after a stop that failed
        self._tail = ""
        check_open_files()
        key = admin_key() or new_admin_key()
        self.ports = choose_ports(self.host, self.ports)
        self.releases = find_releases(self.repository)
        installation = find_installation()
        sweep_dead_runs()
        restart_pending = self._next_runtime is not None
        with locked(self.repository, shared=True, timeout=self.start_timeout):
            # Again: the promotion may have changed them. It checks sha256; trusted keys it may not have had.
            self.releases = find_releases(self.repository, hashes=bool(trusted_keys()))
            try:
                self._launch(installation, key)
                self._await_http()
                self.canary()
            except BaseException as error:
                self.stop(restart_pending=restart_pending)
                if isinstance(error, ServingError):  # raises a shorter message than Triton's log if a graph is at fault
                    dry_run(self.repository, self.releases, min(DIAGNOSIS_TIMEOUT, self.start_timeout))
                raise
        return self

    def canary(self, timeout: float = CANARY_TIMEOUT) -> None:
        """Send both models the golden requests of every release. Raises ServingError if one fails or differs."""
        with Client(self.http_url, timeout=timeout) as client:
            for release in self.releases:
                check_golden(client, release, pause=False)
                check_student(self.http_url, release, timeout, pause=False)

    def process_counts(self) -> Counter[tuple[str, int]]:
        """Number of inference processes (Triton's stubs) by model and version, without those stopped by a signal."""
        return Counter(tuple(key) for process, *key in inference_processes(self.prefix) if not is_stopped(process))

    def is_stopped(self) -> bool:
        """Whether the server's process is stopped by a signal (SIGSTOP)."""
        return self._process is not None and is_stopped(psutil.Process(self._process.pid))

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the server to exit; its exit status, or None if it still runs after `timeout` seconds."""
        return wait_for(self._process, timeout)

    def stop(self, at_once: bool = False, restart_pending: bool = False) -> int | None:
        """Stop the server and remove its processes, shared memory and runtime folder. Safe to call twice.

        at_once: send SIGKILL; running requests fail. restart_pending: a restart follows, and a server record for it is
        written, so that a concurrent promotion fails and is retried instead of assuming that no server runs. Returns
        the exit status (0 after a clean stop), None if the server was not running.
        """
        if not restart_pending:
            self._next_runtime = None
        elif not self._next_runtime:
            with contextlib.suppress(OSError):  # a full disk: no record for promotions, but the server is still stopped
                self._write_restart_record()
        try:
            return end_process(self._process, 0 if at_once else self.grace + KILL_AFTER) if self._process else None
        finally:
            self._remove_leftovers()

    def log_tail(self) -> str:
        """The last lines of the server's output, after a stop those of the previous run; empty if there are none."""
        if self._output is None:
            return self._tail
        if self.wait(0) is not None:
            self._output.drain()
        return self._output.tail()

    def __enter__(self) -> TritonServer:
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def _remove_leftovers(self) -> None:
        """Remove the leftovers of ended runs. If a signal interrupts it, the next call continues."""
        self._running = self.example = None
        if self._process:
            end_process(self._process, 0)  # set only if the wait for its exit was interrupted
            self._process = None
        next_prefix = self.prefix if self._next_runtime else None
        for prefix in [prefix for prefix in self._prefixes_to_sweep if prefix != next_prefix]:
            sweep(prefix)  # inference processes outlive a server that was killed or that lost one of them
            self._prefixes_to_sweep.remove(prefix)
        if self._output:
            self._output.close()
            self._tail, self._output = self._output.tail(), None
        if self._watchdog:
            dismiss(self._watchdog)
            self._watchdog = None

    def _launch(self, installation: Installation, key: str) -> None:
        if self.prefix not in self._prefixes_to_sweep:
            self._prefixes_to_sweep.append(self.prefix)
        self._output = ServerLog(self.log, self._forward)
        self._watchdog = start_watchdog(self.prefix)
        runtime, self._next_runtime = self._next_runtime or runtime_folder(self.prefix), None
        niceness = self.niceness or priority.niceness()
        link_tree(self.repository, runtime)
        links = installation.link(runtime, niceness)
        environment = {**installation.environment, **self.environment, **links}
        command = triton_arguments(
            installation, runtime, self.prefix, self.host, self.ports, key, self.grace, self.options
        )
        self._process = start_process(command, environment, runtime, self.niceness)
        self._output.follow(self._process.stdout)
        self._running = self._server_record(self.prefix, key)
        write_server_record(runtime, self._running)
        self.example = runtime / "example-image"
        self.example.write_bytes(self.releases[-1].golden[0].image_bytes())

    def _write_restart_record(self) -> None:
        """Create the runtime folder of the next start under a new prefix, with a server record (same addresses)."""
        key = self._running.admin_key if self._running else new_admin_key()
        prefix = new_prefix()
        self._prefixes_to_sweep.append(prefix)
        folder = runtime_folder(prefix)
        write_server_record(folder, self._server_record(prefix, key))
        self.prefix, self._next_runtime = prefix, folder

    def _server_record(self, prefix: str, key: str) -> RunningServer:
        return RunningServer(
            repository=os.path.realpath(self.repository),
            http_url=self.http_url,
            grpc_url=self.grpc_url,
            admin_key=key,
            prefix=prefix,
            certificate=str(self.certificate) if self.certificate else None,
        )

    def _await_http(self) -> None:
        """Wait until the server is ready over HTTP, which it is when the models are loaded.

        Raises ServingError with the last lines of the log if it exits or is not ready within start_timeout seconds.
        """
        deadline = time.monotonic() + self.start_timeout
        while not is_ready(self.host, self.ports["--http-port"]):
            status = self.wait(POLL)
            if status is not None:
                raise ServingError(f"the Triton server ended with status {status} while it started:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                waited = f"{self.start_timeout:.0f} s"
                raise ServingError(f"the Triton server was not ready within {waited}:\n{self.log_tail()}")
