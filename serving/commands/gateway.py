"""`tailor gateway`: run nginx in front of Triton, or write its configuration for another nginx."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from serving.gateway.config import MIB, Gateway, read_gateway
from serving.gateway.nginx_process import GatewayProcess, write_config
from serving.shared.terminal import print

DEFAULT = Gateway()


class Stopped(SystemExit):
    """Raised when the gateway receives SIGTERM or SIGINT."""


def gateway(
    host: Annotated[str, typer.Option(help="IPv4 address to listen on; any but loopback needs TLS.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Port for HTTP.")] = DEFAULT.http_port,
    grpc_port: Annotated[int, typer.Option(help="Port for gRPC.")] = DEFAULT.grpc_port,
    upstream_http: Annotated[str, typer.Option(help="Triton's HTTP port, host:port.")] = DEFAULT.upstream_http,
    upstream_grpc: Annotated[str, typer.Option(help="Triton's gRPC port, host:port.")] = DEFAULT.upstream_grpc,
    certificate: Annotated[Path | None, typer.Option(help="PEM certificate chain; TLS on both ports.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM private key of the certificate.")] = None,
    body_mib: Annotated[int, typer.Option(help="Largest request in MiB.")] = DEFAULT.body_bytes // MIB,
    answer_seconds: Annotated[int, typer.Option(help="Seconds that Triton may take.")] = DEFAULT.answer_seconds,
    connections: Annotated[int, typer.Option(help="Requests at once, of all callers.")] = DEFAULT.connections,
    connections_per_address: Annotated[
        int, typer.Option(help="Requests at once of one address.")
    ] = DEFAULT.connections_per_address,
    requests_per_second: Annotated[
        int, typer.Option(help="Requests a second of one address; 0 for no bound.")
    ] = DEFAULT.requests_per_second,
    large_images: Annotated[
        int,
        typer.Option(
            help="Requests at once whose images take more than 5 ms to decode; instances of `classifier` less 1."
        ),
    ] = DEFAULT.large_images,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(help="Network, as 10.0.0.0/8, whose X-Forwarded-For names the caller; may be given again."),
    ] = None,
    access_log: Annotated[Path | None, typer.Option(help="JSON lines, one a request; off if not given.")] = None,
    workers: Annotated[int, typer.Option(help="nginx's processes; 0 for one per core.")] = DEFAULT.workers,
    write: Annotated[
        Path | None,
        typer.Option(help="Only write nginx.conf and its Lua into this folder, for an nginx elsewhere."),
    ] = None,
    runtime_folder: Annotated[
        Path | None, typer.Option(help="With --write: where that nginx keeps its pid and buffered bodies.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run nginx in front of a Triton server until SIGTERM.

    It bounds size, time and connections. Prints one line `ready http://... grpc://...`. Only health, metadata,
    configuration and inference pass.
    """
    wanted = read_gateway(
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        upstream_http=upstream_http,
        upstream_grpc=upstream_grpc,
        certificate=certificate,
        key=key,
        body_bytes=body_mib * MIB,
        answer_seconds=answer_seconds,
        connections=connections,
        connections_per_address=connections_per_address,
        requests_per_second=requests_per_second,
        large_images=large_images,
        trusted_proxies=trusted_proxy or (),
        access_log=access_log,
        workers=workers,
    )
    if write is not None:
        print(write_config(wanted, write.absolute(), runtime_folder and runtime_folder.absolute()))
        return
    _run(wanted)


def _run(wanted: Gateway) -> None:
    def stop(_number: int, _frame: object) -> None:
        raise Stopped

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        with GatewayProcess(wanted) as running:
            print(f"ready {running.http_url} {running.grpc_url}", flush=True)
            running.keep_running(lambda line: print(f"tailor: {line}", file=sys.stderr, flush=True))
    except Stopped:
        pass
    print("stopped", flush=True)
