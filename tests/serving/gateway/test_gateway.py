"""The gateway forwards and rejects requests. Crashing requests: test_killing_requests.py."""

from __future__ import annotations

import gzip
import http.client
import json
import select
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from conftest import ADMIN_KEY, CLASSES, Release, picture
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from serving.client.sync_client import Client
from serving.gateway.nginx_process import GatewayProcess
from serving.server.triton_server import TritonServer
from serving.shared.names import ADMIN_HEADER
from tests.support import bad_connections, bad_requests
from tests.support.bad_images import saved
from tests.support.bad_requests import INFER, good_body
from tests.support.running_gateway import make_certificate, running_gateway
from tests.support.steady_load import Load, assert_each_answer_is_its_versions

FINITE = {"timeout": 20}


@pytest.fixture(scope="module")
def gateway(server: TritonServer) -> Iterator[GatewayProcess]:
    with running_gateway(server, header_seconds=1, body_seconds=1, connections_per_address=16) as running:
        yield running


def send_http(
    url: str, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    """Send a request; return status and JSON of the response."""
    connection = http.client.HTTPConnection(url.partition("://")[2], **FINITE)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if content else None
    finally:
        connection.close()


def grpc_stub(url: str) -> service_pb2_grpc.GRPCInferenceServiceStub:
    return service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(url.partition("://")[2]))


def grpc_failure(call: Any, *arguments: Any, **options: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **options, **FINITE)
    return caught.value.code().name, caught.value.details()


@pytest.mark.end_to_end
def test_both_protocols_return_through_the_gateway_what_the_server_returns(
    gateway: GatewayProcess, server: TritonServer
) -> None:
    images = [picture(seed) for seed in range(3)]
    for outer, inner in ((gateway.http_url, server.http_url), (gateway.grpc_url, server.grpc_url)):
        with Client(outer) as through, Client(inner) as direct:
            for prior in ("balanced", "train", [0.2] * 5):
                assert through.predict(images, prior) == direct.predict(images, prior)
            assert through.class_names() == CLASSES
            assert through.status().answers


@pytest.mark.end_to_end
def test_a_body_that_nginx_buffers_in_a_file_is_classified(gateway: GatewayProcess, release: Release) -> None:
    large = saved(Image.effect_noise((1200, 1200), 90).convert("RGB"), "PNG")
    assert len(large) > 1024 * 1024
    with Client(gateway.http_url) as client:
        answer = client.predict([large], "balanced")[0]
    assert answer.probabilities[0] == pytest.approx(release.probabilities([large], np.zeros(5)).max(), rel=1e-4)


@pytest.mark.end_to_end
def test_the_gateway_terminates_tls_for_both_protocols(server: TritonServer, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    with running_gateway(server, certificate=certificate, key=key) as running:
        assert running.http_url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(certificate))
        host = running.http_url.partition("://")[2]
        connection = http.client.HTTPSConnection(host, context=trusting, **FINITE)
        connection.request("GET", "/v2/health/ready")
        assert connection.getresponse().status == 200
        connection.close()
        with pytest.raises(ssl.SSLCertVerificationError):
            http.client.HTTPSConnection(host, context=ssl.create_default_context(), **FINITE).request("GET", "/v2")
        assert send_http(running.http_url, "GET", "/v2") == (400, {"error": "this port accepts TLS only; use https"})
        credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
        with grpc.secure_channel(running.grpc_url.partition("://")[2], credentials) as channel:
            ready = service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerReady(
                service_pb2.ServerReadyRequest(), **FINITE
            )
        assert ready.ready


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/student/load"),
        ("POST", "/v2/repository/models/student/unload"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("POST", "/v2/systemsharedmemory/region/x/register"),
        ("GET", "/v2/models/student/stats"),
        ("POST", "/v2/trace/setting"),
        ("POST", "/v2/logging"),
        ("GET", "/metrics"),
        ("GET", "//v2/repository/../repository/index"),
        ("GET", "/v2%0A"),
        ("GET", "/v2/health/ready%0A"),
        ("GET", "/v2/models/classifier%0A"),
        ("POST", f"{INFER}%0A"),
    ],
)
def test_model_control_does_not_exist_at_the_gateway_even_with_the_key(
    gateway: GatewayProcess, method: str, path: str
) -> None:
    status, content = send_http(gateway.http_url, method, path, headers={ADMIN_HEADER: ADMIN_KEY})
    assert status == 404
    assert content["error"].startswith("no such endpoint;")


