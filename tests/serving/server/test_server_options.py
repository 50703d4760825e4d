"""Options of `tailor serve`: OpenTelemetry traces and TLS in the real server."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.http
import trustme
from conftest import picture
from tritonclient.grpc import service_pb2, service_pb2_grpc

from serving.client.sync_client import Client
from serving.server.arguments import grpc_tls_options, trace_options
from serving.server.model_control import ModelControl
from serving.server.running import find_running
from serving.server.triton_server import TritonServer
from serving.shared.errors import InputError, ServingError
from tests.support.running_gateway import make_certificate

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize(
    ("url", "every", "message"),
    [
        ("127.0.0.1:4318", 1, "trace url is '127.0.0.1:4318'; expected http://host:port/v1/traces"),
        ("https://collector:4318/v1/traces", 1, "trace url is 'https://"),
        ("http://collector:4318/v1/traces,mode=triton", 1, "trace url is"),
        ("http://collector:port/", 1, "trace url is"),
        ("http://collector:4318/v1/traces", 0, "every is 0"),
    ],
)
def test_unusable_trace_option_is_named(url: str, every: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace_options(url, every)


@pytest.mark.slow
def test_serve_refuses_an_unusable_trace_url_in_one_line(
    tailor: Callable[..., subprocess.CompletedProcess[str]], repository: Path
) -> None:
    ended = tailor("serve", "--repository", repository, "--trace-url", "127.0.0.1:4318")
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "trace url is '127.0.0.1:4318'; expected http://host:port/v1/traces" in ended.stderr


def test_unusable_certificate_is_named(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    with pytest.raises(InputError, match=r"nowhere\.crt: No such file or directory; give a PEM file"):
        grpc_tls_options(tmp_path / "nowhere.crt", key)
    (tmp_path / "text.key").write_text("secret")
    with pytest.raises(InputError, match=r"text\.key: is not a PEM file"):
        grpc_tls_options(certificate, tmp_path / "text.key")


@pytest.fixture
def collector() -> Iterator[tuple[str, list[dict]]]:
    """An OTLP/HTTP endpoint, and its received spans."""
    spans: list[dict] = []

    class Endpoint(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in content["resourceSpans"]:
                service = {entry["key"]: entry["value"] for entry in resource["resource"]["attributes"]}["service.name"]
                for scope in resource.get("scopeSpans", resource.get("instrumentationLibrarySpans", [])):
                    spans.extend(span | {"service": service["stringValue"]} for span in scope["spans"])
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        server.shutdown()


@contextmanager
def serving(repository: Path, *options: str) -> Iterator[tuple[str, str]]:
    """Run `tailor serve` with options, stop it by SIGTERM; yields its HTTP and gRPC URLs."""
    command = [sys.executable, "-m", "serving.commands", "serve", "--repository", str(repository), "--quiet"]
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    with subprocess.Popen([*command, *options, *ports], stdout=subprocess.PIPE, text=True) as process:
        try:
            _, http_url, grpc_url = process.stdout.readline().split()
            yield http_url, grpc_url
        finally:
            process.terminate()
            assert process.wait(40) == 0


def ask_within_trace(http_url: str, trace: str) -> None:
    raw = tritonclient.http.InferenceServerClient(http_url.partition("://")[2])
    image = tritonclient.http.InferInput("image", [1, 1], "BYTES")
    image.set_data_from_numpy(np.array([[picture(1)]], dtype=np.object_))
    raw.infer("classifier", [image], headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
    raw.close()


@pytest.mark.end_to_end
def test_serve_sends_traces_to_a_collector_that_carry_the_callers_trace(
    repository: Path, collector: tuple[str, list[dict]]
) -> None:
    url, spans = collector
    with serving(repository, "--trace-url", url, "--trace-every", "1") as (http_url, _):
        with Client(http_url) as client:
            client.predict([picture(1)], "train")
        ask_within_trace(http_url, TRACE)
        deadline = time.monotonic() + 15
        while not any(span["traceId"] == TRACE for span in spans) and time.monotonic() < deadline:
            time.sleep(0.2)
    assert {span["service"] for span in spans} == {"tailor"}
    assert {"InferRequest", "compute"} <= {span["name"] for span in spans}
    assert any(span["traceId"] == TRACE for span in spans)


@pytest.mark.end_to_end
def test_serve_traces_each_nth_request_alone(repository: Path, collector: tuple[str, list[dict]]) -> None:
    url, spans = collector
    with serving(repository, "--trace-url", url, "--trace-every", "10") as (http_url, _), Client(http_url) as client:
        for _ in range(40):
            client.predict([picture(1)], "train")
    # The server's own golden requests before readiness count too; each trace has one span of this name.
    assert 4 <= [span["name"] for span in spans].count("InferRequest") <= 6


@pytest.mark.end_to_end
def test_grpc_with_a_certificate_accepts_only_tls(repository: Path, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    with TritonServer(
        repository, http_port=0, grpc_port=0, metrics_port=0, options=grpc_tls_options(certificate, key)
    ) as server:
        address = server.grpc_url.partition("://")[2]
        credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
        with grpc.secure_channel(address, credentials) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            assert stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=10).ready
        with grpc.insecure_channel(address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            with pytest.raises(grpc.RpcError):
                stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=5)


@pytest.mark.end_to_end
def test_serve_with_a_certificate_answers_over_tls_alone_and_still_loads_models(
    repository: Path, tmp_path: Path
) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("models.example.org", "127.0.0.1")
    ca, certificate, key = (tmp_path / name for name in ("ca.pem", "tls.crt", "tls.key"))
    authority.cert_pem.write_to_path(ca)
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    options = ["--grpc-tls-cert", str(certificate), "--grpc-tls-key", str(key)]
    with serving(repository, *options) as (http_url, grpc_url):
        assert grpc_url.startswith("grpcs://")
        with Client(grpc_url, ca_file=ca) as client:
            assert client.predict([picture(1)])[0].version == 1
        for url in (grpc_url, grpc_url.replace("grpcs://", "grpc://")):  # an unrelated CA; no TLS
            with Client(url, timeout=3) as client, pytest.raises(ServingError):
                client.predict([picture(1)])
        (running,) = [server for server in find_running(repository) if server.grpc_url == grpc_url]
        assert running.url == http_url
        with ModelControl(running, timeout=20) as control:
            control.load("classifier")
            assert control.ready_versions("classifier") == [1]
        other = authority.issue_cert("127.0.0.1")
        other.cert_chain_pems[0].write_to_path(certificate)
        with pytest.raises(ServingError, match=r"does not present .*tls\.crt"):
            ModelControl(running, timeout=5)
