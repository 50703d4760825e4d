"""Lifecycle of a version in `tailor retrain`: publish, verify, promote, watch, roll back or withdraw.

Each function is one step, which the caller retries separately. The steps use `serving.promotion.promotion`, which
`tailor promote` and `tailor rollback` use too. The repository need not exist: its first version is written beside its
path and renamed when it is promoted.
"""

from __future__ import annotations

import filecmp
import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from serving.client.sync_client import Client
from serving.golden.dry_run import dry_run
from serving.golden.requests import WrongResponseError, check_golden
from serving.promotion import promotion
from serving.promotion.promotion import Promotion
from serving.promotion.rehearsal import rehearse
from serving.repository import retention
from serving.repository.lock import locked
from serving.repository.manifest import Manifest, read_manifest
from serving.repository.promotion_log import LOG_NAME, record
from serving.repository.release import Release, read_champion, read_release
from serving.repository.signing_keys import trusted_keys
from serving.repository.version_policy import served_versions, version_before, version_folders
from serving.repository.writer import check_signature, load_export, write_repository
from serving.repository.writer import publish as publish_version
from serving.server.running import RunningServer, find_running, servers_at
from serving.shared.atomic import sync, write_file
from serving.shared.errors import ServingError
from serving.shared.names import image_model, models_of

PAUSE = 0.5  # seconds between two rounds of golden requests while a version is watched
RESTART_TIMEOUT = 60.0  # seconds that a server gets to restart while a version is watched


class RolledBack(ServingError):
    """A promoted version failed its watch and was rolled back; `before` is the champion again."""

    def __init__(self, message: str, before: int) -> None:
        super().__init__(message)
        self.before = before


def champion_or_none(repository: Path) -> Release | None:
    """The champion of a repository; None if it is absent or empty. Raises ServingError for a damaged repository."""
    if not repository.exists() or (repository.is_dir() and not any(repository.iterdir())):
        return None
    return read_champion(repository)


def identity(manifest: Manifest) -> str:
    """sha256 of a manifest without its version number: equal only for exports of the same release."""
    return hashlib.sha256(manifest.model_copy(update={"version": 1}).model_dump_json().encode()).hexdigest()


def export_identity(export: Path) -> str:
    """`identity` of the manifest in an export folder. Raises ManifestError."""
    return identity(read_manifest(export))


def publish(export: Path, repository: Path, evidence: Path) -> int:
    """Publish an export with its evidence as the next version of the repository and return the version.

    No server loads it before it is promoted. The very first version is written beside the path of its repository. A
    release that was published before keeps its version and gets the new evidence, because a new decision was made.
    Raises ManifestError for an export that does not match its manifest, RepositoryError for one that does not fit the
    existing versions, OSError when the disk is full; the partial version is then removed.
    """
    if champion_or_none(repository) is None:
        check_signature(export)
        write_repository(export, first_version_folder(repository), evidence=evidence)
        return load_export(export).version
    with locked(repository):
        clean(repository)
        try:
            version = publish_version(export, repository, evidence=evidence)
            _replace_evidence(evidence, repository / image_model(repository) / str(version))
            return version
        except BaseException:
            clean(repository)
            raise


def _replace_evidence(evidence: Path, folder: Path) -> None:
    """Replace the evidence files in a version folder that are missing or differ, as after an earlier decision."""
    for path in sorted(evidence.iterdir()):
        if not (folder / path.name).is_file() or not filecmp.cmp(path, folder / path.name, shallow=False):
            write_file(folder / path.name, path.read_bytes())


def verify(repository: Path, version: int, timeout: float, rehearsal: bool = True) -> bool:
    """Verify a published version without the servers of users; returns whether a separate server was started for it.

    rehearsal: load the release into a separate server and send its golden requests; False, or where Triton is not
    installed: run its graph in ONNX Runtime only. timeout: seconds. Raises ServingError with the fault.
    """
    root = repository if champion_or_none(repository) else first_version_folder(repository)
    release = read_release(root, version)
    if rehearsal:
        return rehearse(root, release, timeout)
    dry_run(root, [release], timeout)
    return False


