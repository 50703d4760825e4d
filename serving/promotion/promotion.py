"""Hot swap: a release becomes the champion, or one before it does again, while requests are answered without a gap.

The champion is never touched before the challenger has been tried. A challenger is published (written whole beside the
others), rehearsed on a server of its own, and only then loaded by the server that answers users: first its student, which
receives the golden requests, then its classifier, from which moment it answers requests without a version. After a
failure the version policy and the loaded versions are restored, and what was published for the promotion is removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from serving.golden.dry_run import dry_run
from serving.promotion.rehearsal import rehearse
from serving.promotion.swap import bring_up_to_date, swap
from serving.repository.lock import locked
from serving.repository.promotion_log import champions, record
from serving.repository.release import Release, published_versions, read_champion, read_release
from serving.repository.retention import prune, remove_leftovers, withdrawn_on_failure
from serving.repository.version_policy import served_versions, version_before
from serving.repository.writer import publish
from serving.server.running import RunningServer, find_running
from serving.shared.errors import InputError, ServingError
from serving.shared.names import CLASSIFIER

KEPT = 5  # versions on disk
LOAD_TIMEOUT = 120.0  # seconds


class PromotionError(ServingError):
    """The requested version does not serve; the champion still does."""


@dataclass(frozen=True)
class Promotion:
    """What a promotion or rollback did.

    version: the champion now; previous: the champion before, the same one where nothing had to be done. rehearsed:
    whether the version answered its golden requests on a server of its own first. servers: the addresses that
    loaded it; none where no server runs, and the next one to start serves it. removed: old versions deleted.
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
    keep: int = KEPT,
    timeout: float = LOAD_TIMEOUT,
    rehearsal: bool | None = True,
) -> Promotion:
    """Make a release the champion: an export folder, which is published first, or the number of a published version.

    servers: who serves the repository; None finds those of this user on this machine. keep: how many versions stay on
    disk, the served ones among them. timeout: seconds that a load may take. rehearsal: False tries the graph in ONNX
    Runtime alone, where a second server does not fit on the machine; None compares the files' sha256 only, where the
    caller has just tried the version. Afterwards the champion before is still
    loaded, for requests that name it and for a rollback at once. The champion itself is loaded by the servers that have
    it not, as after a promotion that was killed. An export that fails is withdrawn from the disk again, if
    it was not published before; what killed promotions left there goes first. Raises InputError for a version that is
    not there or is older than the champion, RepositoryError and ManifestError for an unusable release, PromotionError
    when it failed its trial or the swap, RepositoryBusy while another promotion, a repair or the start of a server is
    under way.
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
            found = find_running(repository) if servers is None else servers
            if version == before:
                with _promotion_error(f"version {version} is the champion and does not answer"):
                    bring_up_to_date(repository, found, timeout)
                return Promotion(version, before, False, tuple(server.grpc_url for server in found))
            challenger, rehearsed = _try(repository, version, before, timeout, rehearsal)
            with _promotion_error(f"version {version} does not serve, version {before} stays"):
                swap(repository, challenger, (before, version), found, timeout)
        record(repository, "promote", version, before)
        removed = prune(repository, keep)
    return Promotion(version, before, rehearsed, tuple(server.grpc_url for server in found), removed)


def rollback(
    repository: Path,
    version: int | None = None,
    *,
    servers: Sequence[RunningServer] | None = None,
    timeout: float = LOAD_TIMEOUT,
    rehearsal: bool = True,
) -> Promotion:
    """Make an older version the champion again: `version`, or the one that was champion before.

    One that is loaded still takes over at once; another is tried as a challenger is. The versions after it stay on
    disk, unloaded, as Triton answers from the newest one that it has. Raises as `promote` does.
    """
    with locked(repository):
        before = read_champion(repository).version
        version = _published(repository, _champion_before(repository, before) if version is None else version)
        if version >= before:
            raise InputError(f"version {version} is not older than the champion {before}; use `tailor promote`")
        found = find_running(repository) if servers is None else servers
        if version in served_versions(repository, CLASSIFIER):
            older, rehearsed = read_release(repository, version, hashes=False), False
        else:
            older, rehearsed = _try(repository, version, before, timeout, rehearsal)
        with _promotion_error(f"version {version} does not serve, version {before} stays"):
            swap(repository, older, (version,), found, timeout)
        record(repository, "rollback", version, before)
    return Promotion(version, before, rehearsed, tuple(server.grpc_url for server in found))


def _published(repository: Path, version: int) -> int:
    versions = published_versions(repository)
    if version not in versions:
        raise InputError(f"{repository}: holds no version {version}; it has {', '.join(map(str, versions))}")
    return version


def _champion_before(repository: Path, champion: int) -> int:
    """The version that a rollback returns to: the one that is still served, or else the previous champion.

    The newest on disk may have failed its trial, or may have been rolled back from; it is chosen only where no promotion
    was recorded. Raises InputError where there is none.
    """
    if (served := version_before(repository)) is not None:
        return served
    older = [version for version in published_versions(repository) if version < champion]
    if not older:
        raise InputError(f"{repository}: holds no version before the champion {champion}; nothing to go back to")
    recorded = [version for version in champions(repository) if version in older]
    return (recorded or older)[-1]


def _try(repository: Path, version: int, before: int, timeout: float, rehearsal: bool | None) -> tuple[Release, bool]:
    """Read a version with its hashes and try it; whether on a server of its own. Raises PromotionError when it fails."""
    with _promotion_error(f"version {version} is not fit to serve, version {before} stays"):
        release = read_release(repository, version)
        if rehearsal:
            return release, rehearse(repository, release, timeout)
        if rehearsal is False:
            dry_run(repository, [release], timeout)
        return release, False


@contextmanager
def _promotion_error(what: str) -> Iterator[None]:
    """Raise a ServingError of the block as PromotionError that begins with `what`."""
    try:
        yield
    except ServingError as error:
        raise PromotionError(f"{what}: {error}") from error
