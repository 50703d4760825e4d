"""Prefect server of one project: on loopback, database inside the project, ends with the process that started it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from types import TracebackType

import psutil

from pipeline.shared.artifacts import write_json
from pipeline.shared.errors import ParamsError, StageError
from pipeline.shared.owned_process import end_leash, start_on_leash
from serving.shared.ports import bypass_proxy_on_loopback, choose_ports

HOME = Path(".prefect")
NOTE = "tailor-server.json"
LOG = "server.log"
HOST = "127.0.0.1"
API_URL = "PREFECT_API_URL"
UI_URL = "PREFECT_UI_URL"  # the beginning of the links that Prefect logs; empty for no links
UI_API_URL = (
    "PREFECT_UI_API_URL"  # API address for the web pages; Prefect's default is port 4200, independent of --port
)
START_WITHIN = 300.0  # seconds; the first start creates the database
ASK_WITHIN = 10.0  # seconds; timeout for a response of the server at PREFECT_API_URL
POLL = 0.1  # seconds


class PrefectServerError(StageError):
    """Prefect's server does not run, cannot start, or does not respond."""


@dataclass(frozen=True)
class _Note:
    """Address and owner process of a server. The start time detects that the process id was reused."""

    url: str
    process: int
    started: float


def settle_environment(home: Path = HOME) -> None:
    """Set Prefect's environment variables before Prefect is imported: its folder, and no telemetry.

    Variables that the user has set are kept.
    """
    bypass_proxy_on_loopback()
    os.environ.setdefault("PREFECT_HOME", str(home.absolute()))
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")


@contextlib.contextmanager
def talking_to(api_url: str, links: bool = True) -> Iterator[None]:
    """Context manager: Prefect uses the API at `api_url`, in this process and in its child processes.

    links: whether Prefect logs links to the server's pages.
    """
    before = {name: os.environ.get(name) for name in (API_URL, UI_URL)}
    os.environ.update({API_URL: api_url} if links else {API_URL: api_url, UI_URL: ""})
    _read_settings_again()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _read_settings_again()


@contextlib.contextmanager
def some_server(home: Path = HOME) -> Iterator[str]:
    """Context manager that gives the API address of a Prefect server, and starts a temporary server if there is none.

    The server at PREFECT_API_URL is used first, then that of the project's schedule. Raises the errors of
    `given_server` and `PrefectServer.start`.
    """
    settle_environment(home)
    url = given_server() or running_server(home)
    with contextlib.ExitStack() as stack:
        temporary = url is None
        if temporary:
            url = stack.enter_context(PrefectServer(home, scheduling=False)).api_url
        stack.enter_context(talking_to(url, links=not temporary))  # a temporary server has no pages
        yield url


def given_server() -> str | None:
    """The API address in PREFECT_API_URL, after a check that it responds; None if not set.

    Call `settle_environment` first. The check uses Prefect's client, which reads the user's keys and certificates.
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
        with talking_to(url), get_client(sync_client=True, httpx_settings={"timeout": ASK_WITHIN}) as client:
            client.raise_for_api_version_mismatch()
    except (RuntimeError, httpx.HTTPError, httpx.InvalidURL) as error:  # Prefect wraps errors in RuntimeError
        said = " ".join(str(error.__cause__ or error).split())
        raise PrefectServerError(
            f"{API_URL} is {without_password(url)!r}, where no Prefect server of use answers ({said}); "
            f"start it, correct {API_URL}, or unset it to have one started"
        ) from error
    return url


def running_server(home: Path = HOME) -> str | None:
    """The API address of the server that `tailor schedule` runs for this project; None if there is none."""
    try:
        note = _Note(**json.loads((home / NOTE).read_text(encoding="utf-8")))
        alive = abs(psutil.Process(note.process).create_time() - note.started) < 1
    except (OSError, ValueError, TypeError, psutil.NoSuchProcess):
        return None
    return note.url if alive and answers(note.url) else None


def answers(api_url: str) -> bool:
    """Health check: whether a Prefect API responds with status 200."""
    bypass_proxy_on_loopback()
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=5) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError, http.client.HTTPException):  # HTTPException: the response is not HTTP
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
        return f"http://{HOST}:{self.port}/api"

    @property
    def ui_url(self) -> str:
        """Address of the web pages; valid after start."""
        return f"http://{HOST}:{self.port}"

    @property
    def _pages(self) -> dict[str, str]:
        """Default settings of the web pages. Version 2 of the pages is off, because it calls amplitude.com."""
        return {UI_API_URL: self.api_url, "PREFECT_SERVER_UI_V2_ENABLED": "false"}

    @property
    def process_id(self) -> int | None:
        """Process id of the server's owner process (owned_process.py), its session leader; None if it does not run."""
        return self._process.pid if self._process else None

    def start(self) -> PrefectServer:
        """Start the server and wait until it responds.

        Raises PrefectServerError with the last line of its log, ServingError if the port is not free.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        self.port = choose_ports(HOST, {"--port": self.port})["--port"]
        services = [] if self.scheduling else ["--no-services", "--no-ui"]
        command = [
            sys.executable,
            "-P",
            "-m",
            "prefect",
            "server",
            "start",
            "--host",
            HOST,
            "--port",
            str(self.port),
            *services,
        ]
        settings = {
            "PREFECT_HOME": str(self.home.absolute()),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "DO_NOT_TRACK": "1",
        }
        with (self.home / LOG).open("a", encoding="utf-8") as log:
            environment = {**self._pages, **_without_api(os.environ), **settings}
            self._process = start_on_leash(command, environment, log)
        try:
            self._await()
        except BaseException:
            self.stop()
            raise
        if self.scheduling:
            me = psutil.Process()
            write_json(self.home / NOTE, {"url": self.api_url, "process": me.pid, "started": me.create_time()})
        return self

    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Stop the server, if it runs."""
        if self.scheduling:
            (self.home / NOTE).unlink(missing_ok=True)
        if self._process is not None:
            end_leash(self._process)
            self._process = None

    def __enter__(self) -> PrefectServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _await(self) -> None:
        deadline = time.monotonic() + START_WITHIN
        while not answers(self.api_url):
            if not self.alive() or time.monotonic() > deadline:
                lines = (self.home / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
                said = lines[-1].strip() if lines else "it said nothing"
                raise PrefectServerError(f"Prefect's server did not start: {said} (see {self.home / LOG})")
            time.sleep(POLL)


def _read_settings_again() -> None:
    if "prefect" in sys.modules:  # a later import reads the settings itself
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


def _check_address(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.split() == [url]
    except ValueError:  # a port that is not a number, an incomplete IPv6 address
        usable = False
    if not usable:
        raise ParamsError(f"{API_URL} is {url!r}; expected an address such as http://{HOST}:4200/api, or none")


def without_password(url: str) -> str:
    """Remove user and password from an address, so that it may be logged."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _without_api(environment: os._Environ[str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name != API_URL}
