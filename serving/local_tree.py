"""A model repository as the local server sees it: links to its files, without the configs of other servers.

Triton loads every version of a model anew when a file of the model has changed that is neither its config nor another
version's, and takes the container's config.pbtxt for such a file. A swap writes both configs; without the one, Triton
reads the new version policy, and what it has loaded already goes on as it is.

A server with the compiled backend (serving/compiled_backend.py) reads the container's configs, and the tree lacks the
local ones; other servers read the local configs.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

from serving.compiled_backend import BACKEND
from serving.errors import ServingError
from serving.leftovers import runtime_folders
from serving.model_config import CLASSIFIER, LOCAL_CONFIG, STUDENT
from serving.triton import live_prior
from serving.version_policy import CONFIG_NAME, read_config

TREE = "repository"


def link_tree(repository: Path, runtime: Path) -> Path:
    """Make the tree in a server's runtime folder, or bring it up to date after versions came or went; its path.

    Raises ServingError naming what cannot be read or linked.
    """
    tree = runtime / TREE
    if tree.is_symlink():  # a server of an older Tailor
        return tree
    compiled = runs_compiled(repository, runtime)
    try:
        for model in (STUDENT, CLASSIFIER):
            (tree / model).mkdir(parents=True, exist_ok=True)
            present = _names(tree / model)
            _link(repository.absolute() / model, tree / model, present, _seen(repository / model, compiled))
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


def runs_compiled(repository: Path, runtime: Path) -> bool:
    """Whether the server of a runtime folder runs `student` in the compiled backend, which computes on the CPU alone.

    Raises RepositoryError when the config of `student` cannot be read.
    """
    if not (runtime / "backends" / BACKEND).is_dir():
        return False
    groups = read_config(repository / STUDENT / CONFIG_NAME).instance_group
    return all(group.kind == ModelInstanceGroup.Kind.KIND_CPU for group in groups)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _seen(folder: Path, compiled: bool) -> set[str]:
    """The names in a model's folder that the local server shall see; hidden is what is being written or removed."""
    names = {name for name in _names(folder) if not name.startswith(".")}
    if (folder / "configs" / f"{LOCAL_CONFIG}.pbtxt").is_file():
        names.discard("configs" if compiled else CONFIG_NAME)
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
