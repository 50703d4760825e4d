"""Gateway configuration: validated limits, rendered to nginx.conf. Untrusted callers reach Triton only through it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from serving.client.sync_client import REQUEST_BYTES
from serving.repository.model_config import CLASSIFIER_INSTANCES
from serving.shared.errors import InputError
from serving.shared.names import ADMIN_HEADER

MIB = 1024 * 1024
GRPC_QUERIES = (
    r'~ "^/inference\.GRPCInferenceService/(?:Server(?:Live|Ready|Metadata)|Model(?:Ready|Metadata|Config))\z"'
)
# TLS 1.2 ciphers with forward secrecy and authenticated encryption; all TLS 1.3 ciphers have both.
CIPHERS = ":".join(
    f"ECDHE-{key}-{cipher}"
    for cipher in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")
    for key in ("ECDSA", "RSA")
)
# Characters forbidden in a path: nginx interprets them inside quotes (Lua: the semicolon and the question mark).
NGINX_SPECIAL = re.compile(r"""["'$\\;?{}#]""")
EXPECTED = "expected an absolute path without quotes, $ \\ ; ? { } # and control characters"
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[int, Field(ge=1, le=3600)]
Address = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?:[0-9]{1,5}$")]


@dataclass(frozen=True)
class ErrorResponse:
    """An error response of the gateway itself: HTTP status, equivalent gRPC status, and the message for both."""

    status: int
    grpc_status: int
    message: str


