"""`tailor serve`: run the server in the foreground until SIGTERM or SIGINT."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from serving.commands.options import Debug, RepositoryOption, choose_repository
from serving.repository.release import Release
from serving.repository.signature import SIGNATURE_NAME
from serving.repository.signing_keys import PARAMS_FILE, TRUSTED_VARIABLE, trusted_keys
from serving.server.arguments import LATENCY_OPTIONS, logit_log_environment, trace_options, unknown_images_environment
from serving.server.supervisor import SupervisionLimits, Supervisor
from serving.server.triton_server import GRACE, TritonServer
from serving.shared.errors import InputError, ServingError
from serving.shared.logs import new_log_file, remove_log_files
from serving.shared.names import CLASSIFIER, SEGMENTER, image_model
from serving.shared.terminal import print

LOOPBACK = ("127.0.0.1", "localhost")


class Stopped(SystemExit):
    """Raised at SIGTERM or SIGINT. A SystemExit: the HTTP client's event loop prints other exceptions as errors."""


def raise_stopped_at_signals() -> threading.Event:
    """Raise Stopped in the main thread at the first SIGTERM or SIGINT; the returned event is then set."""
    stopping = threading.Event()

    def stop_once(_number: int, _frame: FrameType | None) -> None:
        # Ignore further signals, so that they do not interrupt the cleanup.
        if not stopping.is_set():
            stopping.set()
            raise Stopped

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop_once)
    return stopping


def serve(
    repository: RepositoryOption = None,
    http_port: Annotated[int, typer.Option(help="HTTP port; 0 for any free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="gRPC port; 0 for any free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Prometheus metrics port; 0 for any free one.")] = 8002,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    log: Annotated[
        Path | None,
        typer.Option(
            help="File for the server's log, of 64 MiB, and three older ones; by default a temporary file, removed after a "
            "clean stop.",
            show_default=False,
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print the server's log on standard error too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No temporary log file.")] = False,
    trace_url: Annotated[
        str | None, typer.Option(help="Send OpenTelemetry traces here, e.g. http://127.0.0.1:4318/v1/traces.")
    ] = None,
    trace_every: Annotated[int, typer.Option(min=1, help="With --trace-url: trace each n-th request.")] = 100,
    log_logits: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which the logits of some images are logged, for `tailor drift`; off if not given."
        ),
    ] = None,
    log_share: Annotated[
        float, typer.Option(help="With --log-logits: share of the images that are logged, above 0 to 1.")
    ] = 0.01,
    log_limit: Annotated[
        str,
        typer.Option(help="With --log-logits: size limit of the folder, e.g. 500MiB; the oldest files are deleted."),
    ] = "1GiB",
    keep_unknown: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which images whose answer is `unknown` are kept, to label them; off if not given."
        ),
    ] = None,
    keep_limit: Annotated[
        str, typer.Option(help="With --keep-unknown: size limit; the oldest of these images are deleted.")
    ] = "256MiB",
    grpc_tls_cert: Annotated[
        Path | None,
        typer.Option(help="PEM certificate for gRPC, which then accepts TLS only; Triton has no TLS for HTTP."),
    ] = None,
    grpc_tls_key: Annotated[Path | None, typer.Option(help="PEM key of --grpc-tls-cert.")] = None,
    grace: Annotated[
        int, typer.Option(min=1, max=300, help="Seconds for running requests to finish when the server is stopped.")
    ] = GRACE,
    restarts: Annotated[
        str,
        typer.Option(
            help="Exit after this many failed starts in a row, or `unlimited`. A start whose server ran for "
            f"{SupervisionLimits.served:g} s has not failed."
        ),
    ] = str(SupervisionLimits.restarts),
    debug: Debug = False,
) -> None:
    """Run the Triton server until SIGTERM or Ctrl-C.

    Prints one line `ready http://... grpc://...` once the golden requests have the expected responses, then the URL of the
    metrics, the repository, the log file and an example of a request. When a start fails, the last lines of Triton's log
    are printed. Restarts the server when it exits, and reloads a model when its process exits. To load new versions
    while it runs, use `tailor promote`, with the key in TAILOR_ADMIN_KEY if that is set.
    """
    limits = SupervisionLimits(restarts=_restarts(restarts))
    options = [*LATENCY_OPTIONS, *(trace_options(trace_url, trace_every) if trace_url else [])]
    if (grpc_tls_cert is None) != (grpc_tls_key is None):
        option = "--grpc-tls-cert" if grpc_tls_cert else "--grpc-tls-key"
        raise InputError(f"{option} is given alone; expected --grpc-tls-cert and --grpc-tls-key together")
    root = choose_repository(repository, note=True)
    if image_model(root) == SEGMENTER and (log_logits or keep_unknown):
        raise InputError(
            f"--log-logits and --keep-unknown: {root} is of task segmentation, which has neither; omit them"
        )
    environment = logit_log_environment(log_logits, log_share, log_limit) if log_logits else {}
    environment |= unknown_images_environment(keep_unknown, keep_limit) if keep_unknown else {}
    server = TritonServer(
        root,
        host,
        http_port,
        grpc_port,
        metrics_port,
        forward=sys.stderr if verbose else None,
        grace=grace,
        grpc_tls=(grpc_tls_cert, grpc_tls_key) if grpc_tls_cert and grpc_tls_key else None,
        options=options,
        environment=environment,
    )
    _run(server, limits, log, quiet)


