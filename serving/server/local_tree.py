"""A model repository as the local server sees it: links to its files, without the configs of other servers.

Triton loads every version of a model anew when a file of the model has changed that is neither its config nor another
version's, and takes the container's config.pbtxt for such a file. A swap writes both configs; without the one, Triton
reads the new version policy, and what it has loaded already goes on as it is.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from serving.repository.version_policy import CONFIG_NAME
from serving.server.leftovers import runtime_folders
from serving.shared.errors import ServingError
from serving.shared.names import CLASSIFIER, LOCAL_CONFIG, STUDENT
from serving.triton import live_prior

TREE = "repository"


def link_tree(repository: Path, runtime: Path) -> Path:
    """Make the tree in a server's runtime folder, or bring it up to date after versions came or went; its path.

    Raises ServingError naming what cannot be read or linked.
    """
    tree = runtime / TREE
    if tree.is_symlink():  # a server of an older Tailor
        return tree
    try:
        for model in (STUDENT, CLASSIFIER):
            (tree / model).mkdir(parents=True, exist_ok=True)
            present = _names(tree / model)
            _link(repository.absolute() / model, tree / model, present, _seen(repository / model))
        # A version of an older Tailor looks for it here. No link may lead nowhere: Triton would list no model then.
        present = _names(tree)
        prior = {live_prior.NAME} if (repository / live_prior.NAME).is_file() else set()
        _link(repository.absolute(), tree, present, {STUDENT, CLASSIFIER, *prior})
    except OSError as error:
        raise ServingError(f"{error.filename}: {error.strerror}; check the repository {repository}") from error
    return tree


def refresh_trees(repository: Path, prefix: str) -> None:
    """Bring the tree of a run up to date; nothing is written where nothing came or went. Raises as `link_tree` does."""
    for runtime in runtime_folders(prefix):
        link_tree(repository, runtime)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _seen(folder: Path) -> set[str]:
    """The names in a model's folder that the local server shall see; hidden is what is being written or removed."""
    names = {name for name in _names(folder) if not name.startswith(".")}
    if (folder / "configs" / f"{LOCAL_CONFIG}.pbtxt").is_file():
        names.discard(CONFIG_NAME)
    return names


def _link(source: Path, folder: Path, present: set[str], names: set[str]) -> None:
    """Have the folder, in which `present` was found, hold a link to each of the names in `source`, and nothing else.

    `present` must have been read before the names: a supervisor and a promotion may both be about it, and what the other
    one has linked meanwhile would else be taken for something that has gone.
    """
    for name in present - names:
        (folder / name).unlink(missing_ok=True)
    for name in names - present:
        with contextlib.suppress(FileExistsError):
            (folder / name).symlink_to(source / name)
    if names != present:
        os.utime(folder, (0, 0))  # else a time from before the clock was set back would hide later changes from Triton
