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

from pipeline.scheduling.prefect_server import PrefectServerError, answers, given_server
from pipeline.scheduling.trigger import trigger_retrain
from pipeline.shared.errors import ParamsError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


class Other(BaseHTTPRequestHandler):
    """HTTP handler that responds with a page to every path, and with `version` at Prefect's version path."""

    version: str | None = None

    def do_GET(self) -> None:
        known = self.version is not None and self.path.endswith("/admin/version")
        self.send_response(200 if known or self.version is None else 403)
        self.end_headers()
        self.wfile.write(json.dumps(self.version).encode() if known else b"<p>a page</p>")

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def other(request) -> Iterator[str]:
    """The URL of a wrong server; the parameter is the Prefect version that it reports."""
    server = HTTPServer(("127.0.0.1", 0), type("Handler", (Other,), {"version": request.param}))
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
def test_a_value_that_is_no_address_is_named(monkeypatch, value):
    monkeypatch.setenv("PREFECT_API_URL", value)
    with pytest.raises(ParamsError) as raised:
        given_server()
    assert str(raised.value).startswith(f"PREFECT_API_URL is {value!r}; expected an address such as http://")


def test_no_value_and_an_empty_one_name_no_server(monkeypatch):
    assert given_server() is None
    monkeypatch.setenv("PREFECT_API_URL", "")
    assert given_server() is None


@pytest.mark.parametrize(
    ("other", "said"), [(None, "Expecting value"), ("1.4.0", "Major versions must match")], indirect=["other"]
)
def test_a_server_that_is_not_prefects_or_of_another_major_version_is_named_without_its_password(
    monkeypatch, other, said
):
    monkeypatch.setenv("PREFECT_API_URL", other.replace("//", "//me:secret@"))
    with pytest.raises(PrefectServerError) as raised:
        given_server()
    message = str(raised.value)
    assert message.startswith(f"PREFECT_API_URL is {other!r}, ") and said in message
    assert "unset it" in message and "secret" not in message and "\n" not in message


@pytest.mark.parametrize("other", [prefect.__version__], indirect=True)
def test_a_server_that_takes_no_request_for_a_run_is_an_error_of_one_line(monkeypatch, other):
    monkeypatch.setenv("PREFECT_API_URL", other)
    with pytest.raises(PrefectServerError, match=rf"^Prefect's server at {other} was asked .*403 Forbidden.*$"):
        trigger_retrain("drift")


def test_what_speaks_no_http_is_no_server_that_answers():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def greet() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"SSH-2.0-OpenSSH_9\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        assert not answers(f"http://127.0.0.1:{listening.getsockname()[1]}/api")
        thread.join()


ENDS = """
import subprocess, sys
import psutil
from pipeline.shared.owned_process import end_leash, start_on_leash
from pipeline.scheduling.schedule import _end_runs

wait = "import time; time.sleep(60)"
run = subprocess.Popen([sys.executable, "-c", wait, "/home/me/dog-leashes/leash.python/run"])
server = start_on_leash([sys.executable, "-c", wait])
_end_runs()
print("run", psutil.pid_exists(run.pid), "server", server.poll() is None)
end_leash(server)
"""


def test_a_schedule_that_ends_ends_runs_whose_project_is_called_leash_and_leaves_the_server_to_its_leash():
    done = subprocess.run([sys.executable, "-c", ENDS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "run False server True\n"