def _run(server: TritonServer, limits: SupervisionLimits, log: Path | None, quiet: bool) -> None:
    """Run the server until a signal; without `log` and `quiet`, its log is a temporary file."""
    stopping = raise_stopped_at_signals()
    temporary_log = None if log or quiet else new_log_file()
    server.log = log or temporary_log
    try:
        with server:
            _print_addresses(server)
            Supervisor(server, print_warning, limits).run(stopping)
    except Stopped:
        pass
    except ServingError:
        if temporary_log and temporary_log.stat().st_size:
            print_warning(f"the whole log of the server is in {temporary_log}")
            temporary_log = None
        raise
    finally:
        if temporary_log:
            remove_log_files(temporary_log)
    print("stopped", flush=True)


def _restarts(text: str) -> int | None:
    """Return the allowed number of failed starts; None for no limit. Raises InputError."""
    if text == "unlimited":
        return None
    if not (text.isascii() and text.isdecimal()):
        raise InputError(f"--restarts is {text!r}; expected 0, 1, 2, ... or unlimited")
    return int(text)


def _print_addresses(server: TritonServer) -> None:
    print(f"ready {server.http_url} {server.grpc_url}")
    print(f"metrics {server.metrics_url}")
    print(f"repository {server.repository}")
    if keys := trusted_keys():
        print(f"signatures of {', '.join(key.id for key in keys)}")
    else:
        warn_unchecked(server.repository, server.releases)
    if server.log:
        print(f"log {server.log}")
    model = image_model(server.repository)
    curl = curl_example(server.http_url, server.example, model=model)
    print(f"\na request from a shell, in the binary form:\n\n{curl}")
    print(f"\nthe same as plain JSON:\n\n{json_example(server.http_url, server.example, model)}\n", flush=True)
    if server.host not in LOOPBACK:
        print_warning(
            f"--host {server.host}: this Triton release can be killed by one hostile request; "
            "allow only a gateway with size, time and connection limits to reach it"
        )


def warn_unchecked(repository: Path, releases: Sequence[Release]) -> None:
    """Print a warning if a release is signed: an operator may have started in a folder without the list of keys."""
    paths = {
        each.version: repository / each.manifest.image_model / str(each.version) / SIGNATURE_NAME for each in releases
    }
    if signed := [str(version) for version, path in paths.items() if path.is_file()]:
        print_warning(
            f"signatures are not checked, although version {', '.join(signed)} is signed: no serving.trusted_keys in "
            f"{PARAMS_FILE.absolute()}, and {TRUSTED_VARIABLE} is not set"
        )


def print_warning(line: str) -> None:
    print(f"tailor: {line}", file=sys.stderr, flush=True)


CURL = """\
image={image}
bytes=$(wc -c < "$image")
json='{{"inputs": [{{"name": "image", "shape": [1, 1], "datatype": "BYTES",
    "parameters": {{"binary_data_size": '$((bytes + 4))'}}}},
  {{"name": "strength", "shape": [1, 1], "datatype": "FP32", "data": [{strength:g}]}}]}}'
{{ printf %s "$json"
  printf "$(printf '\\\\%03o' $((bytes & 255)) $((bytes >> 8 & 255)) $((bytes >> 16 & 255)) $((bytes >> 24 & 255)))"
  cat "$image"; }} | curl --silent --show-error --data-binary @- \\
  --header "Inference-Header-Content-Length: ${{#json}}" {url}/v2/models/{model}/infer"""


JSON = """\
{{ printf '{{"inputs": [{{"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": ["data:image/png;base64,'; \\
  base64 < {image} | tr -d '\\n'; \\
  printf '"]}}, {{"name": "prior", "shape": [1, 1], "datatype": "BYTES", "data": ["balanced"]}}]}}'; }} > request.json
curl -d @request.json {url}/v2/models/{model}/infer"""


def curl_example(url: str, image: Path, strength: float = 0.0, model: str = CLASSIFIER) -> str:
    """Return POSIX shell commands that classify an image file at a strength over HTTP.

    Triton's binary form: a JSON header, then each image after its length as four bytes, little-endian. Only the
    server's limit on images applies; the gateway limits JSON to 1 MiB.
    """
    return CURL.format(image=shlex.quote(str(image)), strength=strength, url=url, model=model)


def json_example(url: str, image: Path, model: str = CLASSIFIER) -> str:
    """Return POSIX shell commands that write request.json with the image as base64 text, and send it.

    The classifier detects the image format from the bytes: `image/png` also works for a JPEG or WebP file.
    """
    return JSON.format(image=shlex.quote(str(image)), url=url, model=model)
