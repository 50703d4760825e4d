"""The gateway under thousands of connections of one address, before any request of theirs is complete."""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import bad_connections
import pytest
from bad_requests import INFER, good_body
from running_gateway import make_certificate, running_gateway

from serving.gateway_process import GatewayProcess
from serving.server import TritonServer

pytestmark = pytest.mark.end_to_end

ATTACKER = "127.0.0.2"
CONNECTIONS = 2500


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "tls"])
def gateway(request: pytest.FixtureRequest, server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with its default bounds on connections, which waits longer for headers than a test lasts."""
    values: dict[str, object] = {"header_seconds": 60}
    if request.param:
        values["certificate"], values["key"] = make_certificate(tmp_path_factory.mktemp("tls"))
    with running_gateway(server, **values) as running:
        yield running


def infer_status(gateway: GatewayProcess) -> int | str:
    """The status of one good request over a connection of its own, or the error that came instead."""
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


@pytest.mark.parametrize("name", bad_connections.CROWDS)
def test_crowd_of_one_address_fails_no_request_of_another(gateway: GatewayProcess, name: str) -> None:
    protocol, tls, first_bytes = bad_connections.CROWDS[name]
    if tls != bool(gateway.gateway.certificate):
        pytest.skip("this attack is for the other gateway")
    port = gateway.gateway.http_port if protocol == "http" else gateway.gateway.grpc_port
    with bad_connections.crowd(port, first_bytes, CONNECTIONS, ATTACKER):
        statuses = [infer_status(gateway) for _ in range(100)]
    assert statuses == [200] * 100
