"""`tailor gateway`: run nginx in front of Triton, or write its configuration for another nginx."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.commands.options import Debug
from serving.commands.serve import Stopped, print_warning, raise_stopped_at_signals
from serving.gateway.config import MIB, Gateway, read_gateway
from serving.gateway.nginx_process import GatewayProcess, write_config
from serving.shared.terminal import print

DEFAULT = Gateway()


def gateway(
    host: Annotated[str, typer.Option(help="IPv4 address to listen on; other than loopback needs TLS.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Port for HTTP.")] = DEFAULT.http_port,
    grpc_port: Annotated[int, typer.Option(help="Port for gRPC.")] = DEFAULT.grpc_port,
    upstream_http: Annotated[str, typer.Option(help="Triton's HTTP port, host:port.")] = DEFAULT.upstream_http,
    upstream_grpc: Annotated[str, typer.Option(help="Triton's gRPC port, host:port.")] = DEFAULT.upstream_grpc,
    certificate: Annotated[Path | None, typer.Option(help="PEM certificate chain; TLS on both ports.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM private key of the certificate.")] = None,
    body_mib: Annotated[int, typer.Option(help="Largest request in MiB.")] = DEFAULT.body_bytes // MIB,
    answer_seconds: Annotated[
        int, typer.Option(help="Timeout of a response from Triton, in seconds.")
    ] = DEFAULT.answer_seconds,
    connections: Annotated[int, typer.Option(help="Concurrent requests of all callers.")] = DEFAULT.connections,
    connections_per_address: Annotated[
        int, typer.Option(help="Concurrent requests of one address.")
    ] = DEFAULT.connections_per_address,
    requests_per_second: Annotated[
        int, typer.Option(help="Requests per second of one address; 0 for no limit.")
    ] = DEFAULT.requests_per_second,
    large_images: Annotated[
        int,
        typer.Option(
            help="Concurrent requests with images that take over 5 ms to decode; instances of `classifier` minus 1."
        ),
    ] = DEFAULT.large_images,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(help="Network, e.g. 10.0.0.0/8, whose X-Forwarded-For names the caller; may be repeated."),
    ] = None,
    access_log: Annotated[
        Path | None, typer.Option(help="File for one JSON line per request; off if not given.")
    ] = None,
    workers: Annotated[int, typer.Option(help="nginx worker processes; 0 for one per core.")] = DEFAULT.workers,
    write: Annotated[
        Path | None,
        typer.Option(help="Only write nginx.conf and its Lua files into this folder, for another nginx."),
    ] = None,
    runtime_folder: Annotated[
        Path | None, typer.Option(help="With --write: folder for that nginx's pid file and buffered bodies.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run nginx in front of a Triton server until SIGTERM.

    Limits the size, time and number of requests, and forwards only health, metadata, configuration and inference.
    Prints one line `ready http://... grpc://...`.
    """
    config = read_gateway(
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
        print(write_config(config, write.absolute(), runtime_folder and runtime_folder.absolute()))
        return
    raise_stopped_at_signals()
    try:
        with GatewayProcess(config) as running:
            print(f"ready {running.http_url} {running.grpc_url}", flush=True)
            running.keep_running(print_warning)
    except Stopped:
        pass
    print("stopped", flush=True)
