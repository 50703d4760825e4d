"""`tailor promote`, `tailor rollback` and `tailor versions`: choose and list the releases of a repository."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
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
LoadTimeout = Annotated[float, typer.Option(help="Seconds that one load may take.")]
Rehearsal = Annotated[
    bool,
    typer.Option(
        "--rehearsal/--no-rehearsal", help="Try the version on a second server first, or in ONNX Runtime alone."
    ),
]


def promote(
    release: Annotated[
        str, typer.Argument(metavar="EXPORT_OR_VERSION", help="An export folder, or a published version's number.")
    ] = "artifacts/export",
    repository: RepositoryOption = None,
    url: ServerUrl = None,
    keep: Annotated[int, typer.Option(min=2, help="Versions that stay on disk.")] = promotion.VERSIONS_KEPT,
    timeout: LoadTimeout = promotion.LOAD_TIMEOUT,
    rehearsal: Rehearsal = True,
    force: Annotated[
        bool, typer.Option("--force", help="Do not ask before a release that is worse, or that cannot be compared.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make a release the champion, without a request lost.

    Its test accuracies are shown beside the champion's. If it is worse, if a manifest has no figures, or if the gate has
    refused it, a confirmation is requested; without a terminal --force is needed.
    It is published beside the others, tried on its golden requests, loaded, asked again, and only then answers requests
    that name no version. If any of that fails, everything is as before and the status is 1.
    """
    given = int(release) if release.isdecimal() else Path(release)
    root = choose_repository(repository)
    _confirm(check_promotion(root, given), force)
    done = promotion.promote(
        root, given, servers=servers_at(root, url), keep=keep, timeout=timeout, rehearsal=rehearsal
    )
    _tell(done, as_json)


def rollback(
    version: Annotated[
        int | None, typer.Argument(min=1, help="Version to go back to; the one that was champion before if not given.")
    ] = None,
    repository: RepositoryOption = None,
    url: ServerUrl = None,
    timeout: LoadTimeout = promotion.LOAD_TIMEOUT,
    rehearsal: Rehearsal = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make an older release the champion again; no request is lost."""
    root = choose_repository(repository)
    done = promotion.rollback(root, version, servers=servers_at(root, url), timeout=timeout, rehearsal=rehearsal)
    _tell(done, as_json)


def versions(
    repository: RepositoryOption = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the releases of a repository, with the state of each."""
    root = choose_repository(repository)
    found = release.list_versions(root)
    if not as_json:
        Console().print(versions_table(found, str(root)))
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
            for state in found
        ]
    )


def _confirm(found: PromotionCheck | None, force: bool) -> None:
    """Print a release beside the champion on stderr; ask for confirmation where there is doubt. Raises ServingError."""
    if found is None:
        return
    terminal = Console(file=sys.stderr)
    terminal.print(promotion_table(found))
    if found.decision:
        print(f"the gate: {found.decision}", file=sys.stderr)
    if found.doubt is None or force:
        return
    if not sys.stdin.isatty():
        raise ServingError(f"{found.release} is not promoted: {found.doubt}; give --force to promote it")
    if not typer.confirm(f"{found.release}: {found.doubt}. Promote it?", err=True):
        raise ServingError(f"{found.release} is not promoted; version {found.champion} stays the champion")


def _tell(done: promotion.Promotion, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "version": done.version,
                "previous": done.previous,
                "rehearsed": done.rehearsed,
                "servers": list(done.servers),
                "removed": list(done.removed),
            }
        )
        return
    if done.version == done.previous:
        print(f"version {done.version} is the champion already")
        return
    where = f"at {', '.join(done.servers)}" if done.servers else "once a server starts; none of yours runs on it now"
    print(f"version {done.version} answers instead of {done.previous}, {where}")
    if done.removed:
        print(f"removed old versions {', '.join(map(str, done.removed))}")


def versions_table(found: Sequence[VersionState], repository: str) -> Table:
    """Table of a repository's releases: state, publication time, and the test accuracy in their manifests."""
    table = Table(title=cell(f"releases in {repository}"))
    for heading in ("version", "state", "published", "balanced accuracy", "few", "code"):
        table.add_column(heading)
    for state in reversed(found):
        manifest = state.release.manifest
        shown = scores(manifest)
        published = time.strftime("%Y-%m-%d %H:%M", time.localtime(state.published))
        table.add_row(str(state.version), state.state, published, *shown, cell(manifest.code_revision[:12]))
    return table
