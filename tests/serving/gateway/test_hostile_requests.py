"""Hundreds of generated invalid requests through the gateway, with valid requests in parallel.

TAILOR_HOSTILE_REQUESTS=10000: a long run; TAILOR_HOSTILE_SEED: another seed; TAILOR_HOSTILE_REPORT=FILE: writes a
table.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from conftest import picture
from tritonclient.grpc import service_pb2_grpc

from serving.client.sync_client import Client, Prediction
from serving.gateway.config import Gateway
from serving.gateway.nginx_process import GatewayProcess
from serving.server.triton_server import TritonServer
from serving.shared.errors import ServingError
from serving.transport.sync_transport import RequestRejected, Transport
from tests.support import bad_connections, bad_images, bad_protocol, bad_requests
from tests.support.running_gateway import running_gateway, workers_of

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(1800)]

REQUESTS = int(os.environ.get("TAILOR_HOSTILE_REQUESTS", "500"))
SEED = int(os.environ.get("TAILOR_HOSTILE_SEED", "20"))
REPORT = os.environ.get("TAILOR_HOSTILE_REPORT")
WORKERS = 4
# Allowed error statuses for an invalid request; the others would be server errors.
CALLERS_FAULT = {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED"}
GROWTH = 0.05
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"

Outcome = tuple[str, str, bool]  # fault, response, whether it was allowed


@pytest.fixture(scope="module")
def own_server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    log = tmp_path_factory.mktemp("hostile") / "triton.log"
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0, log=log) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(own_server: TritonServer) -> Iterator[GatewayProcess]:
    # All callers share one address, so the limit per address would also affect the valid requests.
    limits = {"connections": 2000, "connections_per_address": 1500}
    with running_gateway(own_server, header_seconds=2, body_seconds=2, **limits) as running:
        yield running


class Attacker:
    """One connection per protocol to the gateway; sends requests and checks the responses."""

    def __init__(self, gateway: GatewayProcess, seed: int) -> None:
        self.gateway = gateway
        self.draw = random.Random(seed)
        self.http = http.client.HTTPConnection(str(gateway.gateway.host), gateway.gateway.http_port, timeout=30)
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(gateway.grpc_url.partition("://")[2], options=options)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def run(self, count: int) -> list[Outcome]:
        try:
            return [self.attack() for _ in range(count)]
        finally:
            self.http.close()
            self.channel.close()

    def attack(self) -> Outcome:
        kind = self.draw.random()
        if kind < 0.35:
            fault = self.draw.choice(bad_requests.TENSOR_FAULTS)(self.draw)
            path, body, headers = bad_requests.over_http(fault)
            return self.http_answer(
                f"http {fault.fault}", fault.culprit, ("POST", path, body, headers), range(400, 500)
            )
        if kind < 0.42:
            return self.message_answer(*bad_protocol.message_bytes(self.draw))
        if kind < 0.65:
            fault = self.draw.choice(bad_requests.TENSOR_FAULTS)(self.draw)
            return self.grpc_answer(f"grpc {fault.fault}", fault.culprit, bad_requests.over_grpc(fault))
        if kind < 0.68:
            return self.grpc_answer(
                "grpc tensor: typed, beyond memory", "image", bad_protocol.typed_over_grpc(self.draw)
            )
        if kind < 0.69:
            large = bad_protocol.large_body(self.draw)
            return self.http_answer(
                large.fault, large.culprit, (large.method, large.path, large.body, large.headers), (413,)
            )
        if kind < 0.93:
            bad = self.draw.choice(bad_protocol.HTTP_FAULTS)(self.draw)
            return self.http_answer(bad.fault, bad.culprit, (bad.method, bad.path, bad.body, bad.headers), bad.statuses)
        if kind < 0.97:
            name = self.draw.choice(list(bad_connections.HTTP_CONNECTIONS))
            misbehave, statuses = bad_connections.HTTP_CONNECTIONS[name]
            status = misbehave(self.gateway.gateway.http_port)
            return name, f"{status}", status in statuses
        name = self.draw.choice(list(bad_connections.GRPC_CONNECTIONS))
        bad_connections.GRPC_CONNECTIONS[name](self.gateway.gateway.grpc_port)
        return name, "closed", True

    def http_answer(self, fault: str, culprit: str, request: tuple[Any, ...], statuses: Any) -> Outcome:
        # After a rejected request the gateway closes the connection, immediately or during the next request.
        for last in (False, True):
            try:
                self.http.request(*request)
                answer = self.http.getresponse()
                status, text = answer.status, answer.read().decode()
                break
            except (OSError, http.client.HTTPException) as error:
                self.http.close()
                status, text = 0, repr(error)
                if last:
                    break
        rejected = "error" in text and culprit.lower() in text.lower()
        return (
            fault,
            f"{status}" if status in statuses and rejected else f"{status} {text[:160]}",
            status in statuses and rejected,
        )

    def message_answer(self, fault: str, message: bytes) -> Outcome:
        return self.grpc_answer(f"grpc bytes: {fault}", "", message, self.channel.unary_unary(MODEL_INFER))

    def grpc_answer(self, fault: str, culprit: str, message: Any, call: Any = None) -> Outcome:
        try:
            (call or self.stub.ModelInfer)(message, timeout=30)
        except grpc.RpcError as error:
            code, details = error.code().name, error.details() or ""
            right = code in CALLERS_FAULT and culprit.lower() in details.lower()
            return fault, code if right else f"{code} {details[:160]}", right
        return fault, "OK", False


@contextlib.contextmanager
def good_requests_beside(gateway: GatewayProcess, expected: list[Prediction]) -> Iterator[dict[str, Any]]:
    """Context manager: valid requests over both protocols; yields their errors and times."""
    over = threading.Event()
    seen: dict[str, Any] = {"wrong": [], "seconds": []}

    def ask(url: str) -> None:
        with Client(url, timeout=30) as client:
            place = 0
            while not over.is_set():
                started = time.monotonic()
                answer = client.predict([picture(place)], 0.5)[0]
                seen["seconds"].append(time.monotonic() - started)
                if answer != expected[place]:
                    seen["wrong"].append((url, place, answer))
                place = (place + 1) % len(expected)

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(ask, url) for url in (gateway.http_url, gateway.grpc_url)]
        try:
            yield seen
        finally:
            over.set()
        for future in running:
            future.result()


def attack(gateway: GatewayProcess, count: int, seed: int) -> list[Outcome]:
    with ThreadPoolExecutor(WORKERS) as pool:
        shares = [pool.submit(Attacker(gateway, seed + worker).run, count // WORKERS) for worker in range(WORKERS)]
        return [outcome for share in shares for outcome in share.result()]


def family(process_id: int) -> list[psutil.Process]:
    top = psutil.Process(process_id)
    return [top, *top.children(recursive=True)]


def resident(process_id: int) -> int:
    """Return the resident bytes of a process and its children."""
    return sum(process.memory_info().rss for process in family(process_id))


def table(outcomes: list[Outcome], seconds: list[float], memory: tuple[int, int], took: float) -> str:
    counted = collections.Counter((fault, answer) for fault, answer, _ in outcomes)
    milliseconds = [1000 * value for value in sorted(seconds)]
    p50, p99 = milliseconds[len(seconds) // 2], milliseconds[len(seconds) * 99 // 100]
    lines = [
        f"`TAILOR_HOSTILE_REQUESTS={REQUESTS} TAILOR_HOSTILE_SEED={SEED} TAILOR_HOSTILE_REPORT=FILE "
        "python -m pytest tests/serving/gateway/test_hostile_requests.py`",
        "",
        f"{len(outcomes)} bad requests in {took:.0f} s from {WORKERS} callers, {len(seconds)} good ones beside them; "
        f"{sum(not right for _, _, right in outcomes)} bad ones answered otherwise than with a fault of the caller's.",
        f"Good requests: p50 {p50:.1f} ms, p99 {p99:.1f} ms.",
        f"Memory of Triton and its stubs: {memory[0] / 2**20:.0f} MiB before, {memory[1] / 2**20:.0f} MiB after "
        f"({(memory[1] / memory[0] - 1) * 100:+.1f} %).",
        "",
        "| fault | answer | times |",
        "|---|---|---|",
        *(f"| {fault} | {answer} | {count} |" for (fault, answer), count in sorted(counted.items())),
    ]
    return "\n".join(lines) + "\n"


def test_bad_requests_get_an_error_message_and_affect_no_other_request(
    own_server: TritonServer, gateway: GatewayProcess
) -> None:
    with Client(own_server.grpc_url) as client:
        expected = [client.predict([picture(place)], 0.5)[0] for place in range(20)]
    # Warm-up: one request of each kind grows the buffers to their final size; the largest is sent to each instance,
    # since instances alternate.
    largest = np.array([[bad_images.hostile_images()["above the bytes of an image"]]], dtype=np.object_)
    transport = Transport(own_server.http_url, 60)
    for _ in range(6):
        with pytest.raises(RequestRejected, match="image"):
            transport.infer("classifier", {"image": largest}, {"class": 0})
    transport.close()
    attack(gateway, max(100, REQUESTS // 20), SEED + 1000)
    before, processes = resident(own_server.process_id), {process.pid for process in family(own_server.process_id)}
    started = time.monotonic()
    with good_requests_beside(gateway, expected) as good:
        outcomes = attack(gateway, REQUESTS, SEED)
    took = time.monotonic() - started
    after = resident(own_server.process_id)
    report = table(outcomes, good["seconds"], (before, after), took)
    if REPORT:
        Path(REPORT).write_text(report)
    assert [(fault, answer) for fault, answer, right in outcomes if not right] == []
    assert good["wrong"] == []
    assert len(good["seconds"]) > REQUESTS / 20
    # No process died: dead inference processes are never restarted, so the processes are the same.
    assert {process.pid for process in family(own_server.process_id)} == processes
    own_server.canary()
    assert after <= before * (1 + GROWTH), report.splitlines()[4]


def test_exhausted_descriptors_affect_only_new_callers(repository: Path, tmp_path: Path) -> None:
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0, log=tmp_path / "log") as server:
        process = psutil.Process(server.process_id)
        used = process.num_fds()
        process.rlimit(psutil.RLIMIT_NOFILE, (used + 20, used + 20))
        with Client(server.grpc_url) as client:
            expected = client.predict([picture(1)], 0.5)
            with contextlib.ExitStack() as idle:
                for _ in range(60):
                    with contextlib.suppress(OSError):
                        idle.enter_context(bad_connections.connected(server.ports["--http-port"], timeout=2))
                assert process.num_fds() <= used + 20
                assert client.predict([picture(1)], 0.5) == expected
            deadline = time.monotonic() + 10
            while not answers(server) and time.monotonic() < deadline:
                time.sleep(0.2)
        server.canary()


def answers(server: TritonServer) -> bool:
    try:
        with Client(server.http_url, timeout=2) as client:
            return bool(client.predict([picture(1)], 0.5))
    except ServingError:
        return False


def test_idle_callers_use_no_descriptors_of_the_server(own_server: TritonServer) -> None:
    """Hundreds of idle callers use descriptors of the gateway only, not of the server."""
    with running_gateway(own_server, header_seconds=5, connections=64) as running, contextlib.ExitStack() as idle:
        before = psutil.Process(own_server.process_id).num_fds()
        for _ in range(150):
            with contextlib.suppress(OSError):
                idle.enter_context(bad_connections.connected(running.gateway.http_port, timeout=1))
        assert psutil.Process(own_server.process_id).num_fds() <= before + 2


def test_a_gateway_with_exhausted_descriptors_recovers_when_callers_disconnect(
    own_server: TritonServer,
) -> None:
    limit = 24  # nginx itself uses a dozen

    class FewDescriptors(Gateway):
        @property
        def open_files(self) -> int:
            return limit

    with (
        running_gateway(own_server, kind=FewDescriptors, header_seconds=30) as running,
        Client(own_server.http_url) as direct,
    ):
        [worker] = workers_of(running.process_id)
        expected = direct.predict([picture(1)], 0.5)
        with contextlib.ExitStack() as idle:
            for _ in range(40):
                idle.enter_context(bad_connections.connected(running.gateway.http_port))
            deadline = time.monotonic() + 10
            while worker.num_fds() < limit and time.monotonic() < deadline:
                time.sleep(0.1)
            assert worker.num_fds() == limit
            with Client(running.http_url, timeout=1) as client, pytest.raises(ServingError):
                client.predict([picture(1)], 0.5)
            assert direct.predict([picture(1)], 0.5) == expected  # the server is not affected
        for url in (running.http_url, running.grpc_url):
            with Client(url, timeout=20) as client:
                assert client.predict([picture(1)], 0.5) == expected
        assert [process.pid for process in psutil.Process(running.process_id).children()] == [worker.pid]


def test_the_grammar_generates_the_same_requests_for_the_same_seed() -> None:
    def drawn(seed: int) -> list[Any]:
        draw = random.Random(seed)
        faults: list[Callable[[random.Random], Any]] = [*bad_requests.TENSOR_FAULTS, *bad_protocol.HTTP_FAULTS]
        return [draw.choice(faults)(draw) for _ in range(50)]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
