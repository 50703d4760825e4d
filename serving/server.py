"""The local Triton server: started on checked files, trusted after its golden requests, stopped without a trace."""

from __future__ import annotations

import http.client
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from serving.client import Client
from serving.errors import InputError, ServingError
from serving.installation import Installation, find_installation
from serving.model_config import CLASSIFIER, STUDENT
from serving.ports import choose_ports
from serving.process import POLL, end_process, start_process
from serving.release import Release, dry_run, find_releases
from serving.repository import LOCAL_CONFIG

ADMIN_KEY_VARIABLE = "TAILOR_ADMIN_KEY"
ADMIN_HEADER = "tailor-admin-key"
# Whoever may load a model may run code in the server; the others read or change what is not theirs. model-config stays
# open: reading it changes nothing, and clients take max_batch_size and the default strength from it.
RESTRICTED = "model-repository,shared-memory,statistics,trace,logging"

EXIT_TIMEOUT = 10  # seconds that Triton grants running requests, and a dead stub, on SIGTERM
KILL_AFTER = EXIT_TIMEOUT + 5.0  # seconds; a load that hangs makes Triton ignore SIGTERM
STUB_START_TIMEOUT = 120  # seconds for one model's stub to load
CANARY_TIMEOUT = 60.0
TAIL_LINES = 12

# Triton builds the stub's command line without quoting, so the paths it sees hold nothing that a shell reads otherwise.
SAFE_PATH = re.compile(r"[A-Za-z0-9._/+-]+")


class TritonServer:
    """One Triton server on a model repository, in a process group of its own.

    A port of 0 means any free one. `log` collects what the server and its stubs print (None: kept only while it runs).
    `options` are further ones of Triton's own (see server_options).
    Use it as a context manager, or call start and stop. start leaves nothing running when it raises.
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
        options: Sequence[str] = (),
    ) -> None:
        self.repository = repository
        self.host = host
        self.ports = {"--http-port": http_port, "--grpc-port": grpc_port, "--metrics-port": metrics_port}
        self.log = log
        self.start_timeout = start_timeout
        self.options = options
        self.releases: list[Release] = []
        self.shm_prefix = f"tailor_{os.getpid()}_{secrets.token_hex(4)}_"
        self._process: subprocess.Popen[bytes] | None = None
        self._runtime: Path | None = None
        self._log_path: Path | None = None

    @property
    def http_url(self) -> str:
        """Address for HTTP clients, known after start."""
        return f"http://{self.host}:{self.ports['--http-port']}"

    @property
    def grpc_url(self) -> str:
        """Address for gRPC clients, known after start."""
        return f"grpc://{self.host}:{self.ports['--grpc-port']}"

    @property
    def process_id(self) -> int | None:
        """The server's process id, which is its process group too; None when it does not run."""
        return self._process.pid if self._process else None

    def start(self) -> TritonServer:
        """Check everything, start the server, load both models and ask every release its golden requests.

        Raises ServingError, or a subclass, in one line; if the server itself failed, the end of its log follows.
        """
        if self._process:
            raise ServingError("this server runs already; stop it first")
        key = _admin_key()
        self.ports = choose_ports(self.host, self.ports)
        self.releases = find_releases(self.repository)
        for release in self.releases:
            dry_run(self.repository, release)
        installation = find_installation()
        try:
            self._launch(installation, key)
            self._await_http()
            self.canary()
        except BaseException:
            self.stop()
            raise
        return self

    def canary(self) -> None:
        """Ask every release its golden requests over HTTP. Raises ServingError when one is not answered rightly."""
        with Client(self.http_url, timeout=CANARY_TIMEOUT) as client:
            for release in self.releases:
                for golden in release.golden:
                    answer = client.predict([golden.image_bytes()], golden.strength, version=release.version)[0]
                    wrong = golden.difference(answer.indexes, answer.probabilities)
                    if wrong:
                        raise ServingError(f"classifier {release.version} answers a golden request wrongly: {wrong}")

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the server to end by itself; its exit status, or None when it still runs after `timeout` seconds."""
        if self._process is None:
            return None
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> int | None:
        """Stop the server and remove what it left: processes, shared memory, runtime folder. Safe to call twice.

        Returns its exit status (0 after a clean stop), None when it was not running.
        """
        process, self._process = self._process, None
        status = None
        if process:
            status = end_process(process, KILL_AFTER)
            for leftover in Path("/dev/shm").glob(f"{self.shm_prefix}*"):
                leftover.unlink(missing_ok=True)
        if self._runtime:
            shutil.rmtree(self._runtime, ignore_errors=True)
            self._runtime = None
        return status

    def log_tail(self) -> str:
        """The last lines of the server's log, empty when there are none."""
        if self._log_path is None or not self._log_path.is_file():
            return ""
        lines = self._log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"  {line[:400]}" for line in lines[-TAIL_LINES:])

    def __enter__(self) -> TritonServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _launch(self, installation: Installation, key: str) -> None:
        self._runtime = _runtime_folder(installation, self.repository)
        self._log_path = self.log or self._runtime / "triton.log"
        command = self._command(installation, key, self._runtime)
        self._process = start_process(command, installation.environment, self._runtime, self._log_path)

    def _command(self, installation: Installation, key: str, runtime: Path) -> list[str]:
        return [
            str(installation.server),
            f"--model-repository={runtime / 'repository'}",
            f"--backend-directory={runtime / 'backends'}",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            f"--backend-config=python,stub-timeout-seconds={STUB_START_TIMEOUT}",
            f"--model-config-name={LOCAL_CONFIG}",
            "--model-control-mode=explicit",
            f"--load-model={STUDENT}",
            f"--load-model={CLASSIFIER}",
            # Completing a config would start a throw-away stub per model, and the configs are whole.
            "--disable-auto-complete-config",
            # Otherwise one failed load of a new version turns the server unready while the old one serves on.
            "--strict-readiness=false",
            f"--exit-timeout-secs={EXIT_TIMEOUT}",
            f"--http-address={self.host}",
            f"--grpc-address={self.host}",
            *(f"{option}={port}" for option, port in self.ports.items()),
            f"--http-restricted-api={RESTRICTED}:{ADMIN_HEADER}={key}",
            f"--grpc-restricted-protocol={RESTRICTED}:{ADMIN_HEADER}={key}",
            *self.options,
        ]

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


def _admin_key() -> str:
    """The secret for loading models and the like: the user's, or a new one.

    Triton takes it on its command line alone, so other local users can read it with ps; it is in no log.
    """
    key = os.environ.get(ADMIN_KEY_VARIABLE)
    if key is None:
        return secrets.token_urlsafe(32)
    if not re.fullmatch(r"[A-Za-z0-9_-]{16,}", key):
        raise InputError(f"{ADMIN_KEY_VARIABLE} is not usable; expected at least 16 letters, digits, - or _")
    return key


def _runtime_folder(installation: Installation, repository: Path) -> Path:
    """A folder of links that Triton sees instead of the true paths, which may hold spaces."""
    parent = tempfile.gettempdir()
    runtime = Path(tempfile.mkdtemp(prefix="tailor-triton-", dir=parent if SAFE_PATH.fullmatch(parent) else "/tmp"))
    backend = runtime / "backends" / "python"
    backend.mkdir(parents=True)
    for name, path in installation.backend_files.items():
        (backend / name).symlink_to(path)
    (runtime / "repository").symlink_to(repository.absolute())
    return runtime
