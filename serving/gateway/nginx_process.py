"""Run nginx as the gateway: check its configuration, start, restart and stop it."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serving.gateway.config import Gateway
from serving.shared.atomic import write_file
from serving.shared.errors import ServingError
from serving.shared.logs import ServerLog
from serving.shared.ports import choose_ports
from serving.shared.process import POLL, end_session, start_process, wait_for

START_TIMEOUT = 20.0  # seconds
PACKAGES = "nginx-light libnginx-mod-http-lua libnginx-mod-stream lua-cjson"
MODULES = ("ngx_http_lua_module.so", "ngx_stream_module.so")
# Debian installs nginx in /usr/sbin, which is not on the PATH of an unprivileged user.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])


@dataclass(frozen=True)
class RestartDelay:
    """Backoff before nginx is restarted, in seconds: `first`, doubled each time up to `longest`.

    A run of at least `stable` seconds resets the delay to `first`. The number of restarts is not limited.
    """

    first: float = 0.1
    longest: float = 30.0
    stable: float = 30.0


class GatewayProcess:
    """nginx with the configuration of a Gateway, in a separate session. A context manager, or start and stop.

    log: file for nginx's output (None: kept only while nginx runs). When start raises, no process remains.
    """

    def __init__(self, gateway: Gateway, log: Path | None = None) -> None:
        self.gateway = gateway
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._nginx = ""
        self._output: ServerLog | None = None

    @property
    def http_url(self) -> str:
        """URL for HTTP clients."""
        return f"http{'s' if self.gateway.certificate else ''}://{self.gateway.host}:{self.gateway.http_port}"

    @property
    def grpc_url(self) -> str:
        """URL for gRPC clients."""
        return f"grpc{'s' if self.gateway.certificate else ''}://{self.gateway.host}:{self.gateway.grpc_port}"

    @property
    def process_id(self) -> int | None:
        """Process id of nginx's master; None when nginx is not running."""
        return self._process.pid if self._process else None

    def start(self) -> GatewayProcess:
        """Check the configuration and start nginx. Raises ServingError: nginx missing, nginx's error, port in use."""
        if self._process:
            raise ServingError("this gateway is already running; stop it first")
        self._nginx = find_nginx(self.gateway)
        check_open_files(self.gateway)
        # nginx would retry the bind for seconds, while another process on the port receives the requests.
        choose_ports(str(self.gateway.host), {"http_port": self.gateway.http_port, "grpc_port": self.gateway.grpc_port})
        self._folder = Path(tempfile.mkdtemp(prefix="tailor-gateway-", dir="/tmp"))
        # Unprivileged workers need to traverse it to reach the folders that nginx creates for them.
        self._folder.chmod(0o711)
        try:
            config = write_config(self.gateway, self._folder)
            check_config(self._nginx, config)
            self._output = ServerLog(self.log)
            self._start_nginx()
        except BaseException:
            self.stop()
            raise
        return self

    def keep_running(self, report: Callable[[str], None], delay: RestartDelay | None = None) -> None:
        """Restart nginx each time its master process exits; never returns. report: called with one line per restart.

        The workers of a killed master still accept connections and hold the ports, so they are killed first.
        """
        delay = delay or RestartDelay()
        pause, started, reason = delay.first, time.monotonic(), ""
        while True:
            reason = reason or f"nginx exited with status {self.wait()}"
            if time.monotonic() - started >= delay.stable:
                pause = delay.first
            report(f"{reason}; restarting it in {pause:g} s")
            end_session(self._process, timeout=0)
            time.sleep(pause)
            pause, started, reason = min(2 * pause, delay.longest), time.monotonic(), ""
            try:
                self._start_nginx()
            except (ServingError, OSError) as error:
                first, *log = str(error).splitlines()
                reason = f"{first} {log[-1].strip()}" if log else first

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for nginx to exit; return its exit status, or None when it still runs after `timeout` seconds."""
        return wait_for(self._process, timeout)

    def stop(self) -> int | None:
        """Finish running requests, stop nginx and remove its folder; return its exit status. Safe to call twice."""
        process, self._process = self._process, None
        status = None
        if process:
            process.send_signal(signal.SIGQUIT)
            deadline = time.monotonic() + self.gateway.shutdown_seconds + 2
            time.sleep(POLL)
            while process.poll() is None and self._has_open_requests() and time.monotonic() < deadline:
                time.sleep(POLL)
            status = end_session(process, timeout=5.0)  # also ends workers that outlive a killed master
        if self._output:
            self._output.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        return status

    def __enter__(self) -> GatewayProcess:
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def log_tail(self) -> str:
        """Return the last lines of nginx's output; empty when there are none."""
        return self._output.tail() if self._output else ""

    def _has_open_requests(self) -> bool:
        """Return whether nginx's http block has open connections: state 03 (connected) of its Unix sockets.

        nginx's graceful shutdown would also wait, up to worker_shutdown_timeout, for idle callers.
        """
        entries = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
        return any(entry[-1].startswith(f"{self._folder}/") and entry[5] == "03" for entry in entries)

    def _start_nginx(self) -> None:
        """Start nginx with the configuration in its folder, and wait until it listens."""
        for socket_path in self._folder.glob("*.sock"):  # left by a killed nginx; binding them would fail
            socket_path.unlink()
        command = [self._nginx, "-p", str(self._folder), "-c", str(self._folder / "nginx.conf"), "-e", "stderr"]
        self._process = start_process(command, dict(os.environ), self._folder)
        self._output.follow(self._process.stdout)
        self._wait_for_ports()

    def _wait_for_ports(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        for port in (self.gateway.http_port, self.gateway.grpc_port):
            while not _listens(str(self.gateway.host), port):
                status = self.wait(POLL)
                if status is not None:
                    self._output.drain()
                    raise ServingError(f"nginx exited with status {status} while it started:\n{self.log_tail()}")
                if time.monotonic() > deadline:
                    raise ServingError(f"nginx does not listen on port {port} after {START_TIMEOUT:.0f} s")


def find_nginx(gateway: Gateway, search_path: str = SEARCH_PATH) -> str:
    """Return the path of nginx. Raises ServingError with install instructions for nginx or a missing module."""
    nginx = shutil.which("nginx", path=search_path)
    missing = [str(gateway.modules / name) for name in MODULES if not (gateway.modules / name).is_file()]
    if nginx is None or missing:
        raise ServingError(
            f"{missing[0] if nginx else 'nginx'} is missing; install it (Debian: apt install {PACKAGES})"
        )
    return nginx


def check_open_files(gateway: Gateway) -> None:
    """Raise ServingError if the hard limit on open files is below what nginx needs; nginx would only log a warning."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < gateway.open_files:
        raise ServingError(
            f"ulimit -n (hard) is {limit}; connections={gateway.connections} needs {gateway.open_files} open files: "
            f"raise it with ulimit -Hn {gateway.open_files}, or lower --connections"
        )


def check_config(nginx: str, config: Path) -> None:
    """Test a configuration with `nginx -t`. Raises ServingError with the first line of nginx's error."""
    tested = subprocess.run(
        [nginx, "-t", "-q", "-p", str(config.parent), "-c", str(config), "-e", "stderr"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tested.returncode:
        raise ServingError(f"nginx rejects the configuration: {tested.stderr.strip().splitlines()[0]}")


def write_config(gateway: Gateway, folder: Path, runtime: Path | None = None) -> Path:
    """Write nginx.conf and its Lua files into a folder; return nginx.conf's path. runtime: see Gateway.render."""
    config = folder / "nginx.conf"
    write_file(config, gateway.render(folder, runtime))
    for source in sorted(Path(__file__).with_name("lua").glob("*.lua")):
        write_file(folder / source.name, source.read_bytes())
        # Unprivileged nginx workers read it.
        (folder / source.name).chmod(0o644)
    return config


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0
