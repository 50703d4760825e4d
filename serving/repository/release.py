"""Read and check the releases of a model repository before a server loads them: files, sha256, versions of both models.

Triton waits forever for a model without its model.py, so these checks run before a start or a load.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serving.repository.manifest import (
    EXPLAIN_NAME,
    GOLDEN_NAME,
    MANIFEST_NAME,
    STUDENT_NAME,
    Golden,
    Manifest,
    check_file,
    load_golden,
    read_manifest,
)
from serving.repository.signed_release import verify_version
from serving.repository.signing_keys import trusted_keys
from serving.repository.version_policy import (
    CONFIG_NAME,
    config_paths,
    listed_versions,
    read_config,
    served_versions,
    version_folders,
)
from serving.repository.writer import RUNTIME_FILES
from serving.shared.errors import RepositoryError
from serving.shared.names import CLASSIFIER, SEGMENTER, STUDENT, image_model, models_of

# Releases made by older versions of Tailor do not have these files and do not need them.
LATER_FILES = {
    *("network.py", "start.py", "request_parser.py"),
    *("extras.py", "decisions.py", "taxonomy.py", "explain.py", "folder_files.py", "unknown_images.py"),
}
NEEDED = {
    STUDENT: ("model.onnx", *RUNTIME_FILES[STUDENT], MANIFEST_NAME),
    **{model: (*RUNTIME_FILES[model], MANIFEST_NAME, GOLDEN_NAME) for model in (CLASSIFIER, SEGMENTER)},
}


@dataclass(frozen=True)
class Release:
    """One version that both models have, with its manifest and golden requests."""

    version: int
    manifest: Manifest
    golden: list[Golden]


def find_releases(root: Path, hashes: bool = True) -> list[Release]:
    """The releases that a server of this repository loads, oldest first; the last is the champion (`read_champion`).

    hashes: whether to check the files' sha256 too, and with trusted keys the signature, also of the versions that only
    one of the config files lists. Raises RepositoryError or ManifestError naming the file: no repository, a config that
    does not parse, a version whose student is not served, a missing file, a wrong sha256 or signature.
    """
    if not (root / STUDENT / CONFIG_NAME).is_file():
        raise RepositoryError(
            f"{root}: holds no {STUDENT}/{CONFIG_NAME}, nothing has been promoted yet; run `dvc repro`, then "
            "`tailor promote artifacts/export`, or give --repository"
        )
    model = image_model(root)
    served = served_versions(root, model)
    students = served_versions(root, STUDENT)
    if not served or not set(served) <= set(students):
        raise RepositoryError(
            f"{root}: {model} serves versions {list(served)}, student {list(students)}; "
            "expected at least one, and each to have its student; write the repository again"
        )
    if hashes and trusted_keys():
        for version in sorted(listed_versions(root) - {*served}):
            read_release(root, version)
    return [read_release(root, version, hashes) for version in served]


def read_champion(root: Path) -> Release:
    """The champion: the release that serves requests without a version. Raises as find_releases without hashes does."""
    return find_releases(root, hashes=False)[-1]


def published_versions(root: Path) -> list[int]:
    """The versions of which both models have all files, ascending, served or not."""
    common = set(version_folders(root, STUDENT)) & set(version_folders(root, image_model(root)))
    return sorted(version for version in common if not _missing(root, version))


def read_release(root: Path, version: int, hashes: bool = True) -> Release:
    """Read one release of a repository. Raises RepositoryError or ManifestError naming a missing or wrong file.

    hashes: whether to check the files' sha256, and the signature if there are trusted keys.
    """
    for path in _missing(root, version):
        raise RepositoryError(f"{path}: is missing; write the repository again")
    student, classifier = (root / model / str(version) for model in models_of(root))
    manifest = read_manifest(classifier)
    if read_manifest(student) != manifest or manifest.version != version:
        raise RepositoryError(
            f"{student / 'manifest.json'}: is not the manifest of {classifier.parent.name} {version}; write it again"
        )
    files = {STUDENT_NAME: student / "model.onnx", GOLDEN_NAME: classifier / GOLDEN_NAME}
    if manifest.explain:
        files[EXPLAIN_NAME] = classifier / EXPLAIN_NAME
    for name, path in files.items():
        if hashes:
            check_file(path, manifest.files[name])
    if hashes and (trusted := trusted_keys()):
        verify_version(root, version, trusted)
    return Release(version, manifest, load_golden(classifier))


def instances(root: Path, model: str) -> int:
    """Number of instances of each version of a model on the local server."""
    return sum(group.count for group in read_config(config_paths(root, model)[-1]).instance_group)


def _missing(root: Path, version: int) -> list[Path]:
    paths = [root / model / str(version) / name for model in models_of(root) for name in NEEDED[model]]
    return [path for path in paths if path.name not in LATER_FILES and not path.is_file()]


@dataclass(frozen=True)
class VersionState:
    """One published version and its release.

    state: `champion`, `served` (loaded, for requests that name the version) or `kept` (on disk, not loaded).
    """

    version: int
    state: str
    release: Release
    published: float  # seconds since the epoch


def list_versions(repository: Path) -> list[VersionState]:
    """The published versions with states, oldest first. Raises RepositoryError or ManifestError naming the file."""
    champion, model = read_champion(repository).version, image_model(repository)
    served = served_versions(repository, model)
    return [
        VersionState(
            version,
            "champion" if version == champion else "served" if version in served else "kept",
            read_release(repository, version, hashes=False),
            (repository / model / str(version)).stat().st_mtime,
        )
        for version in published_versions(repository)
    ]
