"""Prefect server of one project: on loopback, database inside the project, ends with the process that started it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import psutil

from pipeline.shared.artifacts import write_json
from pipeline.shared.errors import ParamsError, StageError
from pipeline.shared.owned_process import end_owned_process, start_owned_process
from serving.shared.ports import bypass_proxy_on_loopback, check_proxies, choose_ports

HOME = Path(".prefect")
SERVER_RECORD = "tailor-server.json"  # address and owner process of the server that `tailor schedule` runs
LOG = "server.log"
HOST = "127.0.0.1"
API_URL = "PREFECT_API_URL"
UI_URL = "PREFECT_UI_URL"  # the beginning of the links that Prefect logs; empty for no links
UI_API_URL = "PREFECT_UI_API_URL"  # API address for the web pages; Prefect's default is port 4200, whatever --port is
START_TIMEOUT = 300.0  # seconds; the first start creates the database
REQUEST_TIMEOUT = 10.0  # seconds; for a response of the server at PREFECT_API_URL
POLL = 0.1  # seconds


class PrefectServerError(StageError):
    """Prefect's server does not run, cannot start, or does not respond."""


def set_prefect_env(home: Path = HOME) -> None:
    """Set Prefect's environment variables before Prefect is imported: its folder, and no telemetry.

    Variables that the user has set are kept. Raises InputError for a proxy that Prefect cannot use.
    """
    bypass_proxy_on_loopback()
    check_proxies()
    os.environ.setdefault("PREFECT_HOME", str(home.absolute()))
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")


@contextlib.contextmanager
def use_api(api_url: str, links: bool = True) -> Iterator[None]:
    """Context manager: Prefect uses the API at `api_url`, in this process and in its child processes.

    links: whether Prefect logs links to the server's pages.
    """
    before = {name: os.environ.pop(name) for name in (API_URL, UI_URL) if name in os.environ}
    os.environ.update(before | ({API_URL: api_url} if links else {API_URL: api_url, UI_URL: ""}))
    _refresh_settings()
    try:
        yield
    finally:
        for name in (API_URL, UI_URL):
            os.environ.pop(name, None)
        os.environ.update(before)
        _refresh_settings()


@contextlib.contextmanager
def ensure_server(home: Path = HOME) -> Iterator[str]:
    """Context manager that gives the API address of a Prefect server, and starts a temporary server if there is none.

    The server at PREFECT_API_URL is used first, then that of the project's schedule. Raises the errors of
    `configured_server` and `PrefectServer.start`.
    """
    set_prefect_env(home)
    url = configured_server() or running_server(home)
    with contextlib.ExitStack() as stack:
        temporary = url is None
        if temporary:
            url = stack.enter_context(PrefectServer(home, scheduling=False)).api_url
        stack.enter_context(use_api(url, links=not temporary))  # a temporary server has no pages
        yield url


def configured_server() -> str | None:
    """The API address in PREFECT_API_URL, after a check that it responds; None if not set.

    Call `set_prefect_env` first. The check uses Prefect's client, which reads the user's keys and certificates.
    Raises ParamsError if the value is not an address, PrefectServerError if no Prefect server responds there or it has
    another major version.
    """
    url = os.environ.get(API_URL)
    if not url:
        return None
    _check_address(url)  # the import of Prefect fails with an invalid address
    import httpx
    from prefect.client.orchestration import get_client

    try:
        with use_api(url), get_client(sync_client=True, httpx_settings={"timeout": REQUEST_TIMEOUT}) as client:
            client.raise_for_api_version_mismatch()
    except (RuntimeError, httpx.HTTPError, httpx.InvalidURL) as error:  # Prefect wraps errors in RuntimeError
        cause = " ".join(str(error.__cause__ or error).split())
        raise PrefectServerError(
            f"{API_URL} is {without_password(url)!r}, where no usable Prefect server responds ({cause}); "
            f"start it, correct {API_URL}, or unset it to have one started"
        ) from error
    return url


