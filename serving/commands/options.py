"""Options shared by several commands (repository, URL, headers, TLS), and printing of JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from serving.client.sync_client import DEFAULT_URLS
from serving.repository.manifest import MANIFEST_NAME, STUDENT_NAME, ManifestError, read_manifest
from serving.shared.errors import InputError
from serving.shared.names import STUDENT
from serving.shared.terminal import print

REPOSITORY = Path("artifacts/repository")  # repository written by `dvc repro`
RELEASES = Path("releases")  # repository of promoted releases: the default of retrain.repository in params.yaml


Protocol = StrEnum("Protocol", ["http", "grpc"])
Url = Annotated[
    str | None, typer.Option(help="Server address; http://127.0.0.1:8000 or grpc://127.0.0.1:8001 if not given.")
]
ProtocolOption = Annotated[
    Protocol | None, typer.Option(help="HTTP (default) or gRPC; follows --url when that is given.")
]
Timeout = Annotated[float, typer.Option(help="Timeout of a request in seconds.")]
Headers = Annotated[
    list[str] | None,
    typer.Option(
        "--header",
        metavar="'NAME: VALUE'|@FILE",
        help="Header of every request, may be repeated; @FILE: a file with one per line, which keeps a secret out of the "
        "list of processes.",
        show_default=False,
    ),
]
CaFile = Annotated[
    Path | None, typer.Option(help="PEM file of the CAs to trust for https and grpcs; the system's if not given.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
RepositoryOption = Annotated[
    Path | None,
    typer.Option(
        help=f"Triton model repository; by default {RELEASES} (promoted releases) if it exists, else {REPOSITORY}.",
        show_default=False,
    ),
]
# main reads --debug from the arguments, so that it also covers errors of parsing them; declared here for --help.
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def choose_repository(repository: Path | None, promoted: Path = RELEASES, note: bool = False) -> Path:
    """Return the repository of a command: the given one, else `promoted` if it is a folder, else that of `dvc repro`.

    All commands use this rule, so that `serve` and `rollback` select the same repository. note: print a line on stderr
    where `dvc repro` has written a model that has not been promoted, for a command whose user may expect that model.
    """
    if repository is not None:
        return repository
    if not promoted.is_dir():
        return REPOSITORY
    if note and REPOSITORY.is_dir() and not _graph_hashes(REPOSITORY) <= _graph_hashes(promoted):
        print(
            f"tailor: {REPOSITORY}, which `dvc repro` wrote, holds a model that has not been promoted; --repository is "
            f"{promoted}, what was promoted",
            file=sys.stderr,
        )
    return promoted


def _graph_hashes(repository: Path) -> set[str]:
    """Return the sha256 of each version's graph from its manifest; an invalid manifest is ignored here."""
    hashes = set()
    for path in repository.glob(f"{STUDENT}/[0-9]*/{MANIFEST_NAME}"):
        with contextlib.suppress(ManifestError):
            hashes.add(read_manifest(path.parent).files.get(STUDENT_NAME, ""))
    return hashes


def server_url(url: str | None, protocol: Protocol | None) -> str:
    """Return the server's URL from --url and --protocol. Raises InputError where the two contradict each other."""
    if url is None:
        return DEFAULT_URLS[protocol or "http"]
    scheme, separator, authority = url.partition("://")
    if not separator:
        return f"{protocol or 'http'}://{url}"
    if protocol and not scheme.startswith(protocol):
        raise InputError(
            f"--protocol is {protocol} but --url is {authority and url!r}; give one of them, or both the same"
        )
    return url


def parse_headers(options: list[str] | None) -> dict[str, str]:
    """Parse --header into a dict by name. Raises InputError naming the option or the file, without any value."""
    headers = {}
    for text in options or []:
        lines = [text]
        if text.startswith("@"):
            try:
                lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "is not text"
                raise InputError(f"--header {text}: {reason}; expected a file with lines NAME: VALUE") from None
        for line in filter(str.strip, lines):
            name, colon, value = line.partition(":")
            if not colon or not name.strip():
                raise InputError("--header holds no colon; expected 'NAME: VALUE' or @FILE with such lines")
            headers[name.strip()] = value.strip()
    return headers


def print_json(content: object) -> None:
    """Print `content` as JSON. Raises ValueError for a number that is not finite."""
    print(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))
