"""`tailor promote`, `tailor rollback` and `tailor versions`: choose and list the releases of a repository."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from serving.commands.options import AsJson, Debug, RepositoryOption, choose_repository, print_json
from serving.promotion import promotion
from serving.promotion.check import PromotionCheck, check_promotion, promotion_table
from serving.promotion.history import scores
from serving.repository import release
from serving.repository.release import VersionState
from serving.server.running import servers_at
from serving.shared.errors import ServingError
from serving.shared.names import ADMIN_KEY_VARIABLE
from serving.shared.terminal import Console, cell, print

ServerUrl = Annotated[
    str | None,
    typer.Option(
        "--url",
        help=f"gRPC address of the server, with its key in {ADMIN_KEY_VARIABLE}; "
        "the servers that `tailor serve` runs on this repository if not given.",
    ),
]
LoadTimeout = Annotated[float, typer.Option(help="Timeout of one load in seconds.")]
Rehearsal = Annotated[
    bool,
    typer.Option(
        "--rehearsal/--no-rehearsal", help="Check the version on a second server first, or only in ONNX Runtime."
    ),
]


def promote(
    release: Annotated[
        str, typer.Argument(metavar="EXPORT_OR_VERSION", help="An export folder, or a published version's number.")
    ] = "artifacts/export",
    repository: RepositoryOption = None,
    url: ServerUrl = None,
    keep: Annotated[int, typer.Option(min=2, help="Number of versions kept on disk.")] = promotion.VERSIONS_KEPT,
    timeout: LoadTimeout = promotion.LOAD_TIMEOUT,
    rehearsal: Rehearsal = True,
    force: Annotated[
        bool, typer.Option("--force", help="No confirmation for a release that is worse or cannot be compared.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make a release the champion, without a request lost.

    Prints its test accuracies beside the champion's. If it is worse, if a manifest has no figures, or if the gate has
    refused it, a confirmation is requested; without a terminal --force is needed.
    The release is published as a new version, checked with its golden requests, loaded and checked again; only then it
    serves requests that name no version. If a step fails, nothing changes and the status is 1.
    """
    source = int(release) if release.isdecimal() else Path(release)
    root = choose_repository(repository)
    _confirm_promotion(check_promotion(root, source), force)
    promoted = promotion.promote(
        root, source, servers=servers_at(root, url), keep=keep, timeout=timeout, rehearsal=rehearsal
    )
    _print_promotion(promoted, as_json)


def rollback(
    version: Annotated[
        int | None, typer.Argument(min=1, help="Version to roll back to; the previous champion if not given.")
    ] = None,
    repository: RepositoryOption = None,
    url: ServerUrl = None,
    timeout: LoadTimeout = promotion.LOAD_TIMEOUT,
    rehearsal: Rehearsal = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make an older release the champion again.

    No request is lost.
    """
    root = choose_repository(repository)
    promoted = promotion.rollback(root, version, servers=servers_at(root, url), timeout=timeout, rehearsal=rehearsal)
    _print_promotion(promoted, as_json)


def versions(
    repository: RepositoryOption = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the releases of a repository, with the state of each."""
    root = choose_repository(repository)
    states = release.list_versions(root)
    if not as_json:
        Console().print(versions_table(states, str(root)))
        return
    print_json(
        [
            {
                "version": state.version,
                "state": state.state,
                "published": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(state.published)),
                "code_revision": state.release.manifest.code_revision,
                "sha256": state.release.manifest.files,
                "metrics": state.release.manifest.metrics,
            }
            for state in states
        ]
    )


def _confirm_promotion(check: PromotionCheck | None, force: bool) -> None:
    """Print a release beside the champion on stderr; ask for confirmation where there is doubt. Raises ServingError."""
    if check is None:
        return
    terminal = Console(file=sys.stderr)
    terminal.print(promotion_table(check))
    if check.decision:
        print(f"the gate: {check.decision}", file=sys.stderr)
    if check.confirmation_reason is None or force:
        return
    if not sys.stdin.isatty():
        raise ServingError(f"{check.release} is not promoted: {check.confirmation_reason}; give --force to promote it")
    if not typer.confirm(f"{check.release}: {check.confirmation_reason}. Promote it?", err=True):
        raise ServingError(f"{check.release} is not promoted; version {check.champion} stays the champion")


def _print_promotion(promoted: promotion.Promotion, as_json: bool) -> None:
    if as_json:
        print_json(asdict(promoted))
        return
    if promoted.version == promoted.previous:
        print(f"version {promoted.version} is the champion already")
        return
    where = (
        f"at {', '.join(promoted.servers)}"
        if promoted.servers
        else "when a server starts; no server of this user runs on it now"
    )
    print(f"version {promoted.version} answers instead of {promoted.previous}, {where}")
    if promoted.removed:
        print(f"removed old versions {', '.join(map(str, promoted.removed))}")


def versions_table(states: Sequence[VersionState], repository: str) -> Table:
    """Table of a repository's releases: state, publication time, and the test accuracy in their manifests."""
    table = Table(title=cell(f"releases in {repository}"))
    for heading in ("version", "state", "published", "balanced accuracy", "few", "code"):
        table.add_column(heading)
    for state in reversed(states):
        manifest = state.release.manifest
        shown = scores(manifest)
        published = time.strftime("%Y-%m-%d %H:%M", time.localtime(state.published))
        table.add_row(str(state.version), state.state, published, *shown, cell(manifest.code_revision[:12]))
    return table
