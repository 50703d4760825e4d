"""The gateway's connection handling: thousands of connections from one address, TLS, reset streams."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from serving.gateway.nginx_process import GatewayProcess
from serving.server.triton_server import TritonServer
from tests.support import bad_connections
from tests.support.bad_requests import INFER, good_body
from tests.support.crowds import CROWDS, crowd
from tests.support.running_gateway import RSA, make_certificate, running_gateway

pytestmark = pytest.mark.end_to_end

ATTACKER = "127.0.0.2"
PROXY = "127.0.0.3"
CONNECTIONS = 2500


@pytest.fixture(scope="module")
def gateways(server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, GatewayProcess]]:
    """Gateways with and without TLS, with the default limits on connections and a header timeout of a minute."""
    certificate, key = make_certificate(tmp_path_factory.mktemp("tls"), RSA)
    with (
        running_gateway(server, header_seconds=60) as plain,
        running_gateway(server, header_seconds=60, certificate=certificate, key=key) as encrypted,
    ):
        yield {False: plain, True: encrypted}


def infer_status(gateway: GatewayProcess) -> int | str:
    """Send a valid request over a new connection; return its status, or the error."""
    address = (str(gateway.gateway.host), gateway.gateway.http_port)
    if gateway.gateway.certificate:
        trusting = ssl.create_default_context(cafile=str(gateway.gateway.certificate))
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(*address, context=trusting, timeout=5)
    else:
        connection = http.client.HTTPConnection(*address, timeout=5)
    try:
        connection.request("POST", INFER, *good_body())
        return connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return repr(error)
    finally:
        connection.close()


@pytest.mark.parametrize("name", CROWDS)
def test_connections_of_one_address_fail_no_request_of_another(gateways: dict[bool, GatewayProcess], name: str) -> None:
    protocol, tls, first_bytes = CROWDS[name]
    attacked = gateways[tls].gateway
    port = attacked.http_port if protocol == "http" else attacked.grpc_port
    with crowd(port, first_bytes, CONNECTIONS, ATTACKER):
        statuses = [infer_status(gateways[tls]) for _ in range(100)]
    assert statuses == [200] * 100


def test_one_address_gets_twice_as_many_connections_as_requests(server: TritonServer) -> None:
    with running_gateway(server, connections_per_address=4) as running, ExitStack() as stack:
        port = running.gateway.http_port
        opened = [stack.enter_context(bad_connections.connected(port, 1.0)) for _ in range(10)]
        ended = 0
        for one in opened:
            try:
                one.sendall(b"GET /gateway/health HTTP/1.1\r\nHost: tailor\r\n\r\n")
                ended += not one.recv(4096).startswith(b"HTTP/1.1 200")
            except OSError:
                ended += 1
        assert ended == 10 - 8
        assert infer_status(running) != 200
        opened[0].close()
        with bad_connections.connected(port, source=ATTACKER) as other:
            other.sendall(b"GET /gateway/health HTTP/1.1\r\nHost: tailor\r\n\r\n")
            assert other.recv(4096).startswith(b"HTTP/1.1 200")


def test_only_trusted_proxies_set_the_forwarded_address_and_their_connections_are_not_limited(
    server: TritonServer, tmp_path: Path
) -> None:
    log = tmp_path / "access.jsonl"
    values: dict[str, object] = {"trusted_proxies": [f"{PROXY}/32"], "connections_per_address": 2, "access_log": log}
    with running_gateway(server, **values) as running, ExitStack() as stack:
        for source, forwarded in [(PROXY, "9.9.9.9"), (PROXY, f"9.9.9.8, {PROXY}"), (ATTACKER, "9.9.9.7")] + [
            (PROXY, f"9.9.8.{number}") for number in range(20)
        ]:
            opened = stack.enter_context(bad_connections.connected(running.gateway.http_port, source=source))
            request = bad_connections.odd("GET /gateway/health HTTP/1.1", f"X-Forwarded-For: {forwarded}")
            opened.sendall(request)
            assert opened.recv(4096).startswith(b"HTTP/1.1 200")
    addresses = [json.loads(line)["address"] for line in log.read_text().splitlines()]
    assert addresses == ["9.9.9.9", "9.9.9.8", ATTACKER, *(f"9.9.8.{number}" for number in range(20))]


@pytest.mark.parametrize(
    ("ciphers", "accepted"),
    [
        ("ECDHE-RSA-AES128-GCM-SHA256", True),
        ("ECDHE-RSA-AES256-GCM-SHA384", True),
        ("ECDHE-RSA-CHACHA20-POLY1305", True),
        ("ECDHE-RSA-AES128-SHA256", False),
        ("ECDHE-RSA-AES256-SHA", False),
        ("AES128-GCM-SHA256", False),
        ("AES256-SHA", False),
    ],
)
def test_tls_1_2_needs_forward_secrecy_and_authenticated_encryption(
    gateways: dict[bool, GatewayProcess], ciphers: str, accepted: bool
) -> None:
    gateway = gateways[True].gateway
    context = ssl.create_default_context(cafile=str(gateway.certificate))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(ciphers)
    for port in (gateway.http_port, gateway.grpc_port):
        with socket.create_connection((str(gateway.host), port), timeout=5) as plain:
            if accepted:
                with context.wrap_socket(plain, server_hostname="127.0.0.1") as encrypted:
                    assert encrypted.cipher()[0] == ciphers
            else:
                with pytest.raises(ssl.SSLError, match="handshake failure"):
                    context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_many_reset_streams_close_their_connection(gateways: dict[bool, GatewayProcess]) -> None:
    """CVE-2023-44487 (rapid reset): nginx counts streams as requests of their connection."""
    assert bad_connections.resets_until_goaway(gateways[False].gateway.grpc_port, limit=3000) < 2000


def test_calls_of_a_grpc_channel_continue_beyond_the_request_limit_of_a_connection(
    gateways: dict[bool, GatewayProcess],
) -> None:
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(gateways[False].grpc_url.partition("://")[2], options=options) as channel:
        live = service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive
        calls = [live.future(service_pb2.ServerLiveRequest(), timeout=30) for _ in range(50)]
        for _ in range(50):
            assert all(call.result().live for call in calls)
            calls = [live.future(service_pb2.ServerLiveRequest(), timeout=30) for _ in range(50)]
        assert all(call.result().live for call in calls)
