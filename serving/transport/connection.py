"""Connection settings of a server: URL, TLS files, and the headers of each request."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serving.shared.errors import InputError

SCHEMES = {"http": ("http", False), "https": ("http", True), "grpc": ("grpc", False), "grpcs": ("grpc", True)}
HEADER_NAME = re.compile(r"(?!grpc-)[a-z0-9._-]+(?<!-bin)")  # text metadata keys of gRPC; HTTP allows more
RESERVED_HEADERS = (
    *("accept-encoding", "connection", "content-encoding", "content-length", "content-type", "host"),
    *("inference-header-content-length", "te", "transfer-encoding"),
)
HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")  # a name or an IPv4 address, or an IPv6 address
PATH = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@%/-]*")
CONNECT_TIMEOUT = 10.0  # seconds
RESPONSE_BYTES = 64 * 1024 * 1024  # limit on a response body; Triton's responses are far smaller
GRPC_OPTIONS = [
    ("grpc.max_receive_message_length", RESPONSE_BYTES),
    ("grpc.max_send_message_length", -1),
    # Both protocols connect directly to the given address; gRPC would otherwise use http_proxy, even for loopback.
    ("grpc.enable_http_proxy", 0),
    # gRPC waits 1 s or more before it reconnects; retries.py controls the waits instead.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(frozen=True)
class Connection:
    """Connection settings of one server. Raises InputError for an invalid URL, header, file or combination.

    url: http://host:port, https://…, grpc://host:port or grpcs://…. headers: sent with every request; they may contain
    secrets, so no error message and no repr shows them. ca_file: PEM of the CAs to trust instead of the system's.
    certificate_file, key_file: PEM of a client certificate. insecure: accept any certificate (https only).
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    ca_file: Path | str | None = None
    certificate_file: Path | str | None = None
    key_file: Path | str | None = None
    insecure: bool = False
    protocol: str = field(init=False)
    secure: bool = field(init=False)
    host: str = field(init=False)
    port: int = field(init=False)
    path: str = field(init=False)

    def __post_init__(self) -> None:
        for name, value in _parse_url(self.url).items():
            object.__setattr__(self, name, value)
        object.__setattr__(
            self, "headers", {_header_name(name): _header_value(name, self.headers[name]) for name in self.headers}
        )
        tls_options = {
            "ca_file": self.ca_file,
            "certificate_file": self.certificate_file,
            "insecure": self.insecure or None,
        }
        for name, value in tls_options.items():
            if value is not None and not self.secure:
                raise InputError(f"{name} is given but {self.url} is not encrypted; use https:// or grpcs://")
        if self.insecure and self.ca_file is not None:
            raise InputError("insecure and ca_file exclude each other; give only ca_file, which verifies the server")
        if self.insecure and self.protocol == "grpc":
            raise InputError("insecure is not possible with grpcs://, gRPC checks every certificate; give ca_file")
        if (self.certificate_file is None) != (self.key_file is None):
            raise InputError("certificate_file and key_file go together; give both or neither")

    def __repr__(self) -> str:
        return f"Connection({self.url!r})"

    @property
    def address(self) -> str:
        """host:port; an IPv6 host is in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def ssl_context(self) -> ssl.SSLContext | None:
        """Return the TLS context for HTTP; None for a URL without TLS. Raises InputError for an invalid PEM file."""
        if not self.secure:
            return None
        ca, certificate, key = self._pem_files()
        context = ssl.create_default_context(cadata=ca and ca.decode("ascii", "ignore"))
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if certificate and key:
            try:
                context.load_cert_chain(self.certificate_file, self.key_file)  # type: ignore[arg-type]
            except ssl.SSLError as error:
                raise InputError(
                    f"{self.certificate_file}, {self.key_file}: are not a certificate and its key: {error.reason}"
                ) from None
        return context

    def grpc_credentials(self) -> Any:
        """Return the TLS credentials for gRPC; None for a URL without TLS. Raises InputError as ssl_context does."""
        if not self.secure:
            return None
        import grpc

        ca, certificate, key = self._pem_files()
        self.ssl_context()  # detects a wrong key now; gRPC would fail only at the first request
        return grpc.ssl_channel_credentials(ca, key, certificate)

    def grpc_channel(self, asynchronous: bool = False) -> Any:
        """Open a gRPC channel to the address, of grpc or (asynchronous) grpc.aio."""
        import grpc

        api, credentials = grpc.aio if asynchronous else grpc, self.grpc_credentials()
        if credentials is None:
            return api.insecure_channel(self.address, options=GRPC_OPTIONS)
        return api.secure_channel(self.address, credentials, options=GRPC_OPTIONS)

    def _pem_files(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        ca = _read_pem(self.ca_file, "ca_file")
        if ca is not None:
            try:
                ssl.create_default_context(cadata=ca.decode("ascii", "ignore"))
            except ssl.SSLError:
                raise InputError(f"{self.ca_file}: holds no usable certificate; expected the CA's as PEM") from None
        return ca, _read_pem(self.certificate_file, "certificate_file"), _read_pem(self.key_file, "key_file")


def parse_url(url: str) -> tuple[str, bool, str]:
    """Parse a server URL into protocol (http or grpc), TLS flag and host:port. Raises InputError."""
    connection = Connection(url)
    return connection.protocol, connection.secure, connection.address


def _parse_url(url: str) -> dict[str, Any]:
    invalid = InputError(f"url is {url!r}; expected http://host:port or grpc://host:port")
    try:
        parts = urlsplit(url)
        port = parts.port
        # ASCII (IDNA) is the form that every HTTP and gRPC library accepts.
        host = (parts.hostname or "").encode("idna").decode("ascii")
    except ValueError:
        raise invalid from None
    if parts.username or parts.password:
        raise InputError("url holds a user name or password; give them as a header, where no log shows them")
    if parts.scheme not in SCHEMES or not HOST.fullmatch(host) or port == 0 or parts.query or parts.fragment:
        raise invalid
    protocol, secure = SCHEMES[parts.scheme]
    if protocol == "grpc" and (port is None or parts.path not in ("", "/")):
        raise invalid
    if not PATH.fullmatch(parts.path):
        raise invalid
    port = port if port is not None else 443 if secure else 80
    return {"protocol": protocol, "secure": secure, "host": host, "port": port, "path": parts.path.rstrip("/")}


def _header_name(name: str) -> str:
    if not HEADER_NAME.fullmatch(name.lower()):
        raise InputError(f"header name is {name!r}; expected letters, digits, dots and dashes, not grpc-… or …-bin")
    if name.lower() in RESERVED_HEADERS:
        raise InputError(f"header {name} is set by the connection; remove it")
    return name.lower()


def _header_value(name: str, value: str) -> str:
    if not isinstance(value, str) or not value.isascii() or not value.isprintable():
        raise InputError(f"header {name} holds a value that cannot be sent; expected printable ASCII on one line")
    return value


def _read_pem(path: Path | str | None, name: str) -> bytes | None:
    if path is None:
        return None
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{name} {path}: {error.strerror}; give a PEM file") from None
    if b"-----BEGIN " not in data:
        raise InputError(f"{name} {path}: is not a PEM file; it holds no -----BEGIN line")
    return data
