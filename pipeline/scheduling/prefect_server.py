"""Prefect's own server for one project: on loopback, its database inside the project, ended with whoever started it."""

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
    "PREFECT_UI_API_URL"  # where the pages send their requests; Prefect's default is port 4200, whatever --port is
)
START_WITHIN = 300.0  # seconds; the first start makes the database
ASK_WITHIN = 10.0  # seconds that a server which PREFECT_API_URL names gets to answer
POLL = 0.1  # seconds


class PrefectServerError(StageError):
    """Prefect's server does not run, or cannot."""


@dataclass(frozen=True)
class _Note:
    """Where a server runs, and whose it is: a process id alone may have been given to another since."""

    url: str
    process: int
    started: float


def settle_environment(home: Path = HOME) -> None:
    """Set what Prefect reads from the environment, before it is imported: its folder, and that nobody is told anything.

    What the user has set stays.
    """
    bypass_proxy_on_loopback()
    os.environ.setdefault("PREFECT_HOME", str(home.absolute()))
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")


@contextlib.contextmanager
def talking_to(api_url: str, links: bool = True) -> Iterator[None]:
    """Have Prefect talk to the server at `api_url` for a while, in this process and in those that it starts.

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
    """The API of a Prefect server for the time of a run: the user's own, else the project's, else a temporary one.

    Raises as `given_server` and `PrefectServer.start` do.
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
    """The API that PREFECT_API_URL names; None where it names none. To be called after `settle_environment`.

    Prefect's own client asks, which knows the user's keys and certificates. Raises ParamsError where the value is no
    address, PrefectServerError where no Prefect server answers there, or one of another major version does.
    """
    url = os.environ.get(API_URL)
    if not url:
        return None
    _check_address(url)  # Prefect cannot even be imported with an address that it cannot read
    import httpx
    from prefect.client.orchestration import get_client

    try:
        with talking_to(url), get_client(sync_client=True, httpx_settings={"timeout": ASK_WITHIN}) as client:
            client.raise_for_api_version_mismatch()
    except (RuntimeError, httpx.HTTPError, httpx.InvalidURL) as error:  # the first is Prefect's own, around any other
        said = " ".join(str(error.__cause__ or error).split())
        raise PrefectServerError(
            f"{API_URL} is {without_password(url)!r}, where no Prefect server of use answers ({said}); "
            f"start it, correct {API_URL}, or unset it to have one started"
        ) from error
    return url


def running_server(home: Path = HOME) -> str | None:
    """The API of the server that `tailor schedule` runs for this project; None where none does."""
    try:
        note = _Note(**json.loads((home / NOTE).read_text(encoding="utf-8")))
        alive = abs(psutil.Process(note.process).create_time() - note.started) < 1
    except (OSError, ValueError, TypeError, psutil.NoSuchProcess):
        return None
    return note.url if alive and answers(note.url) else None


def answers(api_url: str) -> bool:
    """Whether a Prefect API is there and well."""
    bypass_proxy_on_loopback()
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=5) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError, http.client.HTTPException):  # the last: whoever answers speaks no HTTP
        return False


class PrefectServer:
    """One Prefect server. scheduling: with the services that make runs of schedules, and the UI; else the bare API.

    A context manager. port: 0 for any free one, kept for later starts. Its log is server.log in `home`.
    """

    def __init__(self, home: Path = HOME, port: int = 0, scheduling: bool = True) -> None:
        self.home = home
        self.scheduling = scheduling
        self.port = port
        self._process: Popen[str] | None = None

    @property
    def api_url(self) -> str:
        """Address for clients, known after start."""
        return f"http://{HOST}:{self.port}/api"

    @property
    def ui_url(self) -> str:
        """Address for people, known after start."""
        return f"http://{HOST}:{self.port}"

    @property
    def _pages(self) -> dict[str, str]:
        """Settings of the pages, where the user has set no others. The second version of the pages calls amplitude.com."""
        return {UI_API_URL: self.api_url, "PREFECT_SERVER_UI_V2_ENABLED": "false"}

    @property
    def process_id(self) -> int | None:
        """Of the server's leash, which leads its session; None when it does not run."""
        return self._process.pid if self._process else None

    def start(self) -> PrefectServer:
        """Start it and wait until it answers. Raises PrefectServerError with the end of its log, ServingError for a port."""
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
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End it, if it runs."""
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
    if "prefect" in sys.modules:  # it reads them when it is first imported
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


def _check_address(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.split() == [url]
    except ValueError:  # a port that is no number, half an IPv6 address
        usable = False
    if not usable:
        raise ParamsError(f"{API_URL} is {url!r}; expected an address such as http://{HOST}:4200/api, or none")


def without_password(url: str) -> str:
    """An address as it may be shown and logged."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _without_api(environment: os._Environ[str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name != API_URL}
