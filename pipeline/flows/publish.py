"""From an export to the version that answers: published whole, verified apart, promoted, watched; and the way back.

All of it happens in `retrain.repository`, a Triton model repository that DVC knows nothing of: what `dvc repro` writes
anew are its outs, and a promoted version must outlive the next run.
"""

from __future__ import annotations

import filecmp
import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.gate import Contender
from serving import promotion, retention
from serving.atomic import sync, write_file
from serving.client import Client
from serving.dry_run import dry_run
from serving.errors import ServingError
from serving.golden import check_golden
from serving.manifest import Manifest, read_manifest
from serving.model_config import CLASSIFIER, STUDENT
from serving.promotion import Promotion
from serving.promotion_log import LOG_NAME, record
from serving.rehearsal import rehearse
from serving.release import read_champion, read_release
from serving.repository import load_export, write_repository
from serving.repository import publish as publish_version
from serving.repository_lock import locked
from serving.running import RunningServer, find_running, servers_at
from serving.version_policy import served_versions, version_folders

PAUSE = 0.5  # seconds between two rounds of golden requests of a watched version
ANSWERS_AGAIN_WITHIN = 60.0  # seconds that a server which was started anew gets, while a version is watched
PREDICTIONS, PRIOR, DECISION, REPORT, STORY = (
    "predictions.parquet",
    "prior.json",
    "decision.json",
    "report.html",
    "retrain.json",
)


class TakenBack(ServingError):
    """A version was promoted, did not answer rightly, and `before`, the champion of before, answers again."""

    def __init__(self, message: str, before: int) -> None:
        super().__init__(message)
        self.before = before


@dataclass(frozen=True)
class Champion:
    """The version that answers: its number, its manifest, and the folder that its decision lies in."""

    version: int
    manifest: Manifest
    folder: Path

    def contender(self, latency_ms: float | None = None) -> Contender:
        """What the gate compares a challenger with."""
        return Contender(self.folder / PREDICTIONS, self.folder / PRIOR, latency_ms)

    def graph(self, repository: Path) -> Path:
        """Its ONNX file."""
        return repository / STUDENT / str(self.version) / "model.onnx"


def find_champion(repository: Path) -> Champion | None:
    """The champion of a repository; None where nothing was ever promoted. Raises ServingError for a damaged one."""
    if not repository.exists() or (repository.is_dir() and not any(repository.iterdir())):
        return None
    release = read_champion(repository)
    return Champion(release.version, release.manifest, repository / CLASSIFIER / str(release.version))


def identity(manifest: Manifest) -> str:
    """sha256 that two exports share only when they are one release, whatever version each got."""
    return hashlib.sha256(manifest.model_copy(update={"version": 1}).model_dump_json().encode()).hexdigest()


def export_identity(export: Path) -> str:
    """`identity` of an export folder. Raises ManifestError."""
    return identity(read_manifest(export))


def publish(export: Path, repository: Path, evidence: Path) -> int:
    """Write an export and the evidence that goes with it as the repository's next version; its number.

    Nothing serves it yet. The first version of all is written beside the place that its repository will have. A release
    that lies there already keeps its number and gets this evidence, as it is decided on anew. Raises ManifestError for
    an export that is not what its manifest says, RepositoryError for one that does not fit the versions that are there,
    OSError when the disk is full; what was half written is gone again then.
    """
    if find_champion(repository) is None:
        write_repository(export, first(repository), evidence=evidence)
        return load_export(export).version
    with locked(repository):
        clean(repository)
        try:
            version = publish_version(export, repository, evidence=evidence)
            _renew(evidence, repository / CLASSIFIER / str(version))
            return version
        except BaseException:
            clean(repository)
            raise


def _renew(evidence: Path, folder: Path) -> None:
    """Replace the evidence in a version's folder where it is that of an earlier decision."""
    for path in sorted(evidence.iterdir()):
        if not (folder / path.name).is_file() or not filecmp.cmp(path, folder / path.name, shallow=False):
            write_file(folder / path.name, path.read_bytes())


def verify(repository: Path, version: int, timeout: float, rehearsal: bool = True) -> bool:
    """Try a published version apart from whoever serves; whether a second server could be had for it.

    A whole release loads on a server of its own and answers its golden requests, or its graph does in ONNX Runtime alone.
    Raises ServingError with what is wrong with it.
    """
    root = repository if find_champion(repository) else first(repository)
    if rehearsal:
        return rehearse(root, version, timeout)
    dry_run(root, [read_release(root, version)], timeout)
    return False


def promote(
    repository: Path, version: int, servers: Sequence[RunningServer] | None, keep: int, timeout: float
) -> Promotion:
    """Make a verified version the champion of the repository and of its servers, without a request lost.

    servers: None for those that this user runs on it by then. Raises PromotionError when it does not load or does not
    answer there; the champion before has then never stopped.
    """
    champion = find_champion(repository)
    if champion is None:
        repository.parent.mkdir(parents=True, exist_ok=True)
        (first(repository) / LOG_NAME).unlink(missing_ok=True)  # of a try that did not come to the next line
        record(first(repository), "promote", version, 0)
        first(repository).rename(repository)
        sync(repository.parent)
        return Promotion(version, 0, False, ())
    if version < champion.version:  # the very release that was rolled back from, or retrained away from, is best again
        return promotion.rollback(repository, version, servers=servers, timeout=timeout, rehearsal=False)
    return promotion.promote(repository, version, servers=servers, keep=keep, timeout=timeout, rehearsal=None)


def roll_back(
    repository: Path, version: int, servers: Sequence[RunningServer] | None, keep: int, timeout: float
) -> Promotion:
    """Make the champion of before the champion again, the newer version where the promotion was one back to an older.

    Raises as promotion.rollback and promotion.promote do.
    """
    if version > read_champion(repository).version:
        return promotion.promote(repository, version, servers=servers, keep=keep, timeout=timeout, rehearsal=False)
    return promotion.rollback(repository, version, servers=servers, timeout=timeout, rehearsal=False)


def withdraw(repository: Path, version: int) -> None:
    """Remove a published version that nobody serves: it is not fit, or its server would not take it."""
    if find_champion(repository) is None:
        shutil.rmtree(first(repository), ignore_errors=True)
        return
    with locked(repository):
        retention.withdraw(repository, version)


def watch(repository: Path, version: int, servers: Sequence[RunningServer], seconds: float) -> None:
    """Ask the new champion its golden requests for a while, as whoever names no version reaches it.

    A server that does not answer may be one that is started again: it gets a minute. Raises ServingError for a wrong
    answer, for another version's, and for a server that stays away.
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
    """Who serves the repository: those of this user on this machine, or the one at `url`. Raises as `servers_at` does."""
    servers = servers_at(repository, url)
    return find_running(repository) if servers is None else servers


def clean(repository: Path) -> list[str]:
    """Remove what killed runs left: hidden halves, and versions that one of the two models lacks; their paths.

    To be called under the repository's lock, or where no other run is.
    """
    removed = retention.leftovers(repository)
    whole = set(version_folders(repository, STUDENT)) & set(version_folders(repository, CLASSIFIER))
    for model in (STUDENT, CLASSIFIER):
        kept = {*whole, *served_versions(repository, model)}
        removed += [
            repository / model / str(version) for version in version_folders(repository, model) if version not in kept
        ]
    for path in removed:
        shutil.rmtree(path)
    return [str(path) for path in removed]


def first(repository: Path) -> Path:
    """Where the first version of all waits to be promoted."""
    return repository.with_name(f".{repository.name}.first")
