"""Overhead of the gateway for small requests: `python -m benchmarks.gateway [--other DIR] [--rounds 5] [--seconds 2]`.

`student` and `classifier` of a ResNet-20 at 16 pixels, over HTTP and gRPC, from 8 connections: to Triton directly,
through the gateway, and with --other through the gateway of another checkout (for example the previous commit), in
turns on one server. A ratio is the median over rounds of requests/s through the gateway divided by requests/s of the
other side, with the smallest and the largest. Models, requests and load generator: see benchmarks.serving.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks import serving_load
from benchmarks.other_work import processor
from benchmarks.serving_grpc import GrpcWire, grpc_request
from benchmarks.serving_load import Load
from benchmarks.serving_releases import TRIAL, Release, release_of
from benchmarks.serving_sections import as_http, port_of, student_load
from benchmarks.serving_turns import Record, in_rounds, median, ratios
from serving.client import Client
from serving.server.triton_server import TritonServer
from serving.shared.ports import choose_ports

USERS = 8


@contextmanager
def gateway_of(checkout: Path, server: TritonServer) -> Iterator[dict[str, int]]:
    """Run the gateway of a checkout in front of a server; yields its ports by protocol."""
    ports = choose_ports("127.0.0.1", {"http": 0, "grpc": 0})
    command = [sys.executable, "-m", "serving.commands", "gateway"]
    for protocol, url in (("http", server.http_url), ("grpc", server.grpc_url)):
        command += [f"--upstream-{protocol}={url.partition('://')[2]}", f"--{protocol}-port={ports[protocol]}"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        if not process.stdout or not process.stdout.readline().startswith("ready"):
            raise RuntimeError(f"{checkout}: the gateway did not start")
        yield ports
    finally:
        process.terminate()
        process.wait(30)


def loads(server: TritonServer, release: Release) -> dict[tuple[str, str], Load]:
    """Return the loads for the server itself, by model and protocol."""
    with Client(server.http_url) as client:
        calls = [client.request([photo], "balanced") for photo in release.photos]
    http, grpc = port_of(server.http_url), port_of(server.grpc_url)
    by_model = {
        ("student", "http"): student_load(server, release),
        ("student", "grpc"): student_load(server, release, grpc=True),
        ("classifier", "http"): Load(http, [as_http(call) for call in calls]),
        ("classifier", "grpc"): Load(grpc, [grpc_request(call) for call in calls], wire=GrpcWire),
    }
    return {key: replace(load, users=USERS) for key, load in by_model.items()}


def row(model: str, protocol: str, records: dict[str, list[Record]]) -> str:
    """Format a row of the table: rates, p50, and the gateway's ratio to each other side."""
    cells = [model, protocol, f"{median(records['gateway'], 'rate'):,.0f}", f"{median(records['gateway'], 'p50'):.2f}"]
    for side in records:
        if side != "gateway":
            shares = ratios(records["gateway"], records[side])
            spread = f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"
            cells += [f"{median(records[side], 'rate'):,.0f}", f"{median(records[side], 'p50'):.2f}", spread]
    busy = max(median(of_side, "busy") for of_side in records.values())
    return "| " + " | ".join([*cells, f"{busy:.0%}"]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gateway", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--other", type=Path, help="a checkout whose gateway takes turns with this one's")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn, default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="default: %(default)s")
    options = parser.parse_args()
    release = release_of(TRIAL, options.work)
    checkouts = {"gateway": Path(__file__).parents[1]} | ({"other": options.other.absolute()} if options.other else {})
    heads = "".join(f" {side}/s | p50 ms | gateway / {side} |" for side in ("direct", *list(checkouts)[1:]))
    print(f"{processor()}\n\n| model | protocol | gateway/s | p50 ms |{heads} other work |")
    print("|---|---|--:|--:|" + "--:|" * (3 * len(checkouts) + 1))
    with ExitStack() as stack:
        server = stack.enter_context(TritonServer(release.repository, http_port=0, grpc_port=0, metrics_port=0))
        ports = {side: stack.enter_context(gateway_of(path, server)) for side, path in checkouts.items()}
        for (model, protocol), load in loads(server, release).items():
            sides = {side: replace(load, port=of[protocol]) for side, of in ports.items()}
            turns = {
                side: lambda seconds, load=load: serving_load.run(load, seconds)
                for side, load in {"gateway": sides["gateway"], "direct": load, **sides}.items()
            }
            records = in_rounds(f"{model} {protocol}", turns, options.rounds, options.seconds)
            print(row(model, protocol, records), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
