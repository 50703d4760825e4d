"""The command `tailor`: serve, predict, status."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from PIL import Image
from rich.console import Console

from serving.client import DEFAULT_URLS, Client
from serving.display import as_mapping, prediction_table, status_table
from serving.errors import InputError, ServingError
from serving.gateway_command import gateway
from serving.server import TritonServer

# typer's usage errors (unknown option, missing argument, bad value) under the one base that all its releases have.
USAGE_ERROR = typer.BadParameter.__mro__[1]
LOOPBACK = ("127.0.0.1", "localhost")
CANARY_EVERY = 30.0  # seconds between the golden requests of a running server

app = typer.Typer(
    name="tailor",
    help="Serve a long-tailed image classifier on Triton and ask it, choosing the class prior per request.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Stopped(SystemExit):
    """`serve` was told to end. A SystemExit, because the HTTP client's event loop would print any other as an error."""


class Protocol(StrEnum):
    """How to reach the server."""

    http = "http"
    grpc = "grpc"


Url = Annotated[
    str | None, typer.Option(help="Server address; http://127.0.0.1:8000 or grpc://127.0.0.1:8001 if not given.")
]
ProtocolOption = Annotated[
    Protocol | None, typer.Option(help="HTTP (default) or gRPC; follows --url when that is given.")
]
Timeout = Annotated[float, typer.Option(help="Seconds that one request may take.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
# Read by main itself, so that it also covers errors in the arguments; declared for --help.
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command(epilog="Example: tailor serve --repository artifacts/repository --http-port 9000")
def serve(
    repository: Annotated[Path, typer.Option(help="Triton model repository that `dvc repro` wrote.")] = Path(
        "artifacts/repository"
    ),
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


@app.command(epilog="Example: tailor predict cat.jpg dog.png --prior balanced --top 3 --json")
def predict(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="JPEG, PNG or WebP files.", show_default=False)
    ],
    url: Url = None,
    protocol: ProtocolOption = None,
    prior: Annotated[
        str | None,
        typer.Option(
            metavar="balanced|train|NUMBER|FILE",
            help="Class prior of the answers: balanced, train, a strength (0 is balanced, 1 is train), or a file with "
            "the probabilities (JSON list, JSON object by class name, or a number per line). "
            "Server's default if not given.",
        ),
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Classes to show; as many as the server gives if not given.")
    ] = None,
    timeout: Timeout = 60.0,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Classify image files and print the best classes of each."""
    with Client(_address(url, protocol), timeout) as client:
        predictions = client.predict(images, prior)
    given = len(predictions[0].classes)
    if top is not None and top > given:
        raise InputError(f"--top is {top}; the server answers with the best {given}")
    if as_json:
        _print_json([as_mapping(image, answer, top) for image, answer in zip(images, predictions, strict=True)])
    else:
        Console().print(prediction_table(images, predictions, top, prior))


@app.command(epilog="Example: tailor status --url grpc://127.0.0.1:8001 --json")
def status(
    url: Url = None,
    protocol: ProtocolOption = None,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Show the server's state and the versions it serves. Status 1 when no server answers, or it answers no image."""
    with Client(_address(url, protocol), timeout) as client:
        found = client.status()
    if as_json:
        _print_json(asdict(found))
    else:
        Console().print(status_table(found))
    if found.problem:
        raise ServingError(found.problem)


app.command(epilog="Example: tailor gateway --http-port 8443 --grpc-port 8444 --certificate tls.crt --key tls.key")(
    gateway
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 well, 1 failure, 2 misuse, 130 interrupted.

    An error is one line on stderr; its traceback is shown with --debug alone.
    """
    # Pillow warns of an image that is refused, in one line, a moment later.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        result = app(given, prog_name="tailor", standalone_mode=False)
    except (ServingError, USAGE_ERROR) as error:
        if "--debug" in given:
            traceback.print_exc()
        message = str(error) if isinstance(error, ServingError) else error.format_message()
        print(f"tailor: {message}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the output has gone; the interpreter's own flush at exit would complain of it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if "--debug" in given:
            traceback.print_exc()
        where = f"{error.filename}: " if error.filename else ""
        print(f"tailor: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        print("tailor: interrupted", file=sys.stderr)
        return 130
    return result if isinstance(result, int) else 0


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


def _address(url: str | None, protocol: Protocol | None) -> str:
    if url is None:
        return DEFAULT_URLS[protocol or "http"]
    scheme, found, rest = url.partition("://")
    if not found:
        return f"{protocol or 'http'}://{url}"
    if protocol and not scheme.startswith(protocol):
        raise InputError(f"--protocol is {protocol} but --url is {rest and url!r}; give one of them, or both the same")
    return url


def _print_json(content: object) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())