@pytest.mark.end_to_end
def test_model_control_does_not_exist_over_grpc_even_with_the_key(gateway: GatewayProcess) -> None:
    stub = grpc_stub(gateway.grpc_url)
    key = ((f"triton-grpc-protocol-{ADMIN_HEADER}", ADMIN_KEY),)
    for call, request in (
        (stub.RepositoryIndex, service_pb2.RepositoryIndexRequest()),
        (stub.RepositoryModelUnload, service_pb2.RepositoryModelUnloadRequest(model_name="student")),
        (stub.SystemSharedMemoryStatus, service_pb2.SystemSharedMemoryStatusRequest()),
        (stub.ModelStatistics, service_pb2.ModelStatisticsRequest()),
        (stub.TraceSetting, service_pb2.TraceSettingRequest()),
        (stub.LogSettings, service_pb2.LogSettingsRequest()),
    ):
        code, details = grpc_failure(call, request, metadata=key)
        assert code == "UNIMPLEMENTED"
        assert details.startswith("no such endpoint;")


@pytest.mark.end_to_end
def test_the_server_itself_restricts_model_control_by_the_key(server: TritonServer) -> None:
    paths = ["repository/index", "systemsharedmemory/status", "models/stats", "trace/setting", "logging"]
    for path in paths:
        method = "POST" if path == "repository/index" else "GET"
        assert send_http(server.http_url, method, f"/v2/{path}")[0] == 403
        assert (
            send_http(server.http_url, method, f"/v2/{path}", headers={ADMIN_HEADER: "a-wrong-key-of-length"})[0] == 403
        )
        assert send_http(server.http_url, method, f"/v2/{path}", headers={ADMIN_HEADER: ADMIN_KEY})[0] == 200
    stub = grpc_stub(server.grpc_url)
    for call, request in (
        (stub.RepositoryIndex, service_pb2.RepositoryIndexRequest()),
        (stub.SystemSharedMemoryStatus, service_pb2.SystemSharedMemoryStatusRequest()),
        (stub.ModelStatistics, service_pb2.ModelStatisticsRequest()),
        (stub.TraceSetting, service_pb2.TraceSettingRequest()),
        (stub.LogSettings, service_pb2.LogSettingsRequest()),
    ):
        assert grpc_failure(call, request)[0] == "UNAVAILABLE"
        call(request, metadata=((f"triton-grpc-protocol-{ADMIN_HEADER}", ADMIN_KEY),), **FINITE)


@pytest.mark.end_to_end
def test_compressed_bodies_are_rejected_before_they_are_decompressed(gateway: GatewayProcess) -> None:
    bomb = gzip.compress(bytes(200_000_000), 1)
    for coding in ("gzip", "deflate", "br", "identity, gzip"):
        status, content = send_http(gateway.http_url, "POST", INFER, bomb, {"Content-Encoding": coding})
        assert (status, content["error"]) == (415, "compressed requests are not accepted; send the body as it is")
    message = bad_requests.over_grpc(
        bad_requests.TensorRequest("", "", "classifier", bad_requests.good_inputs("classifier", 1))
    )
    code, details = grpc_failure(grpc_stub(gateway.grpc_url).ModelInfer, message, compression=grpc.Compression.Gzip)
    assert (code, details) == ("UNIMPLEMENTED", "compressed requests are not accepted; send the body as it is")


@pytest.mark.end_to_end
def test_large_bodies_are_rejected_over_both_protocols(gateway: GatewayProcess) -> None:
    image = bytes(50 * 1024 * 1024)
    _, headers = good_body()
    status, content = send_http(gateway.http_url, "POST", INFER, image, headers)
    assert status == 413
    assert "request body is too large; send at most 49 MiB" in content["error"]
    message = bad_requests.over_grpc(bad_requests.TensorRequest("", "", "classifier", bad_requests.classifier([image])))
    code, details = grpc_failure(grpc_stub(gateway.grpc_url).ModelInfer, message)
    assert code == "RESOURCE_EXHAUSTED"
    assert "request body is too large" in details
    status, _ = send_http(gateway.http_url, "GET", "/v2", bytes(20_000))
    assert status == 413


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", bad_connections.HTTP_CONNECTIONS)
def test_a_misbehaving_connection_is_closed_or_gets_an_error_response(gateway: GatewayProcess, name: str) -> None:
    misbehave, statuses = bad_connections.HTTP_CONNECTIONS[name]
    assert misbehave(gateway.gateway.http_port) in statuses


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", bad_connections.ODD_REQUESTS)
def test_an_odd_request_gets_the_documented_error_response(gateway: GatewayProcess, name: str) -> None:
    head, _, content = bad_connections.odd_answer(gateway.gateway.http_port, name).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == bad_connections.ODD_REQUESTS[name][1]
    assert b"Content-Type: application/json" in head
    assert list(json.loads(content)) == ["error"]


