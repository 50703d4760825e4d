"""TLS and headers of the clients: trusted certificates, sent headers, and secrets that are never shown."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from conftest import picture

from serving.client.async_client import AsyncClient
from serving.client.predictions import Prediction
from serving.client.sync_client import Client
from serving.server.triton_server import TritonServer
from serving.shared.errors import InputError, ServingError
from serving.transport.connection import Connection
from serving.transport.retries import Retries
from tests.support.faulty_server import FaultyGrpc, FaultyHttp, answers, grpc_server

SECRET = "s3cret-of-the-tests"  # pragma: allowlist secret
Predict = Callable[..., list[Prediction]]


def predict_sync(url: str, **options: Any) -> list[Prediction]:
    with Client(url, **options) as client:
        return client.predict([picture(1)], "train")


def predict_async(url: str, **options: Any) -> list[Prediction]:
    async def run() -> list[Prediction]:
        async with AsyncClient(url, **options) as client:
            return await client.predict([picture(1)], "train")

    return asyncio.run(run())


@pytest.fixture(params=[predict_sync, predict_async], ids=["sync", "async"])
def predict(request: pytest.FixtureRequest) -> Predict:
    return request.param


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CA, a server certificate, a client certificate, and an unrelated CA."""
    folder = tmp_path_factory.mktemp("pki")
    ca = trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    trustme.CA().cert_pem.write_to_path(folder / "other-ca.pem")
    for name, subject in (("server", "127.0.0.1"), ("elsewhere", "elsewhere.example"), ("client", "client.example")):
        leaf = ca.issue_cert(subject)
        leaf.private_key_pem.write_to_path(folder / f"{name}-key.pem")
        (folder / f"{name}.pem").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    return folder


def server_context(pki: Path, name: str = "server", mutual: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / f"{name}.pem", pki / f"{name}-key.pem")
    if mutual:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(pki / "ca.pem")
    return context


def grpc_credentials(pki: Path, mutual: bool = False) -> grpc.ServerCredentials:
    pair = ((pki / "server-key.pem").read_bytes(), (pki / "server.pem").read_bytes())
    return grpc.ssl_server_credentials([pair], (pki / "ca.pem").read_bytes() if mutual else None, mutual)


def http_target(server: TritonServer) -> tuple[str, int]:
    return server.host, server.ports["--http-port"]


@pytest.mark.end_to_end
@pytest.mark.parametrize("mutual", [False, True], ids=["server", "mutual"])
def test_https_with_the_right_ca_is_accepted(server: TritonServer, predict: Predict, pki: Path, mutual: bool) -> None:
    client = {"certificate_file": pki / "client.pem", "key_file": pki / "client-key.pem"} if mutual else {}
    with FaultyHttp(http_target(server), context=server_context(pki, mutual=mutual)) as proxy:
        assert predict(proxy.url, ca_file=pki / "ca.pem", **client) == predict(server.http_url)


@pytest.mark.end_to_end
@pytest.mark.parametrize("mutual", [False, True], ids=["server", "mutual"])
def test_grpcs_with_the_right_ca_is_accepted(server: TritonServer, predict: Predict, pki: Path, mutual: bool) -> None:
    client = {"certificate_file": pki / "client.pem", "key_file": pki / "client-key.pem"} if mutual else {}
    handler = FaultyGrpc(server.grpc_url.removeprefix("grpc://"))
    with grpc_server(handler, grpc_credentials(pki, mutual)) as url:
        assert predict(url, ca_file=pki / "ca.pem", **client) == predict(server.grpc_url)


@pytest.mark.parametrize(("ca", "name"), [(None, "server"), ("other-ca.pem", "server"), ("ca.pem", "elsewhere")])
def test_https_with_an_untrusted_certificate_is_rejected(
    predict: Predict, pki: Path, ca: str | None, name: str
) -> None:
    with FaultyHttp(None, context=server_context(pki, name)) as untrusted:
        with pytest.raises(ServingError, match=r"no encrypted connection: .* --ca-file") as caught:
            predict(untrusted.url, ca_file=ca and pki / ca)
        assert "\n" not in str(caught.value)
        assert untrusted.requests == []


@pytest.mark.parametrize("ca", [None, "other-ca.pem"])
def test_grpcs_with_an_untrusted_certificate_is_rejected(predict: Predict, pki: Path, ca: str | None) -> None:
    handler = FaultyGrpc(None)
    with grpc_server(handler, grpc_credentials(pki)) as url, pytest.raises(ServingError, match=r"--ca-file"):
        predict(url, ca_file=ca and pki / ca)
    assert handler.calls == []


@pytest.mark.filterwarnings("ignore:Unverified HTTPS")
@pytest.mark.end_to_end
def test_insecure_accepts_any_certificate(server: TritonServer, predict: Predict, pki: Path) -> None:
    with FaultyHttp(http_target(server), context=server_context(pki, "elsewhere")) as proxy:
        assert predict(proxy.url, insecure=True) == predict(server.http_url)


@pytest.mark.end_to_end
def test_tls_to_a_server_without_tls_is_an_error_in_one_line(server: TritonServer, predict: Predict, pki: Path) -> None:
    for url in (server.http_url.replace("http", "https"), server.grpc_url.replace("grpc", "grpcs")):
        with pytest.raises(ServingError, match=r"no encrypted connection|no Triton server") as caught:
            predict(url, ca_file=pki / "ca.pem")
        assert "\n" not in str(caught.value)


