"""Retention: delete old versions, withdraw failed ones, remove leftovers of killed runs.

The caller must hold the repository's lock.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from serving.repository.promotion_log import ever_champion
from serving.repository.version_policy import present_versions, served_versions
from serving.shared.errors import ServingError
from serving.shared.names import image_model, models_of

# Hidden folders of versions that were being written or replaced (serving.shared.atomic) or removed (`_remove`).
LEFTOVER = re.compile(r"\.\d+\.(partial|old|removed)")


def prune(repository: Path, keep: int) -> tuple[int, ...]:
    """Delete the oldest versions that are not served, so that `keep` remain on disk; returns the deleted versions.

    Versions older than the champion that were never champion, for example after a killed promotion, are deleted first.
    A version newer than the champion that was never champion may still be promoted: it is neither counted nor deleted.
    """
    served, tried = served_versions(repository, image_model(repository)), ever_champion(repository)
    present = [v for v in present_versions(repository) if v < served[-1] or v in {*served, *tried}]
    others = [version for version in present if version not in served]
    if tried:  # empty where no promotion was recorded
        others.sort(key=lambda version: (version in tried, version))
    removed = others[: max(0, len(present) - keep)]
    for version in removed:
        _remove(repository, version)
    return tuple(removed)


def withdraw(repository: Path, version: int) -> None:
    """Remove a published version unless a config lists it. Raises RepositoryError when a config cannot be read."""
    if all(version not in served_versions(repository, model) for model in models_of(repository)):
        _remove(repository, version)


@contextlib.contextmanager
def withdrawn_on_failure(repository: Path) -> Iterator[None]:
    """Withdraw the versions that the block published if it raises; versions that existed before stay."""
    existing = set(present_versions(repository))
    try:
        yield
    except BaseException:
        with contextlib.suppress(ServingError, OSError):  # report the block's error, not one of the clean-up
            for version in sorted(set(present_versions(repository)) - existing):
                withdraw(repository, version)
        raise


def leftovers(repository: Path) -> list[Path]:
    """The hidden folders of half-written or half-removed versions that killed runs left."""
    return [
        path
        for model in models_of(repository)
        for path in sorted((repository / model).glob(".*"))
        if LEFTOVER.fullmatch(path.name) and path.is_dir()
    ]


def remove_leftovers(repository: Path) -> None:
    """Remove the folders of `leftovers`; errors are ignored, because hidden folders are not served."""
    for path in leftovers(repository):
        shutil.rmtree(path, ignore_errors=True)


def _remove(repository: Path, version: int) -> None:
    """Delete a version; each of its folders is first renamed to a hidden name, so that no partial folder is visible."""
    for model in reversed(models_of(repository)):
        folder = repository / model / str(version)
        hidden = folder.with_name(f".{version}.removed")
        if folder.is_dir():
            shutil.rmtree(hidden, ignore_errors=True)
            folder.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)
