"""The lifecycle of a version: published whole, verified apart from users, promoted, watched, rolled back or withdrawn.

`tailor retrain` runs these steps one by one, each with retries of its own; `tailor promote` and `tailor rollback` run
`serving.promotion.promotion`, on which they rest. A repository need not exist yet: its first version is written beside it.
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
from serving.golden.requests import check_golden
from serving.promotion import promotion
from serving.promotion.promotion import Promotion
from serving.promotion.rehearsal import rehearse
from serving.repository import retention
from serving.repository.lock import locked
from serving.repository.manifest import Manifest, read_manifest
from serving.repository.promotion_log import LOG_NAME, record
from serving.repository.release import Release, read_champion, read_release
from serving.repository.version_policy import served_versions, version_before, version_folders
from serving.repository.writer import load_export, write_repository
from serving.repository.writer import publish as publish_version
from serving.server.running import RunningServer, find_running, servers_at
from serving.shared.atomic import sync, write_file
from serving.shared.errors import ServingError
from serving.shared.names import CLASSIFIER, STUDENT

PAUSE = 0.5  # seconds between two rounds of golden requests of a watched version
ANSWERS_AGAIN_WITHIN = 60.0  # seconds that a restarted server gets while a version is watched


class RolledBack(ServingError):
    """A promoted version answered wrongly, and `before`, the champion before it, is the champion again."""

    def __init__(self, message: str, before: int) -> None:
        super().__init__(message)
        self.before = before


def champion_or_none(repository: Path) -> Release | None:
    """The champion of a repository; None where nothing was ever promoted. Raises ServingError for a damaged repository."""
    if not repository.exists() or (repository.is_dir() and not any(repository.iterdir())):
        return None
    return read_champion(repository)


def identity(manifest: Manifest) -> str:
    """sha256 that two exports share only when they are one release, whatever version each got."""
    return hashlib.sha256(manifest.model_copy(update={"version": 1}).model_dump_json().encode()).hexdigest()


def export_identity(export: Path) -> str:
    """`identity` of an export folder. Raises ManifestError."""
    return identity(read_manifest(export))


def publish(export: Path, repository: Path, evidence: Path) -> int:
    """Write an export and its evidence as the next version of the repository, which no server loads yet; its number.

    The first version of all is written beside the path of its repository. A release that was published before keeps its
    number and gets this evidence, as it has been decided on again. Raises ManifestError for an export that its manifest
    does not describe, RepositoryError for one that does not fit the existing versions, OSError when the disk is full;
    then nothing of it remains.
    """
    if champion_or_none(repository) is None:
        write_repository(export, first_version_folder(repository), evidence=evidence)
        return load_export(export).version
    with locked(repository):
        clean(repository)
        try:
            version = publish_version(export, repository, evidence=evidence)
            _replace_evidence(evidence, repository / CLASSIFIER / str(version))
            return version
        except BaseException:
            clean(repository)
            raise


def _replace_evidence(evidence: Path, folder: Path) -> None:
    """Replace the evidence in a version's folder where it is that of an earlier decision."""
    for path in sorted(evidence.iterdir()):
        if not (folder / path.name).is_file() or not filecmp.cmp(path, folder / path.name, shallow=False):
            write_file(folder / path.name, path.read_bytes())