@pytest.mark.end_to_end
def test_headers_reach_the_server_over_http(server: TritonServer, predict: Predict) -> None:
    with FaultyHttp(http_target(server)) as proxy:
        predict(proxy.url, token=SECRET, headers={"X-Tenant": "shop 7"})
        [request] = proxy.requests  # both requests on one connection
    heads = [part.lower() for part in request.split(b"\r\n\r\n") if b" HTTP/1.1\r\n" in part]
    assert len(heads) == 2
    for head in heads:
        assert f"authorization: bearer {SECRET}".encode() in head
        assert b"x-tenant: shop 7" in head


@pytest.mark.end_to_end
def test_headers_reach_the_server_over_grpc(server: TritonServer, predict: Predict) -> None:
    handler = FaultyGrpc(server.grpc_url.removeprefix("grpc://"))
    with grpc_server(handler) as url:
        predict(url, headers={"Authorization": f"Bearer {SECRET}", "X-Tenant": "shop 7"})
    assert len(handler.calls) == 2
    for _, metadata in handler.calls:
        assert (metadata["authorization"], metadata["x-tenant"]) == (f"Bearer {SECRET}", "shop 7")


@pytest.mark.parametrize("name", ["bücher.invalid", "host_name.invalid", "127.0.0.1:1"])
@pytest.mark.parametrize("protocol", ["http", "https", "grpc", "grpcs"])
def test_an_unreachable_host_is_an_error_in_one_line(predict: Predict, protocol: str, name: str) -> None:
    url = f"{protocol}://{name}" if ":" in name else f"{protocol}://{name}:1"
    with pytest.raises(ServingError, match=f"no Triton server answers at {url}") as caught:
        predict(url, retries=Retries(attempts=1))
    assert "\n" not in str(caught.value)


def test_a_redirect_does_not_send_the_token_to_another_server(predict: Predict) -> None:
    with FaultyHttp(None) as elsewhere:
        moved = answers("307 Moved", Location=f"{elsewhere.url}/v2")
        with FaultyHttp(None, [moved], forever=True) as first, pytest.raises(ServingError, match="moved to"):
            predict(first.url, token=SECRET)
        assert elsewhere.requests == []


def test_secrets_are_in_no_message_and_no_repr(predict: Predict) -> None:
    options = {"headers": {"Authorization": SECRET}}
    assert SECRET not in repr(Connection("http://127.0.0.1:9", **options))
    with FaultyHttp(None, [answers("401 Unauthorized")], forever=True) as faulty, pytest.raises(ServingError) as caught:
        predict(faulty.url, **options)
    assert SECRET not in str(caught.value)
    with pytest.raises(InputError) as rejected:
        predict("http://127.0.0.1:9", headers={"Authorization": f"{SECRET}\r\nX: y"})
    assert SECRET not in str(rejected.value)
    with pytest.raises(InputError, match="url holds a user name or password") as rejected:
        predict(f"http://someone:{SECRET}@127.0.0.1:9")
    assert SECRET not in str(rejected.value)


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("http://h:1", {"ca_file": "ca.pem"}, "ca_file is given but http://h:1 is not encrypted; use https://"),
        ("grpc://h:1", {"insecure": True}, "insecure is given but grpc://h:1 is not encrypted"),
        ("grpcs://h:1", {"insecure": True}, "insecure is not possible with grpcs://"),
        ("https://h:1", {"insecure": True, "ca_file": "ca.pem"}, "insecure and ca_file exclude each other"),
        ("https://h:1", {"certificate_file": "client.pem"}, "certificate_file and key_file go together"),
        ("https://h:1", {"ca_file": "nowhere.pem"}, "ca_file .*nowhere.pem: No such file"),
        ("https://h:1", {"ca_file": "note.txt"}, "note.txt: is not a PEM file"),
        ("https://h:1", {"ca_file": "server-key.pem"}, "server-key.pem: holds no usable certificate"),
        ("grpcs://h:1", {"ca_file": "server-key.pem"}, "server-key.pem: holds no usable certificate"),
        ("https://h:1", {"certificate_file": "client.pem", "key_file": "server-key.pem"}, "are not a certificate and"),
        ("grpcs://h:1", {"certificate_file": "client.pem", "key_file": "server-key.pem"}, "are not a certificate and"),
        ("http://h:1", {"headers": {"bad name": "x"}}, "header name is 'bad name'"),
        ("grpc://h:1", {"headers": {"x-bin": "x"}}, "header name is 'x-bin'"),
        ("grpc://h:1", {"headers": {"Grpc-Timeout": "1S"}}, "header name is 'Grpc-Timeout'"),
        ("http://h:1", {"headers": {"Host": "x"}}, "header Host is set by the connection; remove it"),
        ("http://h:1", {"headers": {"Authorization": "x"}, "token": "y"}, "exclude each other"),
        ("http://h:1", {"concurrency": 0}, "concurrency is 0; expected 1 to 256"),
        ("ftp://h:1", {}, "url is 'ftp://h:1'; expected http://host:port or grpc://host:port"),
        ("grpc://h", {}, "expected http://host:port"),
        ("http://h:0", {}, "expected http://host:port"),
        ("http://two words:1", {}, "expected http://host:port"),
        ("http://a..b:1", {}, "expected http://host:port"),
        (f"http://{'a' * 64}:1", {}, "expected http://host:port"),
        ("http://h:1/pre fix", {}, "expected http://host:port"),
        ("http://[::1:1", {}, "expected http://host:port"),
        ("http://h:99999", {}, "expected http://host:port"),
    ],
)
def test_invalid_options_are_rejected_by_the_constructor(
    pki: Path, url: str, options: dict[str, Any], message: str
) -> None:
    (pki / "note.txt").write_text("a note")
    arguments = {name: pki / value if name.endswith("_file") else value for name, value in options.items()}
    for kind in (Client, AsyncClient):
        with pytest.raises(InputError, match=message):
            kind(url, **arguments)
