"""Start a gateway in front of a test server, with or without TLS; skips where nginx is missing."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from serving.gateway.config import Gateway
from serving.gateway.nginx_process import PACKAGES, GatewayProcess, find_nginx
from serving.server.triton_server import TritonServer
from serving.shared.errors import ServingError
from serving.shared.ports import choose_ports

EC = ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
RSA = ("rsa:2048",)


def require_nginx() -> None:
    try:
        find_nginx(Gateway())
    except ServingError as error:
        pytest.skip(f"{error}; .ci/run installs {PACKAGES}")


@contextmanager
def running_gateway(
    server: TritonServer, log: Path | None = None, kind: type[Gateway] = Gateway, **values: object
) -> Iterator[GatewayProcess]:
    require_nginx()
    ports = choose_ports("127.0.0.1", {"http": 0, "grpc": 0})
    defaults = {
        "http_port": ports["http"],
        "grpc_port": ports["grpc"],
        "upstream_http": server.http_url.removeprefix("http://"),
        "upstream_grpc": server.grpc_url.removeprefix("grpc://"),
        "workers": 1,
        "shutdown_seconds": 2,
    }
    gateway = kind.model_validate(defaults | values)
    with GatewayProcess(gateway, log) as running:
        yield running


def workers_of(process_id: int) -> list[psutil.Process]:
    """Return the workers of nginx's master process; waits for them, since the master listens before it starts them."""
    master, deadline = psutil.Process(process_id), time.monotonic() + 10
    while not (workers := master.children()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return workers


def make_certificate(folder: Path, algorithm: tuple[str, ...] = EC) -> tuple[Path, Path]:
    """Create a self-signed certificate for 127.0.0.1; return the files of certificate and key."""
    certificate, key = folder / "tls.crt", folder / "tls.key"
    kind = ["-x509", "-newkey", *algorithm, "-nodes", "-days", "2"]
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    files = ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run(["openssl", "req", *kind, *subject, *files], check=True, capture_output=True)
    return certificate, key
