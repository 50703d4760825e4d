"""The Prefect server that a run uses, errors for an unusable server, and the processes that a schedule stops."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import prefect
import pytest

from pipeline.scheduling.prefect_server import PrefectServerError, configured_server, is_healthy
from pipeline.scheduling.trigger import trigger_retrain
from pipeline.shared.errors import ParamsError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


class WrongServer(BaseHTTPRequestHandler):
    """HTTP handler that responds with a page to every path, and with `version` at Prefect's version path."""

    version: str | None = None

    def do_GET(self) -> None:
        version_page = self.version is not None and self.path.endswith("/admin/version")
        self.send_response(200 if version_page or self.version is None else 403)
        self.end_headers()
        self.wfile.write(json.dumps(self.version).encode() if version_page else b"<p>a page</p>")

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def wrong_server(request) -> Iterator[str]:
    """The URL of a wrong server; the parameter is the Prefect version that it reports."""
    server = HTTPServer(("127.0.0.1", 0), type("Handler", (WrongServer,), {"version": request.param}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "value", ["nonsense", "127.0.0.1:4200/api", "ftp://host/api", "http:///api", "http://host:port/api",
              "http://host:99999/api", "http://[::1/api", "http://a b/api"],
)  # fmt: skip
def test_an_invalid_address_is_named(monkeypatch, value):
    monkeypatch.setenv("PREFECT_API_URL", value)
    with pytest.raises(ParamsError) as raised:
        configured_server()
    assert str(raised.value).startswith(f"PREFECT_API_URL is {value!r}; expected an address such as http://")


def test_without_an_address_no_server_is_configured(monkeypatch):
    assert configured_server() is None
    monkeypatch.setenv("PREFECT_API_URL", "")
    assert configured_server() is None


@pytest.mark.parametrize(
    ("wrong_server", "cause"),
    [(None, "Expecting value"), ("1.4.0", "Major versions must match")],
    indirect=["wrong_server"],
)
def test_a_server_of_another_kind_or_version_is_named_without_its_password(monkeypatch, wrong_server, cause):
    monkeypatch.setenv("PREFECT_API_URL", wrong_server.replace("//", "//me:secret@"))
    with pytest.raises(PrefectServerError) as raised:
        configured_server()
    message = str(raised.value)
    assert message.startswith(f"PREFECT_API_URL is {wrong_server!r}, ") and cause in message
    assert "unset it" in message and "secret" not in message and "\n" not in message


@pytest.mark.parametrize("wrong_server", [prefect.__version__], indirect=True)
def test_a_rejected_request_for_a_run_is_an_error_of_one_line(monkeypatch, wrong_server):
    monkeypatch.setenv("PREFECT_API_URL", wrong_server)
    message = rf"^Prefect's server at {wrong_server} rejected the request .*403 Forbidden.*$"
    with pytest.raises(PrefectServerError, match=message):
        trigger_retrain("drift")


def test_a_server_without_http_is_not_healthy():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def greet() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"SSH-2.0-OpenSSH_9\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        assert not is_healthy(f"http://127.0.0.1:{listening.getsockname()[1]}/api")
        thread.join()


ENDS = """
import subprocess, sys
import psutil
from pipeline.shared.owned_process import end_owned_process, start_owned_process
from pipeline.scheduling.schedule import end_runs

wait = "import time; time.sleep(60)"
run = subprocess.Popen([sys.executable, "-c", wait, "/home/me/dogs/owned_process.python/run"])
server = start_owned_process([sys.executable, "-c", wait])
end_runs()
print("run", psutil.pid_exists(run.pid), "server", server.poll() is None)
end_owned_process(server)
"""


def test_a_schedule_that_ends_ends_its_runs_and_leaves_the_server_to_its_owner_process():
    done = subprocess.run([sys.executable, "-c", ENDS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "run False server True\n"