@pytest.mark.end_to_end
def test_an_http_09_request_gets_json_without_a_head(gateway: GatewayProcess) -> None:
    """HTTP/0.9 has no status line."""
    with bad_connections.connected(gateway.gateway.http_port) as opened:
        opened.sendall(b"GET /nothing\r\n")
        assert list(json.loads(bad_connections.answer(opened))) == ["error"]


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("path", "authority", "status"),
    [("/nothing", "tailor", 12), ("/inference.GRPCInferenceService/ServerLive%0A", "tailor", 12), ("/nothing", "", 3)],
)
def test_an_error_response_over_http2_has_the_form_of_grpc(
    gateway: GatewayProcess, path: str, authority: str, status: int
) -> None:
    """gRPC clients read the gRPC status only from a response of HTTP status 200 with gRPC's content type."""
    headers = dict(bad_connections.HEADERS) | {":path": path, ":authority": authority}
    received = bad_connections.http2_headers(gateway.gateway.grpc_port, [pair for pair in headers.items() if pair[1]])
    assert (received[":status"], received["content-type"]) == ("200", "application/grpc")
    assert received["grpc-status"] == f"{status}"
    assert received["grpc-message"]


@pytest.mark.end_to_end
def test_slow_headers_and_bodies_time_out_while_normal_requests_are_classified(
    gateway: GatewayProcess, release: Release
) -> None:
    """Concurrent: six slow callers of each kind over HTTP, six idle streams over HTTP/2, and three normal callers."""
    port = gateway.gateway.http_port
    with ThreadPoolExecutor(18) as pool, Load(gateway) as load:
        slow = [
            pool.submit(writer, port, seconds=8)
            for writer in (bad_connections.slow_headers, bad_connections.slow_body)
            for _ in range(6)
        ]
        idle = [pool.submit(bad_connections.idle_streams, gateway.gateway.grpc_port, streams=1) for _ in range(6)]
        assert max(one.result() for one in slow) < 4
        for one in idle:
            one.result()
    assert_each_answer_is_its_versions(load, {1: release})
    assert len(load.answers) > 20


@pytest.mark.end_to_end
def test_the_concurrent_requests_of_one_address_are_limited(gateway: GatewayProcess) -> None:
    body, headers = good_body()
    begun = bad_connections.head(len(body), *(f"{name}: {value}" for name, value in headers.items())) + body[:-1]
    with ExitStack() as stack:
        waiting = [stack.enter_context(bad_connections.connected(gateway.gateway.http_port)) for _ in range(24)]
        for opened in waiting:
            opened.sendall(begun)
        time.sleep(0.3)
        rejected, _, _ = select.select(waiting, [], [], 0)
        assert len(rejected) == 24 - 16
        assert all(opened.recv(4096).startswith(b"HTTP/1.1 429") for opened in rejected)
        for opened in set(waiting) - set(rejected):
            opened.sendall(body[-1:])
            assert opened.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.end_to_end
def test_a_missing_server_is_an_error_response_over_both_protocols(server: TritonServer) -> None:
    with (
        socket.socket() as silent,
        running_gateway(server, upstream_http="127.0.0.1:9", upstream_grpc="127.0.0.1:9") as running,
    ):
        silent.bind(("127.0.0.1", 0))
        status, content = send_http(running.http_url, "GET", "/v2/health/ready")
        assert (status, content["error"]) == (502, "Triton does not respond; try again later")
        assert send_http(running.http_url, "GET", "/gateway/health") == (200, {"live": True})
        assert grpc_failure(grpc_stub(running.grpc_url).ServerLive, service_pb2.ServerLiveRequest()) == (
            "UNAVAILABLE",
            "Triton does not respond; try again later",
        )


@pytest.mark.end_to_end
def test_the_access_log_contains_no_query_and_no_header(server: TritonServer, tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    with running_gateway(server, access_log=log) as running:
        send_http(running.http_url, "GET", "/v2/health/ready?secret=1", headers={"Authorization": "Bearer secret"})
    entry = json.loads(log.read_text())
    assert (entry["path"], entry["status"], entry["method"]) == ("/v2/health/ready", 200, "GET")
    assert "secret" not in log.read_text()


@pytest.mark.end_to_end
@pytest.mark.parametrize("options", [{"timeout": 1000}, {"priority": 1}, {"parameters": {"of_my_own": "x"}}])
def test_parameters_of_a_request_are_rejected_with_a_message(gateway: GatewayProcess, options: dict[str, Any]) -> None:
    """Parameters could change the queue policy, which callers may not; Tailor's client sends none."""
    encoded = np.array([[picture(1)]], dtype=np.object_)
    for kind, url in ((tritonclient.http, gateway.http_url), (tritonclient.grpc, gateway.grpc_url)):
        image = kind.InferInput("image", [1, 1], "BYTES")
        image.set_data_from_numpy(encoded)
        client = kind.InferenceServerClient(url.partition("://")[2])
        with pytest.raises(InferenceServerException) as caught:
            client.infer("classifier", [image], **options)
        client.close()
        http = kind is tritonclient.http
        name = "of_my_own" if "parameters" in options else next(iter(options))
        assert caught.value.status() == ("400" if http else "StatusCode.INVALID_ARGUMENT")
        message = f"parameter '{name}' is not accepted here; leave it out" if http else "set the deadline of the call"
        assert message in caught.value.message()
