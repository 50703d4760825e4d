"""nginx as the gateway: checked, started, waited for, stopped."""

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
# Debian's nginx lies in /usr/sbin, which is on no plain user's PATH.
PLACES = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])


@dataclass(frozen=True)
class RestartDelay:
    """Seconds to wait before nginx is restarted: `first`, doubled each time up to `longest`.

    A run of at least `stable` seconds resets the delay to `first`. There is no last attempt.
    """

    first: float = 0.1
    longest: float = 30.0
    stable: float = 30.0


class GatewayProcess:
    """nginx with the configuration of a Gateway, in a session of its own. A context manager, or start and stop.

    log: what nginx prints (None: kept only while it runs). start leaves nothing running when it raises.
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
        """Address for HTTP clients."""
        return f"http{'s' if self.gateway.certificate else ''}://{self.gateway.host}:{self.gateway.http_port}"

    @property
    def grpc_url(self) -> str:
        """Address for gRPC clients."""
        return f"grpc{'s' if self.gateway.certificate else ''}://{self.gateway.host}:{self.gateway.grpc_port}"

    @property
    def process_id(self) -> int | None:
        """nginx's process id; None when it does not run."""
        return self._process.pid if self._process else None

    def start(self) -> GatewayProcess:
        """Check the configuration and start nginx. Raises ServingError: nginx missing, its complaint, a port in use."""
        if self._process:
            raise ServingError("this gateway runs already; stop it first")
        self._nginx = find_nginx(self.gateway)
        check_open_files(self.gateway)
        # nginx would retry for seconds, and meanwhile another process on the port would answer for it.
        choose_ports(str(self.gateway.host), {"http_port": self.gateway.http_port, "grpc_port": self.gateway.grpc_port})
        self._folder = Path(tempfile.mkdtemp(prefix="tailor-gateway-", dir="/tmp"))
        # Workers without root's rights pass through it to the folders that nginx creates for them.
        self._folder.chmod(0o711)
        try:
            config = write_config(self.gateway, self._folder)
            check_config(self._nginx, config)
            self._output = ServerLog(self.log)
            self._launch()
        except BaseException:
            self.stop()
            raise
        return self

    def keep_running(self, report: Callable[[str], None], delay: RestartDelay | None = None) -> None:
        """Restart nginx each time its master process ends; never returns. report: called with one line per restart.

        The workers of a killed master still accept connections, and hold the ports that its successor needs, so they
        are killed first.
        """
        delay = delay or RestartDelay()
        pause, started, reason = delay.first, time.monotonic(), ""
        while True:
            reason = reason or f"nginx ended by itself with status {self.wait()}"
            if time.monotonic() - started >= delay.stable:
                pause = delay.first
            report(f"{reason}; restarting it in {pause:g} s")
            end_session(self._process, patience=0)
            time.sleep(pause)
            pause, started, reason = min(2 * pause, delay.longest), time.monotonic(), ""
            try:
                self._launch()
            except (ServingError, OSError) as error:
                first, *log = str(error).splitlines()
                reason = f"{first} {log[-1].strip()}" if log else first

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for nginx to end by itself; its exit status, or None when it still runs after `timeout` seconds."""
        return wait_for(self._process, timeout)

    def stop(self) -> int | None:
        """Let running requests finish, then end nginx and remove its folder. Safe to call twice. Returns its exit status."""
        process, self._process = self._process, None
        status = None
        if process:
            process.send_signal(signal.SIGQUIT)
            deadline = time.monotonic() + self.gateway.shutdown_seconds + 2
            time.sleep(POLL)
            while process.poll() is None and self._has_requests() and time.monotonic() < deadline:
                time.sleep(POLL)
            status = end_session(process, patience=5.0)  # workers outlive a master that was killed
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
        """The last lines that nginx printed, empty when there are none."""
        return self._output.tail() if self._output else ""

    def _has_requests(self) -> bool:
        """Whether nginx's http block has open connections: state 3 of the accepted ends of its Unix sockets.

        nginx itself would also wait for idle callers that have not closed their end, worker_shutdown_timeout long.
        """
        entries = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
        return any(entry[-1].startswith(f"{self._folder}/") and entry[5] == "03" for entry in entries)

    def _launch(self) -> None:
        """Start nginx in its folder, whose configuration is checked, and wait until it listens."""
        for socket_path in self._folder.glob("*.sock"):  # of an nginx that was killed; this one could not bind them
            socket_path.unlink()
        command = [self._nginx, "-p", str(self._folder), "-c", str(self._folder / "nginx.conf"), "-e", "stderr"]
        self._process = start_process(command, dict(os.environ), self._folder)
        self._output.follow(self._process.stdout)
        self._await_ports()

    def _await_ports(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        for port in (self.gateway.http_port, self.gateway.grpc_port):
            while not _listens(str(self.gateway.host), port):
                status = self.wait(POLL)
                if status is not None:
                    self._output.drain()
                    raise ServingError(f"nginx ended with status {status} while it started:\n{self.log_tail()}")
                if time.monotonic() > deadline:
                    raise ServingError(f"nginx does not listen on port {port} after {START_TIMEOUT:.0f} s")


def find_nginx(gateway: Gateway) -> str:
    """The nginx program. Raises ServingError saying how to get it, or its module for Lua."""
    nginx = shutil.which("nginx", path=PLACES)
    missing = [str(gateway.modules / name) for name in MODULES if not (gateway.modules / name).is_file()]
    if nginx is None or missing:
        raise ServingError(
            f"{missing[0] if nginx else 'nginx'} is missing; install it (Debian: apt install {PACKAGES})"
        )
    return nginx


def check_open_files(gateway: Gateway) -> None:
    """Raises ServingError if the hard limit on open files is below what nginx needs; nginx would only log it."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < gateway.open_files:
        raise ServingError(
            f"ulimit -n (hard) is {limit}; connections={gateway.connections} needs {gateway.open_files} open files: "
            f"raise it with ulimit -Hn {gateway.open_files}, or lower --connections"
        )


def check_config(nginx: str, config: Path) -> None:
    """Let nginx read a configuration. Raises ServingError with the first line of its complaint."""
    ended = subprocess.run(
        [nginx, "-t", "-q", "-p", str(config.parent), "-c", str(config), "-e", "stderr"],
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise ServingError(f"nginx refuses the configuration: {ended.stderr.strip().splitlines()[0]}")


def write_config(gateway: Gateway, folder: Path, runtime: Path | None = None) -> Path:
    """Write nginx.conf and the Lua that it names into a folder; nginx.conf's path. For `runtime` see Gateway.render."""
    config = folder / "nginx.conf"
    write_file(config, gateway.render(folder, runtime))
    for source in sorted(Path(__file__).with_name("lua").glob("*.lua")):
        write_file(folder / source.name, source.read_bytes())
        # nginx's workers read it after they dropped root's rights.
        (folder / source.name).chmod(0o644)
    return config


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0
