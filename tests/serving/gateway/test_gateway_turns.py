"""Slots for costly requests in the gateway's configuration: callers that do not read, disconnect, or lose a worker."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from serving.gateway.nginx_process import GatewayProcess
from tests.support import bad_connections
from tests.support.bad_requests import TensorRequest, classifier, over_http, solid_webp
from tests.support.running_gateway import running_gateway

pytestmark = pytest.mark.slow

SLOT_SECONDS = 5  # slot_seconds of decoding.lua: after it a slot without a worker is released
LARGE = 64 * 1024 * 1024  # bytes of a response, more than all socket buffers on its path
SIDE, DECODING = 4900, 0.6  # of a square image, and the seconds that the gateway expects its decoding to take


def request(image: bytes) -> bytes:
    _, body, headers = over_http(TensorRequest("", "", "classifier", classifier([image])))
    return bad_connections.head(len(body), *(f"{name}: {value}" for name, value in headers.items())) + body


COSTLY = request(solid_webp(1000))


@dataclass
class Upstream:
    """An HTTP server in place of Triton: each request takes `seconds`, and its response has `size` bytes."""

    seconds: float = 0.0
    size: int = 2
    started: int = 0
    http_url: str = ""
    grpc_url: str = "grpc://127.0.0.1:1"


@pytest.fixture
def triton() -> Iterator[Upstream]:
    state = Upstream()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seconds, size = state.seconds, state.size
            state.started += 1
            time.sleep(seconds)
            with contextlib.suppress(OSError):  # the gateway may have closed the connection
                self.send_response(200)
                self.send_header("Content-Length", str(size))
                self.end_headers()
                self.wfile.write(bytes(size))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    state.http_url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.socket.close()  # not server_close(), which would wait for the slowest request


@pytest.fixture
def gateway(triton: Upstream) -> Iterator[GatewayProcess]:
    """A gateway with one slot for costly requests."""
    with running_gateway(triton, large_images=1, shutdown_seconds=1) as running:
        yield running


def costly(gateway: GatewayProcess, address: str) -> tuple[int, float]:
    """Send a costly request from a loopback address; return status and seconds."""
    started = time.monotonic()
    with bad_connections.connected(gateway.gateway.http_port, 20, address) as opened:
        opened.sendall(COSTLY)
        return bad_connections.status_of(opened.recv(4096)), time.monotonic() - started


def until_started(triton: Upstream, count: int) -> None:
    deadline = time.monotonic() + 10
    while triton.started < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert triton.started == count


def test_a_caller_that_does_not_read_its_response_occupies_no_slot(gateway: GatewayProcess, triton: Upstream) -> None:
    triton.size = LARGE
    with closing(socket.socket()) as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.bind(("127.0.0.2", 0))
        silent.connect(("127.0.0.1", gateway.gateway.http_port))
        silent.sendall(COSTLY)
        until_started(triton, 1)
        triton.size = 2
        status, seconds = costly(gateway, "127.0.0.3")
        assert silent.recv(15) == b"HTTP/1.1 200 OK"
    assert status == 200 and seconds < SLOT_SECONDS / 2


def test_the_slot_of_a_disconnected_caller_stays_in_use_while_its_image_is_decoded(
    gateway: GatewayProcess, triton: Upstream
) -> None:
    triton.seconds = DECODING
    with bad_connections.connected(gateway.gateway.http_port, source="127.0.0.2") as leaving:
        leaving.sendall(request(solid_webp(SIDE)))
        until_started(triton, 1)
    triton.seconds = 0
    status, seconds = costly(gateway, "127.0.0.3")
    assert status == 200 and 0.5 * DECODING < seconds < SLOT_SECONDS / 2


def test_callers_that_disconnect_in_the_queue_send_no_request_to_triton(
    gateway: GatewayProcess, triton: Upstream
) -> None:
    triton.seconds = 1.5
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(costly, gateway, "127.0.0.2")
        until_started(triton, 1)
        triton.seconds = 0
        for number in range(3, 8):
            with bad_connections.connected(gateway.gateway.http_port, source=f"127.0.0.{number}") as leaving:
                leaving.sendall(COSTLY)
                time.sleep(0.05)
        assert running.result()[0] == 200
    status, _ = costly(gateway, "127.0.0.3")
    assert status == 200 and triton.started == 2


def test_the_slot_of_a_killed_worker_is_free_within_5_s(gateway: GatewayProcess, triton: Upstream) -> None:
    triton.seconds = 20
    with bad_connections.connected(gateway.gateway.http_port, 20, "127.0.0.2") as cut:
        cut.sendall(COSTLY)
        until_started(triton, 1)
        triton.seconds = 0
        master = psutil.Process(gateway.process_id)
        [worker] = [one for one in master.children() if "worker" in " ".join(one.cmdline())]
        worker.kill()
        killed = time.monotonic()
        assert bad_connections.answer(cut) == b""
    while worker.is_running() and time.monotonic() < killed + 5:
        time.sleep(0.02)
    status, _ = costly(gateway, "127.0.0.3")
    assert status == 200 and time.monotonic() - killed < SLOT_SECONDS + 1.5
    assert worker.pid not in [one.pid for one in master.children()]
