"""The gateway's configuration: typed limits in, an nginx.conf out. The only door to Triton that a stranger may knock at."""

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
# TLS 1.2 with forward secrecy and authenticated encryption; TLS 1.3 has nothing else.
CIPHERS = ":".join(
    f"ECDHE-{key}-{cipher}"
    for cipher in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")
    for key in ("ECDSA", "RSA")
)
# What a path may not hold, although it stands in quotes: nginx reads them (Lua the semicolon and the question mark).
READ_BY_NGINX = re.compile(r"""["'$\\;?{}#]""")
EXPECTED = "expected an absolute path without quotes, $ \\ ; ? { } # and control characters"
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[int, Field(ge=1, le=3600)]
Address = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?:[0-9]{1,5}$")]


@dataclass(frozen=True)
class Refusal:
    """What the gateway itself answers: an HTTP status, the gRPC status that means the same, and the words for both."""

    status: int
    grpc_status: int
    message: str


class Gateway(BaseModel):
    """Where the gateway listens, what it stands before and what it lets through. Sizes in bytes, times in seconds.

    body_bytes bounds a request; header_seconds the reading of its headers, body_seconds each wait for a piece of its body,
    answer_seconds the server's work on it. connections bounds the requests at once, connections_per_address those of one
    caller, requests_per_second a caller's rate (0: no bound). large_images bounds the requests at once whose images take
    more than 5 ms to decode; a caller's wait their turn. trusted_proxies: networks whose X-Forwarded-For is believed.
    workers: nginx's processes, 0 for one per core. modules: where nginx's module for Lua lies. Without certificate and key
    there is no TLS.
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
    # One MiB more than the client puts into a request: names, shapes, priors.
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
    def _plain_path(cls, path: Path | None) -> Path | None:
        if path is None:
            return None
        absolute = Path.cwd() / path
        if _nginx_reads(absolute):
            raise ValueError(f"{absolute} has a character that nginx would read; {EXPECTED}")
        return absolute

    @model_validator(mode="after")
    def _holds_together(self) -> Gateway:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key come together; give both or neither")
        if self.certificate is None and not self.host.is_loopback:
            raise ValueError(f"host is {self.host} without TLS; give certificate and key, or listen on 127.0.0.1")
        if self.http_port == self.grpc_port:
            raise ValueError(f"http_port and grpc_port are both {self.http_port}; expected different ports")
        return self

    @property
    def open_per_address(self) -> int:
        """Bound on the TCP connections of one address. Twice its requests, so that idle ones do not count against it."""
        return 2 * self.connections_per_address

    @property
    def open_connections(self) -> int:
        """Bound on the TCP connections of all callers."""
        return 2 * self.connections

    @property
    def worker_connections(self) -> int:
        """Sockets that one worker needs if it has all callers.

        For each caller one socket of its own and the two ends of a Unix socket, for each request one to Triton; and
        the listening, the idle and the closing ones.
        """
        return 3 * self.open_connections + self.connections + 256

    @property
    def open_files(self) -> int:
        """File descriptors that one worker needs: its sockets and a file for each body that it buffers."""
        return self.worker_connections + self.connections + 64

    def refusals(self) -> list[Refusal]:
        """What the gateway answers of its own, each once per HTTP status."""
        size = f"{self.body_bytes // MIB} MiB"
        unavailable = "Triton does not answer; try again later"
        return [
            Refusal(400, 3, "bad request: not HTTP as this gateway reads it"),
            Refusal(
                404, 12, "no such endpoint here; ask for health, metadata, config or infer of student or classifier"
            ),
            Refusal(405, 12, "method not allowed here; POST to infer, GET the rest"),
            Refusal(408, 4, f"request body did not come within {self.body_seconds} s; send it faster"),
            Refusal(411, 3, "Transfer-Encoding is not accepted; send Content-Length"),
            Refusal(412, 9, "conditional requests are not accepted; leave out If-Match and If-Unmodified-Since"),
            Refusal(413, 8, f"request body is too large; send at most {size}, and health or metadata without one"),
            Refusal(414, 3, "request line is too long"),
            Refusal(415, 12, "compressed requests are not accepted; send the body as it is"),
            Refusal(429, 8, "too many requests at once; wait for answers before you send more"),
            Refusal(494, 3, "request headers are too large"),
            Refusal(497, 3, "this port speaks TLS; use https"),
            Refusal(500, 13, "internal error of the gateway; its log has the reason"),
            Refusal(501, 12, "this Transfer-Encoding is not accepted; send Content-Length"),
            Refusal(502, 14, unavailable),
            Refusal(503, 14, unavailable),
            Refusal(
                504, 4, f"Triton did not answer within {self.answer_seconds} s; send less at once or try again later"
            ),
            Refusal(505, 12, "this HTTP version is not accepted; send HTTP/1.1"),
        ]

    def routes(self) -> list[tuple[str, str]]:
        """Names of the routes from accepted connections to nginx's servers, and where each finds the caller's address."""
        direct, proxied = ("direct", "proxy_protocol"), ("proxied", "X-Forwarded-For")
        return [direct, proxied] if self.trusted_proxies else [direct]

    def render(self, folder: Path, runtime: Path | None = None) -> str:
        """The nginx.conf. Raises InputError for a path that nginx would read.

        folder: where the Lua lies. runtime: where nginx keeps its pid and the bodies that it buffers; folder if not
        given.
        """
        for path in (folder, runtime or folder):
            if _nginx_reads(path):
                raise InputError(f"{path}: has a character that nginx would read; {EXPECTED}")
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
            routes=self.routes(),
            errors=self.refusals(),
            grpc_queries=GRPC_QUERIES,
            admin_grpc_header=f"triton-grpc-protocol-{ADMIN_HEADER}",
        )


def read_gateway(**values: object) -> Gateway:
    """A Gateway from a caller's values. Raises InputError naming the first that is not usable."""
    try:
        return Gateway.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = str(first["msg"]).removeprefix("Value error, ")
        raise InputError(f"{where} is {first['input']!s}: {reason}" if where else reason) from None


def _nginx_reads(path: Path) -> bool:
    """Whether nginx would take a part of the path, in quotes, for something else."""
    text = str(path)
    return not text.isprintable() or not path.is_absolute() or READ_BY_NGINX.search(text) is not None