class Gateway(BaseModel):
    """Options of the gateway: listening ports, upstream addresses, limits. Sizes in bytes, times in seconds.

    body_bytes: size limit of a request body. header_seconds: timeout for reading the headers. body_seconds: timeout for
    each read of the body. answer_seconds: timeout for Triton's response. connections: concurrent requests in total;
    connections_per_address: of one caller. requests_per_second: rate limit of one caller (0: none). large_images:
    concurrent requests with images that take more than 5 ms to decode; a caller's further ones are queued.
    trusted_proxies: networks whose X-Forwarded-For header is used. workers: nginx worker processes, 0 for one per core.
    modules: folder of nginx's modules. Without certificate and key there is no TLS.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    host: IPv4Address = IPv4Address("127.0.0.1")
    http_port: Port = 8080
    grpc_port: Port = 8081
    upstream_http: Address = "127.0.0.1:8000"
    upstream_grpc: Address = "127.0.0.1:8001"
    certificate: Path | None = None
    key: Path | None = None
    access_log: Path | None = None
    # One MiB above the client's limit on images in a request, for names, shapes and priors.
    body_bytes: int = Field(default=REQUEST_BYTES + MIB, ge=MIB, le=1024 * MIB)
    header_seconds: Seconds = 5
    body_seconds: Seconds = 10
    answer_seconds: Seconds = 60
    shutdown_seconds: Seconds = 10
    connections: int = Field(default=512, ge=8, le=65536)
    connections_per_address: int = Field(default=128, ge=1, le=65536)
    requests_per_second: int = Field(default=0, ge=0, le=1_000_000)
    large_images: int = Field(default=CLASSIFIER_INSTANCES - 1, ge=1, le=256)
    trusted_proxies: tuple[IPv4Network, ...] = ()
    workers: int = Field(default=0, ge=0, le=256)
    modules: Path = Path("/usr/lib/nginx/modules")

    @field_validator("certificate", "key", "access_log", "modules")
    @classmethod
    def _check_path(cls, path: Path | None) -> Path | None:
        if path is None:
            return None
        absolute = Path.cwd() / path
        if _has_special_characters(absolute):
            raise ValueError(f"{absolute} has a character that nginx would interpret; {EXPECTED}")
        return absolute

    @model_validator(mode="after")
    def _check_combination(self) -> Gateway:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together; give both or neither")
        if self.certificate is None and not self.host.is_loopback:
            raise ValueError(f"host is {self.host} without TLS; give certificate and key, or listen on 127.0.0.1")
        if self.http_port == self.grpc_port:
            raise ValueError(f"http_port and grpc_port are both {self.http_port}; expected different ports")
        return self

    @property
    def open_per_address(self) -> int:
        """Limit on the TCP connections of one address: twice its requests, to leave room for idle connections."""
        return 2 * self.connections_per_address

    @property
    def open_connections(self) -> int:
        """Limit on the TCP connections of all callers."""
        return 2 * self.connections

    @property
    def worker_connections(self) -> int:
        """Sockets that one worker needs when it serves all callers.

        Per connection: the TCP socket and both ends of a Unix socket. Per request: one socket to Triton. 256 more for
        listening, idle and closing sockets.
        """
        return 3 * self.open_connections + self.connections + 256

    @property
    def open_files(self) -> int:
        """File descriptors that one worker needs: its sockets, and one file per buffered request body."""
        return self.worker_connections + self.connections + 64

    def error_responses(self) -> list[ErrorResponse]:
        """Return the gateway's error responses, one per HTTP status."""
        size, unavailable = f"{self.body_bytes // MIB} MiB", "Triton does not respond; try again later"
        return [
            ErrorResponse(400, 3, "bad request: this gateway cannot parse it as HTTP"),
            ErrorResponse(
                404,
                12,
                "no such endpoint; request health, metadata, config or infer of student, classifier or segmenter",
            ),
            ErrorResponse(405, 12, "method not allowed here; POST to infer, GET the rest"),
            ErrorResponse(408, 4, f"request body did not arrive within {self.body_seconds} s; send it faster"),
            ErrorResponse(411, 3, "Transfer-Encoding is not accepted; send Content-Length"),
            ErrorResponse(412, 9, "conditional requests are not accepted; leave out If-Match and If-Unmodified-Since"),
            ErrorResponse(413, 8, f"request body is too large; send at most {size}, and none with health or metadata"),
            ErrorResponse(414, 3, "request line is too long"),
            ErrorResponse(415, 12, "compressed requests are not accepted; send the body as it is"),
            ErrorResponse(429, 8, "too many concurrent requests; wait for responses before you send more"),
            ErrorResponse(494, 3, "request headers are too large"),
            ErrorResponse(497, 3, "this port accepts TLS only; use https"),
            ErrorResponse(500, 13, "internal error of the gateway; its log has the reason"),
            ErrorResponse(501, 12, "this Transfer-Encoding is not accepted; send Content-Length"),
            ErrorResponse(502, 14, unavailable),
            ErrorResponse(503, 14, unavailable),
            ErrorResponse(
                504,
                4,
                f"Triton did not respond within {self.answer_seconds} s; send fewer images per request or try again later",
            ),
            ErrorResponse(505, 12, "this HTTP version is not accepted; send HTTP/1.1"),
        ]

    def render(self, folder: Path, runtime: Path | None = None) -> str:
        """Render nginx.conf. Raises InputError for a path with characters that nginx would interpret.

        folder: folder of the Lua files. runtime: folder of nginx's pid file and buffered bodies; default: folder.
        """
        for path in (folder, runtime or folder):
            if _has_special_characters(path):
                raise InputError(f"{path}: has a character that nginx would interpret; {EXPECTED}")
        # Of each route from accepted connections to nginx's servers: its name, and the source of the caller's address.
        routes = [("direct", "proxy_protocol"), ("proxied", "X-Forwarded-For")][: 2 if self.trusted_proxies else 1]
        environment = Environment(
            loader=PackageLoader("serving.gateway", "."),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            autoescape=False,
        )
        return environment.get_template("nginx.conf.jinja").render(
            gateway=self,
            folder=folder,
            runtime=runtime or folder,
            ciphers=CIPHERS,
            routes=routes,
            errors=self.error_responses(),
            grpc_queries=GRPC_QUERIES,
            admin_grpc_header=f"triton-grpc-protocol-{ADMIN_HEADER}",
        )


def read_gateway(**values: object) -> Gateway:
    """Validate options and return a Gateway. Raises InputError naming the first invalid option."""
    try:
        return Gateway.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = str(first["msg"]).removeprefix("Value error, ")
        raise InputError(f"{where} is {first['input']!s}: {reason}" if where else reason) from None


def _has_special_characters(path: Path) -> bool:
    """Return whether nginx would interpret characters of the quoted path (or the path is relative or not printable)."""
    text = str(path)
    return not text.isprintable() or not path.is_absolute() or NGINX_SPECIAL.search(text) is not None