def verify(repository: Path, version: int, timeout: float, rehearsal: bool = True) -> bool:
    """Try a published version apart from the servers of users; whether a second server could be started for it.

    The whole release is loaded by a server of its own and answers its golden requests, or its graph does in ONNX Runtime
    alone. Raises ServingError with the fault.
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
    """Make a verified version the champion of the repository and of its servers, without a request lost.

    servers: None for those that this user runs on the repository when the version is loaded. Raises PromotionError when
    it does not load or does not answer; the champion before it has then never stopped.
    """
    champion = champion_or_none(repository)
    if champion is None:
        first = first_version_folder(repository)
        repository.parent.mkdir(parents=True, exist_ok=True)
        (first / LOG_NAME).unlink(missing_ok=True)  # of an attempt that ended before the rename
        record(first, "promote", version, 0)
        first.rename(repository)
        sync(repository.parent)
        return Promotion(version, 0, False, ())
    if version < champion.version:  # a release that was rolled back from, or replaced, is the best again
        return promotion.rollback(repository, version, servers=servers, timeout=timeout, rehearsal=False)
    return promotion.promote(repository, version, servers=servers, keep=keep, timeout=timeout, rehearsal=None)


def roll_back(
    repository: Path, version: int, servers: Sequence[RunningServer] | None, keep: int, timeout: float
) -> Promotion:
    """Make the champion before the promotion the champion again: a newer version where the promotion was to an older one.

    Raises as promotion.rollback and promotion.promote do.
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
    """Promote a verified version and watch it; the addresses of the servers that answer with it.

    url: the server; None for those of this user on this machine. undo: rolls back to the version that it is given. A
    version that is the champion by an earlier attempt is loaded where it is not yet, and watched too. Raises RolledBack
    when it answered wrongly and was rolled back, PromotionError as `promote` does.
    """
    champion = champion_or_none(repository)
    done = promote(repository, version, servers_at(repository, url), keep, timeout)
    try:
        watch(repository, version, servers_of(repository, url), watch_seconds)
    except ServingError as error:
        changed = champion is not None and champion.version != version  # else an earlier attempt promoted it
        before = champion.version if changed else version_before(repository)
        if before is None:
            raise
        undo(before)
        message = f"version {version} was promoted and rolled back, {before} answers: {error}"
        raise RolledBack(message, before) from error
    return done.servers


def withdraw(repository: Path, version: int) -> None:
    """Remove a published version that no server loads: it failed its trial, or its server did not load it."""
    if champion_or_none(repository) is None:
        shutil.rmtree(first_version_folder(repository), ignore_errors=True)
        return
    with locked(repository):
        retention.withdraw(repository, version)


def watch(repository: Path, version: int, servers: Sequence[RunningServer], seconds: float) -> None:
    """Send the new champion its golden requests for a while, in requests that name no version.

    A server that does not answer may be restarting: it gets a minute. Raises ServingError for a wrong answer, for the
    answer of another version, and for a server that does not come back.
    """
    release = read_release(repository, version, hashes=False)
    for server in servers:
        end = time.monotonic() + seconds
        given_up = end + ANSWERS_AGAIN_WITHIN
        while True:
            try:
                with Client(server.grpc_url) as client:
                    answered = client.predict([release.golden[0].image_bytes()])[0].version
                    if answered == version:
                        check_golden(client, release)
            except ServingError as error:
                if "golden request" in str(error) or time.monotonic() > given_up:
                    raise
            else:
                if answered != version:
                    raise ServingError(f"{server.grpc_url}: version {answered} answers, not {version}")
                if time.monotonic() >= end:
                    break
            time.sleep(PAUSE)


def servers_of(repository: Path, url: str | None) -> list[RunningServer]:
    """The servers of a repository: those of this user on this machine, or the one at `url`. Raises as `servers_at` does."""
    servers = servers_at(repository, url)
    return find_running(repository) if servers is None else servers


def clean(repository: Path) -> list[str]:
    """Remove what killed runs left: hidden halves, and versions that one of the two models lacks; their paths.

    The caller holds the repository's lock, or no other run exists.
    """
    removed = retention.leftovers(repository)
    whole = set(version_folders(repository, STUDENT)) & set(version_folders(repository, CLASSIFIER))
    for model in (STUDENT, CLASSIFIER):
        needed = {*whole, *served_versions(repository, model)}
        removed += [
            repository / model / str(version) for version in version_folders(repository, model) if version not in needed
        ]
    for path in removed:
        shutil.rmtree(path)
    return [str(path) for path in removed]


def first_version_folder(repository: Path) -> Path:
    """Where the first version of all is kept until it is promoted."""
    return repository.with_name(f".{repository.name}.first")
