"""The gateway: valid configurations, forwarded and rejected requests. Crashing requests: test_killing_requests.py."""

from __future__ import annotations

import gzip
import http.client
import json
import re
import select
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from conftest import ADMIN_KEY, CLASSES, Release, picture
from google.protobuf import text_format
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig
from tritonclient.utils import InferenceServerException

from serving.client.sync_client import Client
from serving.gateway import nginx_process as gateway_process
from serving.gateway.config import Gateway, read_gateway
from serving.gateway.nginx_process import GatewayProcess, check_config, find_nginx, write_config
from serving.server.triton_server import TritonServer
from serving.shared.errors import InputError, ServingError
from serving.shared.names import ADMIN_HEADER
from serving.shared.ports import choose_ports
from tests.support import bad_connections, bad_requests
from tests.support.bad_requests import INFER, good_body
from tests.support.running_gateway import make_certificate, require_nginx, running_gateway
from tests.support.steady_load import Load, assert_each_answer_is_its_versions

FINITE = {"timeout": 20}


@pytest.fixture(scope="module")
def gateway(server: TritonServer) -> Iterator[GatewayProcess]:
    with running_gateway(server, header_seconds=1, body_seconds=1, connections_per_address=16) as running:
        yield running


def ask(url: str, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Send a request; return status and JSON of the response."""
    connection = http.client.HTTPConnection(url.partition("://")[2], **FINITE)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if content else None
    finally:
        connection.close()


def stub_of(url: str) -> service_pb2_grpc.GRPCInferenceServiceStub:
    return service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(url.partition("://")[2]))


def grpc_failure(call: Any, *arguments: Any, **options: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **options, **FINITE)
    return caught.value.code().name, caught.value.details()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"http_port": 0}, "http_port is 0"),
        ({"http_port": 8081}, "http_port and grpc_port are both 8081"),
        ({"host": "nowhere"}, "host is nowhere"),
        ({"host": "0.0.0.0"}, "host is 0.0.0.0 without TLS; give certificate and key"),
        ({"certificate": "/a.crt"}, "certificate and key come together"),
        ({"certificate": "/a.crt;}", "key": "/a.key"}, "has a character that nginx would read"),
        ({"access_log": '/tmp/"log'}, "has a character that nginx would read"),
        ({"access_log": "/tmp/$host"}, "has a character that nginx would read"),
        ({"upstream_http": "127.0.0.1:8000; include /etc/passwd"}, "upstream_http is 127.0.0.1:8000; include"),
        ({"upstream_grpc": "127.0.0.1"}, "upstream_grpc is 127.0.0.1"),
        ({"body_bytes": "many"}, "body_bytes is many"),
        ({"connections": 0}, "connections is 0"),
        ({"trusted_proxies": ["10.0.0.1/8"]}, "trusted_proxies.0 is 10.0.0.1/8"),
        ({"body_size": 1}, "body_size is 1: Extra inputs are not permitted"),
    ],
)
def test_unusable_value_is_named_in_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_gateway(**values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["/tmp/folder;", "/tmp/$host", '/tmp/a"b', "/tmp/a\nb", "/tmp/a\\", "relative"])
def test_folder_that_nginx_would_read_is_refused(folder: str) -> None:
    with pytest.raises(InputError, match="has a character that nginx would read"):
        Gateway().render(Path(folder))


@pytest.mark.parametrize("name", ["plain", "ü – 図 b", "nfd-u\u0308"], ids=["plain", "not ASCII, blanks", "NFD"])
@pytest.mark.parametrize("full", [False, True], ids=["defaults", "everything"])
def test_nginx_accepts_the_configuration_as_it_is_written(tmp_path: Path, full: bool, name: str) -> None:
    require_nginx()
    tmp_path = tmp_path / name
    tmp_path.mkdir()
    values: dict[str, object] = {"http_port": 28080, "grpc_port": 28081}
    if full:
        certificate, key = make_certificate(tmp_path)
        values |= {"certificate": certificate, "key": key, "access_log": tmp_path / "access.jsonl"}
        values |= {"host": "127.0.0.2", "requests_per_second": 50, "trusted_proxies": [IPv4Network("10.0.0.0/8")]}
        values |= {"upstream_http": "localhost:8000", "upstream_grpc": "127.0.0.1:8001", "workers": 3}
    gateway = read_gateway(**values)
    config = write_config(gateway, tmp_path)
    check_config(find_nginx(gateway), config)
    assert {path.name for path in tmp_path.glob("*.lua")} == {
        path.name for path in Path(gateway_process.__file__).with_name("lua").glob("*.lua")
    }


def test_tensors_that_pass_are_those_of_the_models(repository: Path) -> None:
    source = (Path(gateway_process.__file__).with_name("lua") / "tensors.lua").read_text()
    table = source.partition("tensors.MODELS = {")[2].partition("\n}\n")[0]
    for model in ("student", "classifier"):
        config = text_format.Parse((repository / model / "config.pbtxt").read_text(), ModelConfig())
        entry = re.search(rf"{model} = {{\s*inputs = {{(.*?)}},\s*outputs = {{(.*?)}},?\s*}},\n", table, re.DOTALL)
        inputs = dict(re.findall(r'(\w+) = "(\w+)"', entry[1]))
        kinds = {kind: name.removeprefix("TYPE_").replace("STRING", "BYTES") for name, kind in DataType.items()}
        assert inputs == {tensor.name: kinds[tensor.data_type] for tensor in config.input}
        assert set(re.findall(r"(\w+) = {", entry[2])) == {tensor.name for tensor in config.output}


def test_missing_nginx_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_process, "PLACES", "/nowhere")
    with pytest.raises(ServingError, match=r"nginx is missing; install it \(Debian: apt install nginx-light"):
        find_nginx(Gateway())
    with pytest.raises(ServingError, match=r"ngx_http_lua_module\.so is missing"):
        monkeypatch.undo()
        require_nginx()
        find_nginx(Gateway(modules=Path("/nowhere")))


@pytest.mark.end_to_end
def test_port_in_use_fails_the_start_and_leaves_nothing(server: TritonServer) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with (
            pytest.raises(ServingError, match=r"http_port .*: the port is in use on 127.0.0.1"),
            running_gateway(server, http_port=other.getsockname()[1]),
        ):
            pass
    assert not [process for process in psutil.Process().children(recursive=True) if process.name() == "nginx"]


@pytest.mark.slow
def test_command_writes_the_configuration_for_an_nginx_elsewhere(
    tailor: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    ended = tailor("gateway", "--write", "gateway", "--runtime-folder", "/tmp", "--upstream-http", "server:8000")
    assert (ended.returncode, ended.stderr) == (0, "")
    written = Path(ended.stdout.strip())
    assert written == tmp_path / "gateway" / "nginx.conf"
    source = Path(gateway_process.__file__).with_name("lua") / "http.lua"
    assert (written.parent / "http.lua").read_text() == source.read_text()
    assert "server server:8000 " in written.read_text()
    assert 'pid "/tmp/nginx.pid";' in written.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "host is 0.0.0.0 without TLS; give certificate and key"),
        (["--http-port", "0"], "http_port is 0"),
        (["--trusted-proxy", "everyone"], "trusted_proxies.0 is everyone"),
        (["--body-mib", "0"], "body_bytes is 0"),
    ],
)
def test_command_refuses_misuse_in_one_line(
    tailor: Callable[..., subprocess.CompletedProcess[str]], arguments: list[str], message: str
) -> None:
    ended = tailor("gateway", *arguments)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert message in ended.stderr


@pytest.mark.end_to_end
def test_command_runs_until_sigterm_and_leaves_nothing(server: TritonServer) -> None:
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


@pytest.mark.end_to_end
def test_both_protocols_answer_through_the_gateway_what_the_server_answers(
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
def test_body_that_nginx_keeps_in_a_file_is_answered_too(gateway: GatewayProcess, release: Release) -> None:
    large = bad_requests.saved(bad_requests.Image.effect_noise((1200, 1200), 90).convert("RGB"), "PNG")
    assert len(large) > 1024 * 1024
    with Client(gateway.http_url) as client:
        answer = client.predict([large], "balanced")[0]
    assert answer.probabilities[0] == pytest.approx(release.probabilities([large], np.zeros(5)).max(), rel=1e-4)


@pytest.mark.end_to_end
def test_tls_ends_at_the_gateway_for_both_protocols(server: TritonServer, tmp_path: Path) -> None:
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
        assert ask(running.http_url, "GET", "/v2") == (400, {"error": "this port speaks TLS; use https"})
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
def test_controls_do_not_exist_at_the_gateway_even_with_the_key(
    gateway: GatewayProcess, method: str, path: str
) -> None:
    status, content = ask(gateway.http_url, method, path, headers={ADMIN_HEADER: ADMIN_KEY})
    assert status == 404
    assert content["error"].startswith("no such endpoint here")


@pytest.mark.end_to_end
def test_controls_do_not_exist_over_grpc_either(gateway: GatewayProcess) -> None:
    stub = stub_of(gateway.grpc_url)
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
        assert details.startswith("no such endpoint here")


@pytest.mark.end_to_end
def test_the_server_itself_restricts_its_controls_by_the_key(server: TritonServer) -> None:
    paths = ["repository/index", "systemsharedmemory/status", "models/stats", "trace/setting", "logging"]
    for path in paths:
        method = "POST" if path == "repository/index" else "GET"
        assert ask(server.http_url, method, f"/v2/{path}")[0] == 403
        assert ask(server.http_url, method, f"/v2/{path}", headers={ADMIN_HEADER: "a-wrong-key-of-length"})[0] == 403
        assert ask(server.http_url, method, f"/v2/{path}", headers={ADMIN_HEADER: ADMIN_KEY})[0] == 200
    stub = stub_of(server.grpc_url)
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
def test_compressed_bodies_are_refused_before_anyone_unpacks_them(gateway: GatewayProcess) -> None:
    bomb = gzip.compress(bytes(200_000_000), 1)
    for coding in ("gzip", "deflate", "br", "identity, gzip"):
        status, content = ask(gateway.http_url, "POST", INFER, bomb, {"Content-Encoding": coding})
        assert (status, content["error"]) == (415, "compressed requests are not accepted; send the body as it is")
    message = bad_requests.over_grpc(
        bad_requests.TensorRequest("", "", "classifier", bad_requests.good_inputs("classifier", 1))
    )
    code, details = grpc_failure(stub_of(gateway.grpc_url).ModelInfer, message, compression=grpc.Compression.Gzip)
    assert (code, details) == ("UNIMPLEMENTED", "compressed requests are not accepted; send the body as it is")


@pytest.mark.end_to_end
def test_large_bodies_are_refused_by_both_protocols(gateway: GatewayProcess) -> None:
    image = bytes(50 * 1024 * 1024)
    _, headers = good_body()
    status, content = ask(gateway.http_url, "POST", INFER, image, headers)
    assert status == 413
    assert "request body is too large; send at most 49 MiB" in content["error"]
    message = bad_requests.over_grpc(bad_requests.TensorRequest("", "", "classifier", bad_requests.classifier([image])))
    code, details = grpc_failure(stub_of(gateway.grpc_url).ModelInfer, message)
    assert code == "RESOURCE_EXHAUSTED"
    assert "request body is too large" in details
    status, _ = ask(gateway.http_url, "GET", "/v2", bytes(20_000))
    assert status == 413


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", bad_connections.HTTP_CONNECTIONS)
def test_misbehaving_connection_is_closed_or_told_why(gateway: GatewayProcess, name: str) -> None:
    misbehave, statuses = bad_connections.HTTP_CONNECTIONS[name]
    assert misbehave(gateway.gateway.http_port) in statuses


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", bad_connections.ODD_REQUESTS)
def test_odd_request_is_refused_in_the_documented_form(gateway: GatewayProcess, name: str) -> None:
    head, _, content = bad_connections.odd_answer(gateway.gateway.http_port, name).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == bad_connections.ODD_REQUESTS[name][1]
    assert b"Content-Type: application/json" in head
    assert list(json.loads(content)) == ["error"]


@pytest.mark.end_to_end
def test_request_of_http_09_is_answered_in_json_without_a_head(gateway: GatewayProcess) -> None:
    """HTTP/0.9 has no status line."""
    with bad_connections.connected(gateway.gateway.http_port) as opened:
        opened.sendall(b"GET /nothing\r\n")
        assert list(json.loads(bad_connections.answer(opened))) == ["error"]


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("path", "authority", "status"),
    [("/nothing", "tailor", 12), ("/inference.GRPCInferenceService/ServerLive%0A", "tailor", 12), ("/nothing", "", 3)],
)
def test_refusal_over_http2_has_the_form_of_grpc(
    gateway: GatewayProcess, path: str, authority: str, status: int
) -> None:
    """gRPC clients read the gRPC status only from a response of HTTP status 200 with gRPC's content type."""
    headers = dict(bad_connections.HEADERS) | {":path": path, ":authority": authority}
    found = bad_connections.http2_headers(gateway.gateway.grpc_port, [pair for pair in headers.items() if pair[1]])
    assert (found[":status"], found["content-type"]) == ("200", "application/grpc")
    assert found["grpc-status"] == f"{status}"
    assert found["grpc-message"]


@pytest.mark.end_to_end
def test_slow_headers_and_bodies_are_cut_off_in_time_while_good_requests_are_answered(
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
def test_one_address_gets_a_bounded_number_of_requests_at_once(gateway: GatewayProcess) -> None:
    body, headers = good_body()
    begun = bad_connections.head(len(body), *(f"{name}: {value}" for name, value in headers.items())) + body[:-1]
    with ExitStack() as stack:
        waiting = [stack.enter_context(bad_connections.connected(gateway.gateway.http_port)) for _ in range(24)]
        for opened in waiting:
            opened.sendall(begun)
        time.sleep(0.3)
        told, _, _ = select.select(waiting, [], [], 0)
        assert len(told) == 24 - 16
        assert all(opened.recv(4096).startswith(b"HTTP/1.1 429") for opened in told)
        for opened in set(waiting) - set(told):
            opened.sendall(body[-1:])
            assert opened.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.end_to_end
def test_absent_server_is_an_error_in_words_on_both_protocols(server: TritonServer) -> None:
    with (
        socket.socket() as silent,
        running_gateway(server, upstream_http="127.0.0.1:9", upstream_grpc="127.0.0.1:9") as to_nobody,
    ):
        silent.bind(("127.0.0.1", 0))
        status, content = ask(to_nobody.http_url, "GET", "/v2/health/ready")
        assert (status, content["error"]) == (502, "Triton does not answer; try again later")
        assert ask(to_nobody.http_url, "GET", "/gateway/health") == (200, {"live": True})
        assert grpc_failure(stub_of(to_nobody.grpc_url).ServerLive, service_pb2.ServerLiveRequest()) == (
            "UNAVAILABLE",
            "Triton does not answer; try again later",
        )


@pytest.mark.end_to_end
def test_access_log_names_no_query_and_no_header(server: TritonServer, tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    with running_gateway(server, access_log=log) as running:
        ask(running.http_url, "GET", "/v2/health/ready?secret=1", headers={"Authorization": "Bearer secret"})
    entry = json.loads(log.read_text())
    assert (entry["path"], entry["status"], entry["method"]) == ("/v2/health/ready", 200, "GET")
    assert "secret" not in log.read_text()


@pytest.mark.end_to_end
@pytest.mark.parametrize("wish", [{"timeout": 1000}, {"priority": 1}, {"parameters": {"of_my_own": "x"}}])
def test_parameters_of_a_request_are_refused_in_words(gateway: GatewayProcess, wish: dict[str, Any]) -> None:
    """Parameters could change the queue policy, which callers may not; Tailor's client sends none."""
    encoded = np.array([[picture(1)]], dtype=np.object_)
    for kind, url in ((tritonclient.http, gateway.http_url), (tritonclient.grpc, gateway.grpc_url)):
        image = kind.InferInput("image", [1, 1], "BYTES")
        image.set_data_from_numpy(encoded)
        client = kind.InferenceServerClient(url.partition("://")[2])
        with pytest.raises(InferenceServerException) as caught:
            client.infer("classifier", [image], **wish)
        client.close()
        http = kind is tritonclient.http
        name = "of_my_own" if "parameters" in wish else next(iter(wish))
        assert caught.value.status() == ("400" if http else "StatusCode.INVALID_ARGUMENT")
        message = f"parameter '{name}' is not accepted here; leave it out" if http else "set the deadline of the call"
        assert message in caught.value.message()
