"""nginx under `tailor gateway`: restarted when its master exits; an error where it may not open enough files."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import picture

from serving.client.sync_client import Client
from serving.gateway.config import Gateway
from serving.gateway.nginx_process import PACKAGES, SEARCH_PATH, GatewayProcess, RestartDelay, write_config
from serving.server.triton_server import TritonServer
from serving.shared.errors import ServingError
from serving.shared.ports import choose_ports
from tests.support import bad_connections
from tests.support.running_gateway import require_nginx, running_gateway, workers_of

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.end_to_end


def kill_master(process_id: int) -> list[psutil.Process]:
    """Kill nginx's master process; return the remaining workers."""
    master = psutil.Process(process_id)
    workers = workers_of(process_id)
    assert master.name() == "nginx" and workers
    master.kill()
    return workers


class Ended(Exception):
    """Raised to end keep_running in a test."""


@contextmanager
def kept_running(gateway: GatewayProcess, delay: RestartDelay) -> Iterator[queue.Queue[str]]:
    """Context manager: keep_running in a thread; yields its reported lines. The block's last kill ends it."""
    lines: queue.Queue[str] = queue.Queue()
    ending = threading.Event()

    def report(line: str) -> None:
        if ending.is_set():
            raise Ended
        lines.put(line)

    def run() -> None:
        with contextlib.suppress(Ended):
            gateway.keep_running(report, delay)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield lines
    finally:
        ending.set()
        kill_master(gateway.process_id)
        thread.join()


def await_ready(gateway: GatewayProcess, other_than: int) -> int:
    """Wait until an nginx other than the given one responds; return its process id."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if gateway.process_id != other_than:
            with contextlib.suppress(Exception), Client(gateway.http_url) as client:
                client.predict([picture(1)])
                return gateway.process_id
        time.sleep(0.05)
    raise AssertionError("no nginx that answers after 10 s")


def test_command_restarts_nginx_when_its_master_is_killed_and_still_ends_with_status_0(server: TritonServer) -> None:
    require_nginx()
    ports = choose_ports("127.0.0.1", {"--http-port": 0, "--grpc-port": 0})
    upstream = ["--upstream-http", server.http_url[7:], "--upstream-grpc", server.grpc_url[7:]]
    command = [sys.executable, "-m", "serving.commands", "gateway", *upstream, "--workers", "1"]
    command += [text for option, port in ports.items() for text in (option, str(port))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = process.stdout.readline().split()[1]
    orphans = []
    for _ in range(2):
        [master] = psutil.Process(process.pid).children()
        orphans += kill_master(master.pid)
        line = process.stderr.readline()
        assert re.fullmatch(r"tailor: nginx exited with status -9; restarting it in 0\.\d s\n", line)
        deadline = time.monotonic() + 10
        answered = None
        while answered is None and time.monotonic() < deadline:
            with contextlib.suppress(Exception), Client(url) as client:
                answered = client.predict([picture(1)])[0].version
        assert answered == 1
        assert not [one for one in orphans if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("stopped\n", "")
    assert process.returncode == 0


def test_the_delay_grows_only_while_nginx_exits_immediately(server: TritonServer) -> None:
    with running_gateway(server) as gateway:
        with kept_running(gateway, RestartDelay(first=0.1, longest=0.3, stable=1000)) as lines:
            for pause in ("0.1", "0.2", "0.3", "0.3"):
                ended = gateway.process_id
                kill_master(ended)
                assert lines.get(timeout=10).endswith(f"restarting it in {pause} s")
                await_ready(gateway, other_than=ended)
        gateway.stop()
    with running_gateway(server) as gateway, kept_running(gateway, RestartDelay(first=0.1, stable=0)) as lines:
        for _ in range(3):
            ended = gateway.process_id
            kill_master(ended)
            assert lines.get(timeout=10).endswith("restarting it in 0.1 s")
            await_ready(gateway, other_than=ended)


def test_a_failed_start_is_retried_until_it_succeeds(server: TritonServer, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    with (
        running_gateway(server, access_log=logs / "access.jsonl") as gateway,
        kept_running(gateway, RestartDelay(first=0.1, longest=0.2)) as lines,
    ):
        moved, ended = logs.rename(tmp_path / "moved"), gateway.process_id
        kill_master(ended)
        assert lines.get(timeout=10) == "nginx exited with status -9; restarting it in 0.1 s"
        for _ in range(3):
            assert re.fullmatch(
                r"nginx exited with status 1 while it started: .*access\.jsonl.* failed \(2: .*; restarting it in 0\.2 s",
                lines.get(timeout=10),
            )
        moved.rename(logs)
        await_ready(gateway, other_than=ended)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that unprivileged nginx workers can enter, unlike pytest's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


def test_the_entry_point_of_the_image_restarts_after_it_was_killed(public_folder: Path) -> None:
    """A pod's /tmp outlives its containers: the Unix sockets of a killed nginx still exist."""
    require_nginx()
    ports = choose_ports("127.0.0.1", {"http_port": 0, "grpc_port": 0})
    config, runtime = public_folder / "config", public_folder / "runtime"
    for folder in (config, runtime):
        folder.mkdir()
    write_config(Gateway(**ports, workers=1), config, runtime)
    [entry_point] = re.findall(r"^ENTRYPOINT (\[\"sh.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    command = [
        word.replace("/tmp", str(runtime)).replace("/etc/tailor-gateway", str(config))
        for word in json.loads(entry_point)
    ]
    for _ in range(2):
        process = subprocess.Popen(command, env={"PATH": SEARCH_PATH}, stderr=subprocess.PIPE, start_new_session=True)
        deadline = time.monotonic() + 10
        status = 0
        while status != 200 and process.poll() is None and time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{ports['http_port']}/gateway/health", timeout=5) as answer,
            ):
                status = answer.status
        left = list(runtime.glob("*.sock"))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert (status, process.communicate()[1]) == (200, b"")
        assert left


