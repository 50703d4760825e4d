"""HTTP_PROXY in the environment is not used for loopback."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NO_SERVER = "http://127.0.0.1:9"
CLIENTS = """
import sys, urllib.request, httpx
from serving.shared.ports import bypass_proxy_on_loopback
bypass_proxy_on_loopback()
print(urllib.request.urlopen(sys.argv[1], timeout=5).status, httpx.get(sys.argv[1], timeout=5).status_code)
"""
PREFECT = "import sys; from pipeline.scheduling.prefect_server import is_healthy; print(is_healthy(sys.argv[1]))"


class HealthyServer(http.server.BaseHTTPRequestHandler):
    """HTTP handler that responds to every request with 200."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HealthyServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def run_python(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    proxied = {"http_proxy": NO_SERVER, "HTTP_PROXY": NO_SERVER, "PYTHONPATH": str(ROOT), **environment}
    clean = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    return subprocess.run(
        [sys.executable, *command], env=clean | proxied, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("live", [(), ("--live",)])
def test_the_health_check_bypasses_a_proxy(url: str, live: tuple[str, ...]) -> None:
    ended = run_python(str(ROOT / "serving/deploy/healthcheck.py"), *live, url, f"{url}/metrics")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("no_proxy", ["", "intranet.example", "*"])
def test_http_clients_bypass_a_proxy_on_loopback_and_keep_no_proxy(url: str, no_proxy: str) -> None:
    ended = run_python("-c", CLIENTS + "import os; print(os.environ['no_proxy'])", url, NO_PROXY=no_proxy)
    assert ended.stdout.split()[:2] == ["200", "200"], ended.stderr
    assert ended.stdout.split()[2].startswith(no_proxy)


@pytest.mark.slow
def test_prefects_server_on_loopback_is_reached_without_the_proxy(url: str) -> None:
    assert run_python("-c", PREFECT, url).stdout == "True\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [("retrain",), ("schedule", "--cron", "0 3 * * *"), ("playground", "--url", "http://127.0.0.1:9")]
)
def test_a_socks_proxy_that_prefect_and_gradio_cannot_use_is_one_line(tmp_path: Path, command: tuple[str, ...]) -> None:
    if find_spec("socksio"):
        pytest.skip("socksio is installed")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    ended = run_python(
        "-c", "import os, sys; os.chdir(sys.argv.pop(1)); from pipeline.commands.app import main; sys.exit(main())",
        str(tmp_path), *command, all_proxy="socks5://user:secret@127.0.0.1:9",  # pragma: allowlist secret
    )  # fmt: skip
    assert ended.returncode == 2 and ended.stdout == "", ended.stderr
    assert ended.stderr.startswith("tailor: ALL_PROXY is a SOCKS proxy, which needs the package socksio; ")
    assert ended.stderr.count("\n") == 1 and "secret" not in ended.stderr
