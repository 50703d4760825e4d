"""The local server's view of a model repository: a tree of links to its files, without the config.pbtxt of containers.

Why: Triton reloads every version of a model when a file of the model changes that is neither the config in use nor in a
version folder. For the local server, which uses configs/local.pbtxt, config.pbtxt is such a file, and a swap writes
both. With config.pbtxt hidden, Triton reads the new version policy and keeps the versions that are loaded.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from serving.repository.version_policy import CONFIG_NAME
from serving.server.leftovers import runtime_folders
from serving.shared.errors import ServingError
from serving.shared.names import LOCAL_CONFIG, models_of
from serving.triton import live_prior

TREE = "repository"


def link_tree(repository: Path, runtime: Path) -> Path:
    """Create the tree in a server's runtime folder, or update it to the present versions; returns its path.

    Raises ServingError naming the file or folder that cannot be read or linked.
    """
    tree = runtime / TREE
    if tree.is_symlink():  # made by an older release of Tailor
        return tree
    try:
        for model in models_of(repository):
            (tree / model).mkdir(parents=True, exist_ok=True)
            present = _names(tree / model)
            _link(repository.absolute() / model, tree / model, present, _visible_names(repository / model))
        # Model versions of older releases of Tailor read live_prior.json here. Link it only if it exists: with a broken
        # link in the tree Triton lists no model.
        present = _names(tree)
        prior = {live_prior.NAME} if (repository / live_prior.NAME).is_file() else set()
        _link(repository.absolute(), tree, present, {*models_of(repository), *prior})
    except OSError as error:
        raise ServingError(f"{error.filename}: {error.strerror}; check the repository {repository}") from error
    return tree


def refresh_trees(repository: Path, prefix: str) -> None:
    """Update the tree of a run; writes nothing if no version was added or removed. Raises as `link_tree` does."""
    for runtime in runtime_folders(prefix):
        link_tree(repository, runtime)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _visible_names(folder: Path) -> set[str]:
    """The names in a model's folder that the local server may see: no hidden names (being written or removed)."""
    names = {name for name in _names(folder) if not name.startswith(".")}
    if (folder / "configs" / f"{LOCAL_CONFIG}.pbtxt").is_file():
        names.discard(CONFIG_NAME)
    return names


def _link(source: Path, folder: Path, present: set[str], names: set[str]) -> None:
    """Make `folder` hold links to `names` in `source` and nothing else; `present` are the names that it held before.

    Read `present` before `names`: a supervisor and a promotion may update the tree at the same time. In the other
    order, a link that the other process has just created would be removed as outdated.
    """
    for name in present - names:
        (folder / name).unlink(missing_ok=True)
    for name in names - present:
        with contextlib.suppress(FileExistsError):
            (folder / name).symlink_to(source / name)
    if names != present:
        # Triton takes the latest time of all files. After the clock was set back, the folder's time would stay the
        # latest and hide later changes of files.
        os.utime(folder, (0, 0))
