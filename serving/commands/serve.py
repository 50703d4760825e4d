"""`tailor serve`: the server in the foreground until it is told to end."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from serving.commands.options import REPOSITORY, Debug, RepositoryOption
from serving.errors import ServingError
from serving.server import TritonServer

LOOPBACK = ("127.0.0.1", "localhost")
CANARY_EVERY = 30.0  # seconds between the golden requests of a running server


class Stopped(SystemExit):
    """`serve` was told to end. A SystemExit, because the HTTP client's event loop would print any other as an error."""


def serve(
    repository: RepositoryOption = REPOSITORY,
    http_port: Annotated[int, typer.Option(help="HTTP port; 0 for any free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="gRPC port; 0 for any free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Prometheus metrics port; 0 for any free one.")] = 8002,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    log: Annotated[Path | None, typer.Option(help="Server log; triton.log beside the repository if not given.")] = None,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Run the Triton server in the foreground until SIGTERM or Ctrl-C.

    Prints one line `ready http://... grpc://...` once the golden requests have been answered as they should be.
    """
    # Beside the repository there may be nothing at all; then the error is the missing repository, not the log.
    if log is None and repository.is_dir():
        log = repository.absolute().parent / "triton.log"
    server = TritonServer(repository, host, http_port, grpc_port, metrics_port, log)
    stopping = threading.Event()

    def stop_once(_number: int, _frame: FrameType | None) -> None:
        # A second signal shall not cut the cleaning up short.
        if not stopping.is_set():
            stopping.set()
            raise Stopped

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop_once)
    try:
        with server:
            print(f"ready {server.http_url} {server.grpc_url}", flush=True)
            if host not in LOOPBACK:
                print(
                    f"tailor: --host {host}: this Triton release can be killed by one hostile request; "
                    "let nobody but a gateway with size, time and connection limits reach it",
                    file=sys.stderr,
                )
            _watch(server, stopping)
    except Stopped:
        pass
    print("stopped", flush=True)


def _watch(server: TritonServer, stopping: threading.Event) -> None:
    """Wait until serving shall stop, asking the golden requests from time to time; ServingError if the server fails.

    A stub that died is never restarted and its model stays "ready", so the answers are what is watched. One failure may
    be a server under load; the second in a row ends the serving, for whoever supervises this process to start it again.
    """
    failed, asked = False, time.monotonic()
    # The event is looked at as well: an exception from a signal handler is lost where Python ignores exceptions.
    while not stopping.is_set():
        if (ended := server.wait(1.0)) is not None:
            raise ServingError(f"the Triton server ended by itself with status {ended}:\n{server.log_tail()}")
        if time.monotonic() - asked < CANARY_EVERY:
            continue
        try:
            server.canary()
            failed = False
        except ServingError as error:
            if failed:
                raise
            failed = True
            print(f"tailor: {error}; asking once more", file=sys.stderr)
        asked = time.monotonic()