def running_server(home: Path = HOME) -> str | None:
    """The API address of the server that `tailor schedule` runs for this project; None if there is none."""
    try:
        record = json.loads((home / SERVER_RECORD).read_text(encoding="utf-8"))
        # The start time detects that the process id was reused.
        alive = abs(psutil.Process(record["process"]).create_time() - record["started"]) < 1
        return record["url"] if alive and is_healthy(record["url"]) else None
    except (OSError, ValueError, TypeError, KeyError, psutil.NoSuchProcess):
        return None


def is_healthy(api_url: str) -> bool:
    """Health check: whether a Prefect API responds with status 200."""
    bypass_proxy_on_loopback()
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=5) as response:
            return response.status == 200
    except (OSError, http.client.HTTPException):  # HTTPException: the response is not HTTP
        return False


class PrefectServer:
    """Context manager that starts and stops one Prefect server; its log is server.log in `home`.

    port: 0 for any free port, which later starts reuse. scheduling: run the services that create runs of schedules, and
    the UI; else the API only.
    """

    def __init__(self, home: Path = HOME, port: int = 0, scheduling: bool = True) -> None:
        self.home = home
        self.scheduling = scheduling
        self.port = port
        self._process: Popen[str] | None = None

    @property
    def api_url(self) -> str:
        """API address for clients; valid after start."""
        return f"{self.ui_url}/api"

    @property
    def ui_url(self) -> str:
        """Address of the web pages; valid after start."""
        return f"http://{HOST}:{self.port}"

    def start(self) -> PrefectServer:
        """Start the server and wait until it responds.

        Raises PrefectServerError with the last line of its log, ServingError if the port is not free.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        self.port = choose_ports(HOST, {"--port": self.port})["--port"]
        command = [sys.executable, "-P", "-m", "prefect", "server", "start", "--host", HOST, "--port", str(self.port)]
        command += [] if self.scheduling else ["--no-services", "--no-ui"]
        # The user's variables replace these. Version 2 of the pages is off, because it calls amplitude.com.
        defaults = {UI_API_URL: self.api_url, "PREFECT_SERVER_UI_V2_ENABLED": "false"}
        settings = {
            "PREFECT_HOME": str(self.home.absolute()),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "DO_NOT_TRACK": "1",
        }
        environment = defaults | {name: value for name, value in os.environ.items() if name != API_URL} | settings
        with (self.home / LOG).open("a", encoding="utf-8") as log:
            self._process = start_owned_process(command, environment, log)
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        if self.scheduling:
            owner = psutil.Process()
            record = {"url": self.api_url, "process": owner.pid, "started": owner.create_time()}
            write_json(self.home / SERVER_RECORD, record)
        return self

    def is_running(self) -> bool:
        """Whether the server's process runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Stop the server, if it runs."""
        if self.scheduling:
            (self.home / SERVER_RECORD).unlink(missing_ok=True)
        if self._process is not None:
            end_owned_process(self._process)
            self._process = None

    def __enter__(self) -> PrefectServer:
        return self.start()

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not is_healthy(self.api_url):
            if not self.is_running() or time.monotonic() > deadline:
                lines = (self.home / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
                cause = lines[-1].strip() if lines else "it printed nothing"
                raise PrefectServerError(f"Prefect's server did not start: {cause} (see {self.home / LOG})")
            time.sleep(POLL)


def _refresh_settings() -> None:
    if "prefect" in sys.modules:  # a later import reads the settings itself
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


def _check_address(url: str) -> None:
    with contextlib.suppress(ValueError):  # a port that is not a number, an incomplete IPv6 address
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.split() == [url]:
            return
    raise ParamsError(f"{API_URL} is {url!r}; expected an address such as http://{HOST}:4200/api, or none")


def without_password(url: str) -> str:
    """Remove user and password from an address, so that it may be logged."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
