"""The command line of the Triton server, and the admin key that restricts its model control."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from serving.server.installation import Installation
from serving.server.local_tree import TREE
from serving.shared.errors import InputError
from serving.shared.names import ADMIN_HEADER, ADMIN_KEY_VARIABLE, LOCAL_CONFIG, models_of
from serving.triton.storage import folder_files, logit_log, unknown_images

# Endpoints that need the admin key. A caller that may load a model can run code in the server; the other endpoints read
# or change data of other callers. model-config stays open: it is read-only, and clients read max_batch_size and the
# default strength from it.
RESTRICTED = "model-repository,shared-memory,statistics,trace,logging"
STUB_START_TIMEOUT = 120  # seconds for an inference process to load its model


def triton_arguments(
    installation: Installation,
    runtime: Path,
    prefix: str,
    host: str,
    ports: Mapping[str, int],
    key: str,
    grace: int,
    options: Sequence[str] = (),
) -> list[str]:
    """The command line of the server.

    runtime: the runtime folder, with `backends` and the tree of links to the repository. prefix: of the run, for its
    shared memory. ports: by option. grace: seconds that running requests get on SIGTERM. options: further options of
    Triton (see server_options).
    """
    return [
        str(installation.server),
        f"--model-repository={runtime / TREE}",
        f"--backend-directory={runtime / 'backends'}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        f"--backend-config=python,stub-timeout-seconds={STUB_START_TIMEOUT}",
        f"--model-config-name={LOCAL_CONFIG}",
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in models_of(runtime / TREE)),
        # The configs are complete; completing them would start one more inference process per model.
        "--disable-auto-complete-config",
        # Without this a failed load of a new version makes the server not ready, although the old version serves.
        "--strict-readiness=false",
        f"--exit-timeout-secs={grace}",
        f"--http-address={host}",
        f"--grpc-address={host}",
        *(f"{option}={port}" for option, port in ports.items()),
        f"--http-restricted-api={RESTRICTED}:{ADMIN_HEADER}={key}",
        f"--grpc-restricted-protocol={RESTRICTED}:{ADMIN_HEADER}={key}",
        *options,
    ]


def admin_key() -> str | None:
    """The admin key in the variable TAILOR_ADMIN_KEY; None if it is not set. Raises InputError for a weak one."""
    key = os.environ.get(ADMIN_KEY_VARIABLE)
    if key is not None and not re.fullmatch(r"[A-Za-z0-9_-]{16,}", key):
        raise InputError(f"{ADMIN_KEY_VARIABLE} is not usable; expected at least 16 letters, digits, - or _")
    return key


def new_admin_key() -> str:
    """A new random admin key.

    Triton accepts it only on the command line, so other local users can read it with ps. It is not logged.
    """
    return secrets.token_urlsafe(32)


# Latency quantiles of the last minute in the metrics; the dashboard and the latency alert use them.
LATENCY_OPTIONS = (
    "--metrics-config=summary_latencies=true",
    "--metrics-config=summary_quantiles=0.5:0.05,0.95:0.01,0.99:0.001",
)


def trace_options(url: str, every: int = 100, service: str = "tailor") -> list[str]:
    """Options that send an OpenTelemetry trace of every `every`-th inference to a collector.

    url: the collector's OTLP/HTTP endpoint, for example http://127.0.0.1:4318/v1/traces; Triton posts JSON to it,
    without TLS. A request with a `traceparent` header becomes part of the caller's trace. Raises InputError.
    """
    hint = "expected http://host:port/v1/traces, a collector's OTLP/HTTP endpoint"
    try:
        parts = urlsplit(url)
        usable = parts.scheme == "http" and parts.hostname and parts.port and not (parts.query or parts.fragment)
    except ValueError:
        usable = False
    # A comma would begin another setting of --trace-config.
    if not usable or "," in url or not url.isprintable() or " " in url:
        raise InputError(f"trace url is {url!r}; {hint}")
    if every < 1:
        raise InputError(f"every is {every}; expected 1 for a trace of each request, n for each n-th")
    if not service.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"service is {service!r}; expected letters, digits, - or _")
    return [
        "--trace-config=mode=opentelemetry",
        f"--trace-config=opentelemetry,url={url}",
        f"--trace-config=opentelemetry,resource=service.name={service}",
        "--trace-config=level=TIMESTAMPS",
        f"--trace-config=rate={every}",
    ]


def grpc_tls_options(certificate: Path, key: Path, client_authority: Path | None = None) -> list[str]:
    """Options that make gRPC accept only TLS, with a PEM certificate and its key; Triton has no TLS for HTTP.

    client_authority: PEM file of the CAs that sign client certificates, which are then required (mutual TLS). Raises
    InputError naming a file that cannot be read or is not PEM.
    """
    for path in (certificate, key, *([client_authority] if client_authority else [])):
        try:
            first_bytes = path.read_bytes()[:11]
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; give a PEM file") from None
        if first_bytes != b"-----BEGIN ":
            raise InputError(f"{path}: is not a PEM file; it does not start with -----BEGIN")
    files = [f"--grpc-server-cert={certificate.absolute()}", f"--grpc-server-key={key.absolute()}"]
    if client_authority:
        return ["--grpc-use-ssl-mutual=true", *files, f"--grpc-root-cert={client_authority.absolute()}"]
    return ["--grpc-use-ssl=true", *files]


def logit_log_environment(folder: Path, share: float = 0.01, limit: str | int = "1GiB") -> dict[str, str]:
    """Environment variables that make `classifier` log logits for `tailor drift`; creates the folder.

    share: fraction of the images that is logged, above 0, at most 1; each image is sampled independently. limit: bytes
    of the whole folder, as a number or as text such as 500MiB; the oldest files are deleted. Raises InputError naming
    an unusable argument, the folder, or pyarrow where it is missing.
    """
    if not 0 < share <= 1:
        raise InputError(f"share of logged images is {share:g}; expected a number above 0, at most 1")
    size = _limit(limit, "the logged logits")
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError("logging logits needs pyarrow, which is missing; pip install pyarrow")
    _make_folder(folder, "the logged logits")
    return {
        logit_log.FOLDER_VARIABLE: str(folder.absolute()),
        logit_log.SHARE_VARIABLE: repr(share),
        logit_log.LIMIT_VARIABLE: str(size),
    }


def unknown_images_environment(folder: Path, limit: str | int = "256MiB") -> dict[str, str]:
    """Environment variables that make `classifier` keep images whose answer is `unknown`; creates the folder.

    limit: bytes of all kept images, as in `logit_log_environment`. Raises InputError naming the argument or the folder.
    """
    size = _limit(limit, "the unknown images")
    _make_folder(folder, "the unknown images")
    return {unknown_images.FOLDER_VARIABLE: str(folder.absolute()), unknown_images.LIMIT_VARIABLE: str(size)}


def _limit(limit: str | int, what: str) -> int:
    size = limit if isinstance(limit, int) else parse_size(limit)
    if size < folder_files.SMALLEST_LIMIT:
        raise InputError(f"limit of {what} is {limit}; expected at least 1MiB")
    return size


def _make_folder(folder: Path, what: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o750)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; give a folder for {what}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: is not writable; give a folder for {what}")


def parse_size(text: str) -> int:
    """Parse a size such as 500MiB, 1GiB, 2TiB or a number of bytes into bytes. Raises InputError."""
    match = re.fullmatch(r"(\d{1,15})\s*([KMGT]iB)?", text.strip())
    if not match:
        raise InputError(f"size is {text!r}; expected a number of bytes, or one with KiB, MiB, GiB or TiB")
    return int(match[1]) << (10 * ("KMGT".index(match[2][0]) + 1) if match[2] else 0)