def promote(
    repository: Path, version: int, servers: Sequence[RunningServer] | None, keep: int, timeout: float
) -> Promotion:
    """Promote a verified version: make it the champion of the repository and of its servers; no request fails.

    servers: None means this user's servers on the repository at the time of the load. Raises PromotionError if the
    version does not load or does not answer; the previous champion serves without interruption.
    """
    champion = champion_or_none(repository)
    if champion is None:
        first = first_version_folder(repository)
        if trusted_keys():  # again: a key may have been revoked since the version was verified
            read_release(first, version)
        repository.parent.mkdir(parents=True, exist_ok=True)
        (first / LOG_NAME).unlink(missing_ok=True)  # from an attempt that failed before the rename
        record(first, "promote", version, 0)
        first.rename(repository)
        sync(repository.parent)
        return Promotion(version, 0, False, ())
    if version < champion.version:  # an older release, replaced or rolled back from before, is the best again
        return promotion.rollback(repository, version, servers=servers, timeout=timeout, rehearsal=False)
    return promotion.promote(repository, version, servers=servers, keep=keep, timeout=timeout, rehearsal=None)


def roll_back(
    repository: Path, version: int, servers: Sequence[RunningServer] | None, keep: int, timeout: float
) -> Promotion:
    """Undo a promotion: make `version`, the previous champion, the champion again.

    It is newer than the present champion if the promotion was to an older version; then it is promoted. Raises as
    promotion.rollback and promotion.promote do.
    """
    if version > read_champion(repository).version:
        return promotion.promote(repository, version, servers=servers, keep=keep, timeout=timeout, rehearsal=False)
    return promotion.rollback(repository, version, servers=servers, timeout=timeout, rehearsal=False)


def go_live(
    repository: Path,
    version: int,
    url: str | None,
    *,
    keep: int,
    timeout: float,
    watch_seconds: float,
    undo: Callable[[int], object],
) -> tuple[str, ...]:
    """Promote a verified version, watch it, roll back if it fails; returns the addresses of the servers that loaded it.

    url: the server; None means this user's servers on this machine. undo: called with the version to roll back to. A
    version that an earlier attempt made the champion is loaded where it is missing, and watched too. Raises RolledBack
    if it failed the watch and was rolled back, PromotionError as `promote` does.
    """
    champion = champion_or_none(repository)
    loaded = promote(repository, version, servers_at(repository, url), keep, timeout).servers
    try:
        watch(repository, version, servers_of(repository, url), watch_seconds)
    except ServingError as error:
        changed = champion is not None and champion.version != version  # False: an earlier attempt promoted it
        before = champion.version if changed else version_before(repository)
        if before is None:
            raise
        undo(before)
        message = f"version {version} was promoted and rolled back, {before} answers: {error}"
        raise RolledBack(message, before) from error
    return loaded


def withdraw(repository: Path, version: int) -> None:
    """Remove a published version that no config lists, after it failed its verification or its promotion."""
    if champion_or_none(repository) is None:
        shutil.rmtree(first_version_folder(repository), ignore_errors=True)
        return
    with locked(repository):
        retention.withdraw(repository, version)


def watch(repository: Path, version: int, servers: Sequence[RunningServer], seconds: float) -> None:
    """Watch a new champion: send its golden requests to each server for `seconds`, and check which version answers.

    The version is checked with a request that names none. A server that does not answer may be restarting: it gets 60 s
    more. Raises ServingError for a wrong response, a response of another version, and a server that does not restart.
    """
    release = read_release(repository, version, hashes=False)
    for server in servers:
        end = time.monotonic() + seconds
        deadline = end + RESTART_TIMEOUT
        while True:
            try:
                with Client(server.grpc_url) as client:
                    answered = client.predict([release.golden[0].image_bytes()])[0].version
                    if answered == version:
                        check_golden(client, release)
            except ServingError as error:
                if isinstance(error, WrongResponseError) or time.monotonic() > deadline:
                    raise
            else:
                if answered != version:
                    raise ServingError(f"{server.grpc_url}: version {answered} answers, not {version}")
                if time.monotonic() >= end:
                    break
            time.sleep(PAUSE)


def servers_of(repository: Path, url: str | None) -> list[RunningServer]:
    """The servers of a repository: the one at `url`, or this user's on this machine. Raises as `servers_at` does."""
    servers = servers_at(repository, url)
    return find_running(repository) if servers is None else servers


def clean(repository: Path) -> list[str]:
    """Remove leftovers of killed runs: hidden partial folders, versions of only one model. Returns the removed paths.

    The caller must hold the repository's lock, or be the only run.
    """
    removed = retention.leftovers(repository)
    models = models_of(repository)
    whole = set.intersection(*(set(version_folders(repository, model)) for model in models))
    for model in models:
        needed = {*whole, *served_versions(repository, model)}
        removed += [
            repository / model / str(version) for version in version_folders(repository, model) if version not in needed
        ]
    for path in removed:
        shutil.rmtree(path)
    return [str(path) for path in removed]


def first_version_folder(repository: Path) -> Path:
    """The hidden folder of a repository's first version until that version is promoted."""
    return repository.with_name(f".{repository.name}.first")
