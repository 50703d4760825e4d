"""Requests that crash an unprotected Triton, each on a separate server; the gateway rejects the same requests.

No test takes more than 4 GiB of memory: endless requests are bounded.
"""

from __future__ import annotations

import collections
import http.client
import json
import signal
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from conftest import picture
from tritonclient.grpc import service_pb2_grpc

from serving.client.sync_client import Client
from serving.gateway.nginx_process import GatewayProcess
from serving.server.triton_server import TritonServer
from tests.support import bad_connections, bad_requests
from tests.support.bad_requests import INFER, TensorRequest, good_body, good_inputs, with_length
from tests.support.cancelled_calls import cancel_calls
from tests.support.running_gateway import running_gateway

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]

MEMORY = 6 * 2**30  # required free bytes, so that only Triton crashes and not the machine
DEATH = 90.0  # timeout in seconds; Triton writes a long stack trace before it exits


@pytest.fixture(scope="module", autouse=True)
def _room() -> None:
    if psutil.virtual_memory().available < MEMORY:
        pytest.skip("less than 6 GiB of memory are free")


@pytest.fixture(scope="module")
def guarded(repository: Path) -> Iterator[TritonServer]:
    """The server behind the gateway."""
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(guarded: TritonServer) -> Iterator[GatewayProcess]:
    with running_gateway(guarded) as running:
        yield running


@pytest.fixture
def raw(repository: Path) -> Iterator[TritonServer]:
    """An unprotected server, which may crash."""
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as victim:
        yield victim