def test_nginx_packages_are_the_same_wherever_they_are_listed() -> None:
    for name in ("Dockerfile", ".ci/run", "docs/security.md", "serving/deploy/tailor-gateway.service"):
        text = (ROOT / name).read_text()
        assert [package for package in PACKAGES.split() if package not in text] == [], name


@contextmanager
def slow_upstream(seconds: float) -> Iterator[str]:
    """An HTTP server in place of Triton that responds to one request after some seconds; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            accepted, _ = listening.accept()
            with accepted:
                accepted.recv(65536)
                time.sleep(seconds)
                accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        with ThreadPoolExecutor(1) as pool:
            pool.submit(answer)
            yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_stop_waits_for_running_requests_and_not_for_idle_callers(server: TritonServer) -> None:
    with (
        slow_upstream(1.5) as address,
        running_gateway(server, upstream_http=address, shutdown_seconds=10) as gateway,
        bad_connections.connected(gateway.gateway.http_port) as idle,
        bad_connections.connected(gateway.gateway.http_port) as busy,
    ):
        idle.sendall(bad_connections.odd("GET /gateway/health HTTP/1.1"))
        assert idle.recv(4096).startswith(b"HTTP/1.1 200")
        busy.sendall(bad_connections.odd("GET /v2 HTTP/1.1"))
        time.sleep(0.3)
        started = time.monotonic()
        assert gateway.stop() == 0
        assert 0.5 < time.monotonic() - started < 6
        assert busy.recv(4096).endswith(b"\r\n\r\nok")


def test_too_low_a_limit_on_open_files_is_an_error_before_nginx_starts() -> None:
    require_nginx()
    command = [sys.executable, "-m", "serving.commands", "gateway"]
    limited = ["bash", "-c", 'ulimit -n 1000 && exec "$@"', "-", *command]
    ended = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    needed = Gateway().open_files
    assert f"ulimit -n (hard) is 1000; connections=512 needs {needed} open files" in ended.stderr


@pytest.mark.parametrize("connections", [8, 512])
def test_a_gateway_starts_with_as_many_open_files_as_it_needs(connections: int) -> None:
    """The number in the error message is sufficient."""
    require_nginx()
    ports = choose_ports("127.0.0.1", {"--http-port": 0, "--grpc-port": 0})
    options = [text for option, port in ports.items() for text in (option, str(port))]
    command = [sys.executable, "-m", "serving.commands", "gateway", "--connections", str(connections), *options]
    limited = ["bash", "-c", f'ulimit -n {Gateway(connections=connections).open_files} && exec "$@"', "-", *command]
    process = subprocess.Popen(limited, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    process.terminate()
    assert process.communicate(timeout=30) == ("stopped\n", "")
    assert first.startswith("ready ")


def test_a_port_in_use_fails_the_start_and_leaves_no_process(server: TritonServer) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with (
            pytest.raises(ServingError, match=r"http_port .*: the port is in use on 127.0.0.1"),
            running_gateway(server, http_port=other.getsockname()[1]),
        ):
            pass
    assert not [process for process in psutil.Process().children(recursive=True) if process.name() == "nginx"]


def test_the_command_runs_until_sigterm_and_leaves_no_process(server: TritonServer) -> None:
    require_nginx()
    ports = choose_ports("127.0.0.1", {"--http-port": 0, "--grpc-port": 0})
    upstream = ["--upstream-http", server.http_url[7:], "--upstream-grpc", server.grpc_url[7:], "--workers", "1"]
    command = [sys.executable, "-m", "serving.commands", "gateway", *upstream]
    command += [text for option, port in ports.items() for text in (option, str(port))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ready, url, _ = process.stdout.readline().split()
    assert ready == "ready"
    with Client(url) as client:
        assert client.predict([picture(1)])[0].version == 1
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    process.terminate()
    assert process.communicate(timeout=30) == ("stopped\n", "")
    assert process.returncode == 0
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_a_second_sigterm_neither_interrupts_nor_extends_the_stop_of_a_hanging_nginx() -> None:
    require_nginx()
    ports = choose_ports("127.0.0.1", {"--http-port": 0, "--grpc-port": 0})
    command = [sys.executable, "-m", "serving.commands", "gateway", "--workers", "1"]
    command += [text for option, port in ports.items() for text in (option, str(port))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("ready ")
    family = psutil.Process(process.pid).children(recursive=True)
    for nginx in family:
        nginx.suspend()  # neither SIGQUIT nor SIGTERM ends it
    process.terminate()
    time.sleep(0.5)
    process.terminate()
    # Without the second signal the same: 5 s until SIGKILL, up to 12 s more if requests are open.
    try:
        assert process.communicate(timeout=20) == ("stopped\n", "")
        assert process.returncode == 0
        assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    finally:
        for survivor in [process, *family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()
