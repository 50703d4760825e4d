"""Promote a release to champion, or roll back to an older version, while requests are served without interruption.

The champion serves unchanged until the challenger is verified. The challenger is published (written atomically beside
the other versions), rehearsed on a separate server, and then loaded by the server of the users: first its student,
which gets the golden requests, then its classifier, which from then on serves requests without a version. After a
failure the version policies and the loaded versions are restored, and a version that was published for the promotion is
removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from serving.golden.dry_run import dry_run
from serving.promotion.rehearsal import rehearse
from serving.promotion.swap import load_served_versions, swap
from serving.repository.lock import locked
from serving.repository.promotion_log import champions, record
from serving.repository.release import Release, published_versions, read_champion, read_release
from serving.repository.retention import prune, remove_leftovers, withdrawn_on_failure
from serving.repository.signing_keys import trusted_keys
from serving.repository.version_policy import serve_versions, served_versions, version_before
from serving.repository.writer import publish
from serving.server.running import RunningServer, find_running
from serving.shared.errors import InputError, ServingError
from serving.shared.names import image_model, models_of

VERSIONS_KEPT = 5  # versions on disk
LOAD_TIMEOUT = 120.0  # seconds


class PromotionError(ServingError):
    """The requested version failed its verification or its load; the champion still serves."""


@dataclass(frozen=True)
class Promotion:
    """The result of a promotion or rollback.

    version: the champion now. previous: the champion before, the same if nothing changed. rehearsed: whether the
    version answered its golden requests on a separate server first. servers: the addresses that loaded it; empty if no
    server runs; the next server to start then serves it. removed: old versions deleted.
    """

    version: int
    previous: int
    rehearsed: bool
    servers: tuple[str, ...]
    removed: tuple[int, ...] = ()


def promote(
    repository: Path,
    release: Path | int,
    *,
    servers: Sequence[RunningServer] | None = None,
    keep: int = VERSIONS_KEPT,
    timeout: float = LOAD_TIMEOUT,
    rehearsal: bool | None = True,
) -> Promotion:
    """Promote a release: an export folder, which is published first, or the number of a published version.

    servers: the servers of the repository; None finds this user's on this machine. keep: number of versions that stay
    on disk, including the served ones. timeout: seconds that a load may take. rehearsal: True verifies the version on a
    separate server; False runs the graph only in ONNX Runtime, if a second server does not fit on the machine; None
    only checks the files' sha256, if the caller has just verified the version.

    Leftovers of killed promotions are removed first. Afterwards the previous champion is still loaded, for requests
    that name it and for an immediate rollback, unless there are trusted keys and none of them signed it. If the
    release is the champion already, servers that have not loaded it, as after a killed promotion, load it. An export
    that fails is removed from the disk if it was not published before. Raises InputError for a version that does not
    exist or is older than the champion, RepositoryError and ManifestError for an unusable release, PromotionError if
    the verification or the swap failed, RepositoryBusy while another promotion, a repair or the start of a server is
    running.
    """
    if keep < 2:
        raise InputError(f"keep is {keep}; expected at least 2, the champion and the one before it")
    with locked(repository):
        before = read_champion(repository).version
        remove_leftovers(repository)
        with withdrawn_on_failure(repository):
            version = publish(release, repository) if isinstance(release, Path) else _published(repository, release)
            if version < before:
                raise InputError(
                    f"version {version} is older than the champion {before}; use `tailor rollback {version}`"
                )
            running = find_running(repository) if servers is None else servers
            if version == before:
                read_release(repository, version, hashes=bool(trusted_keys()))
                _unlist_untrusted(repository)
                with _promotion_error(f"version {version} is the champion and does not answer"):
                    load_served_versions(repository, running, timeout)
                return Promotion(version, before, False, tuple(server.grpc_url for server in running))
            challenger, rehearsed = _verify(repository, version, before, timeout, rehearsal)
            with _promotion_error(f"version {version} could not be loaded, version {before} is still served"):
                final = (before, version) if _may_stay(repository, before) else (version,)
                swap(repository, challenger, final, running, timeout)
        record(repository, "promote", version, before)
        removed = prune(repository, keep)
    return Promotion(version, before, rehearsed, tuple(server.grpc_url for server in running), removed)


def rollback(
    repository: Path,
    version: int | None = None,
    *,
    servers: Sequence[RunningServer] | None = None,
    timeout: float = LOAD_TIMEOUT,
    rehearsal: bool = True,
) -> Promotion:
    """Roll back: make an older version the champion again, `version` or the previous champion.

    A version that is still loaded is used at once, with trusted keys after a check of its signature, as its key may
    have been revoked; another one is verified first, as in a promotion. Newer versions stay on disk but are unloaded,
    because Triton serves from the newest loaded version. Raises as `promote` does.
    """
    with locked(repository):
        before = read_champion(repository).version
        version = _published(repository, _champion_before(repository, before) if version is None else version)
        if version >= before:
            raise InputError(f"version {version} is not older than the champion {before}; use `tailor promote`")
        running = find_running(repository) if servers is None else servers
        if version in served_versions(repository, image_model(repository)):
            older, rehearsed = read_release(repository, version, hashes=bool(trusted_keys())), False
        else:
            older, rehearsed = _verify(repository, version, before, timeout, rehearsal)
        with _promotion_error(f"version {version} could not be loaded, version {before} is still served"):
            swap(repository, older, (version,), running, timeout)
        record(repository, "rollback", version, before)
    return Promotion(version, before, rehearsed, tuple(server.grpc_url for server in running))


def _published(repository: Path, version: int) -> int:
    versions = published_versions(repository)
    if version not in versions:
        raise InputError(f"{repository}: holds no version {version}; it has {', '.join(map(str, versions))}")
    return version


def _champion_before(repository: Path, champion: int) -> int:
    """The version for a rollback that names none: the older one that is still served, else the previous champion.

    The newest older version on disk may have failed its verification or been rolled back from. It is chosen only if no
    promotion was recorded. Raises InputError if there is no older version.
    """
    if (served := version_before(repository)) is not None:
        return served
    older = [version for version in published_versions(repository) if version < champion]
    if not older:
        raise InputError(f"{repository}: holds no version before the champion {champion} to roll back to")
    recorded = [version for version in champions(repository) if version in older]
    return (recorded or older)[-1]


def _verify(root: Path, version: int, before: int, timeout: float, rehearsal: bool | None) -> tuple[Release, bool]:
    """Read a version, check its sha256 and verify it. Raises PromotionError.

    Returns the release and whether it was verified on a separate server.
    """
    with _promotion_error(f"version {version} failed its verification, version {before} stays"):
        release = read_release(root, version)
        if rehearsal:
            return release, rehearse(root, release, timeout)
        if rehearsal is False:
            dry_run(root, [release], timeout)
        return release, False


def _may_stay(root: Path, version: int) -> bool:
    """Whether a version may stay loaded: without a trusted signature the next start of a server would be refused."""
    try:
        if trusted_keys():
            read_release(root, version)
    except ServingError:
        return False
    return True


def _unlist_untrusted(root: Path) -> None:
    """With trusted keys, list in all configs only the served versions that one of the keys signed.

    A killed promotion may have left another one in the policy of `student`, and the next load would load it.
    """
    if trusted_keys():
        final = tuple(version for version in served_versions(root, image_model(root)) if _may_stay(root, version))
        for model in reversed(models_of(root)):  # in this order each version of it has its student
            serve_versions(root, model, final)


@contextmanager
def _promotion_error(message: str) -> Iterator[None]:
    """Turn a ServingError of the block into a PromotionError whose message begins with `message`."""
    try:
        yield
    except ServingError as error:
        raise PromotionError(f"{message}: {error}") from error