def post(url: str, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
    connection = http.client.HTTPConnection(url.partition("://")[2], timeout=DEATH)
    try:
        connection.request("POST", INFER, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def assert_answers(gateway: GatewayProcess) -> None:
    with Client(gateway.http_url, timeout=20) as client:
        assert client.predict([picture(1)])[0].version == 1


def nested() -> tuple[bytes, dict[str, str]]:
    inside = b"[" * 40_000 + b"]" * 40_000
    return b'{"inputs":[{"name":"image","shape":[1,1],"datatype":"BYTES","data":' + inside + b"}]}", {}


def beyond_memory() -> tuple[bytes, dict[str, str]]:
    tensor = {"name": "strength", "shape": [2**45, 1], "datatype": "FP32", "data": [0.5]}
    return json.dumps({"inputs": [tensor]}).encode(), {}


def beyond_memory_in_the_json_part() -> tuple[bytes, dict[str, str]]:
    body, _ = beyond_memory()
    return body, with_length(body)


def classification_of_strings() -> tuple[bytes, dict[str, str]]:
    """A valid request except for one parameter: classification of a string output."""
    body, headers = good_body()
    length = int(headers["Inference-Header-Content-Length"])
    wish = [{"name": "class", "parameters": {"classification": 1}}]
    head = json.dumps(json.loads(body[:length]) | {"outputs": wish}).encode()
    return head + body[length:], with_length(head)


def gzip_of_two_gibibytes() -> tuple[bytes, dict[str, str]]:
    """2 GiB of zeros in gzip: a flushed block of 16 MiB, repeated 128 times."""
    zeros, times = bytes(2**24), 128
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = compressor.compress(zeros) + compressor.flush(zlib.Z_FULL_FLUSH)
    checksum = 0
    for _ in range(times):
        checksum = zlib.crc32(zeros, checksum)
    body = b"\x1f\x8b\x08" + bytes(6) + b"\xff" + block * times + b"\3\0" + struct.pack("<II", checksum, 2**31)
    assert len(body) < 3 * 2**20
    return body, {"Content-Encoding": "gzip"}


@pytest.mark.parametrize(
    ("killer", "end", "status"),
    [
        (nested, signal.SIGSEGV, 400),
        (beyond_memory, signal.SIGABRT, 400),
        (beyond_memory_in_the_json_part, signal.SIGABRT, 400),
        (classification_of_strings, signal.SIGFPE, 400),
        (gzip_of_two_gibibytes, signal.SIGABRT, 415),
    ],
)
def test_the_gateway_rejects_each_request_that_crashes_the_server(
    gateway: GatewayProcess, raw: TritonServer, killer: Any, end: signal.Signals, status: int
) -> None:
    body, headers = killer()
    told, content = post(gateway.http_url, body, headers)
    assert (told, "error" in content) == (status, True)
    assert_answers(gateway)
    with pytest.raises((http.client.HTTPException, OSError)):
        post(raw.http_url, body, headers)
        pytest.fail("the raw server withstood it; is the gateway still needed for this?")
    assert raw.wait(DEATH) == -end


def test_the_gateway_rejects_millions_of_chunks_that_crash_the_server(
    gateway: GatewayProcess, raw: TritonServer
) -> None:
    assert bad_connections.endless_chunks(gateway.gateway.http_port, limit=3_000_000) in (0, 411)
    assert_answers(gateway)
    bad_connections.endless_chunks(raw.ports["--http-port"], limit=3_000_000)
    assert raw.wait(DEATH) == -signal.SIGSEGV


def test_cancelled_calls_crash_the_server_but_not_through_the_gateway(
    gateway: GatewayProcess, guarded: TritonServer, raw: TritonServer
) -> None:
    assert cancel_calls(gateway.grpc_url, seconds=20) > 100
    assert guarded.wait(1) is None
    assert_answers(gateway)
    cancel_calls(raw.grpc_url, seconds=90)
    assert raw.wait(DEATH) in (-signal.SIGSEGV, -signal.SIGABRT)


def test_the_gateway_rejects_an_endless_body_that_fills_the_server_s_memory(
    gateway: GatewayProcess, guarded: TritonServer, raw: TritonServer
) -> None:
    sent = 512 * 2**20

    def resident(process_id: int | None) -> int:
        return int(psutil.Process(process_id).memory_info().rss)

    before = [resident(one.process_id) for one in (guarded, raw)]
    with bad_connections.body_without_end(gateway.gateway.http_port, sent) as opened:
        assert resident(guarded.process_id) < before[0] + sent / 10
        assert bad_connections.status_of(bad_connections.answer(opened)) in (0, 413)
    assert_answers(gateway)
    with bad_connections.body_without_end(raw.ports["--http-port"], sent):
        deadline = time.monotonic() + 20
        while resident(raw.process_id) < before[1] + sent and time.monotonic() < deadline:
            time.sleep(0.1)
        assert resident(raw.process_id) >= before[1] + sent


@dataclass
class Told:
    """Counts of the errors received by the callers of one run; `ok` for a successful response."""

    good: collections.Counter[str] = field(default_factory=collections.Counter)
    lying: collections.Counter[str] = field(default_factory=collections.Counter)


def liars_beside_good_callers(grpc_url: str, seconds: float, until_harm: bool = False) -> Told:
    """Run sixteen valid callers and two whose image has a false length, all with the same inputs."""
    good = good_inputs("classifier", 1)
    lie = replace(good[0], raw=struct.pack("<I", 2**31) + good[0].raw[4:])
    told, over, began = Told(), threading.Event(), time.monotonic()

    def ask(inputs: tuple[bad_requests.Tensor, ...], counted: collections.Counter[str]) -> None:
        message = bad_requests.over_grpc(TensorRequest("", "", "classifier", inputs))
        address, options = grpc_url.partition("://")[2], [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(address, options=options) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            while not over.is_set():
                try:
                    stub.ModelInfer(message, timeout=20)
                    counted["ok"] += 1
                except grpc.RpcError as error:
                    counted[f"{error.code().name} {error.details()}"] += 1

    with ThreadPoolExecutor(18) as pool:
        callers = [pool.submit(ask, good, told.good) for _ in range(16)]
        callers += [pool.submit(ask, (lie, *good[1:]), told.lying) for _ in range(2)]
        while time.monotonic() < began + seconds and not (until_harm and len(told.good) > 1):
            time.sleep(0.1)
        over.set()
        for caller in callers:
            caller.result()
    return told


def test_the_gateway_rejects_a_string_with_a_wrong_length_that_fails_its_batch(
    gateway: GatewayProcess, raw: TritonServer
) -> None:
    unharmed = liars_beside_good_callers(gateway.grpc_url, seconds=3)
    assert set(unharmed.good) == {"ok"}
    assert set(unharmed.lying) == {"INVALID_ARGUMENT input 'image': has a string that is longer than its data"}
    harmed = liars_beside_good_callers(raw.grpc_url, seconds=60, until_harm=True)
    assert any("incomplete string data for inference input 'image'" in message for message in harmed.good)
