"""A model repository as the local server sees it: links to its files, without the configs of other servers.

Triton loads every version of a model anew when a file of the model has changed that is neither its config nor another
version's, and takes the container's config.pbtxt for such a file. A swap writes both configs; without the one, Triton
reads the new version policy, and what it has loaded already goes on as it is.
"""

from __future__ import annotations

from pathlib import Path

from serving.errors import ServingError
from serving.model_config import CLASSIFIER, LOCAL_CONFIG, STUDENT
from serving.triton import live_prior
from serving.version_policy import CONFIG_NAME

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
            _link(repository.absolute() / model, tree / model, _seen(repository / model))
        # A version of an older Tailor looks for it here. No link may lead nowhere: Triton would list no model then.
        prior = {live_prior.NAME} if (repository / live_prior.NAME).is_file() else set()
        _link(repository.absolute(), tree, {STUDENT, CLASSIFIER, *prior})
    except OSError as error:
        raise ServingError(f"{error.filename}: {error.strerror}; check the repository {repository}") from error
    return tree


def _seen(folder: Path) -> set[str]:
    """The names in a model's folder that the local server shall see; hidden is what is being written or removed."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if (folder / "configs" / f"{LOCAL_CONFIG}.pbtxt").is_file():
        names.discard(CONFIG_NAME)
    return names


def _link(source: Path, folder: Path, names: set[str]) -> None:
    """Have the folder hold a link to each of the names in `source`, and nothing else."""
    present = {path.name for path in folder.iterdir()}
    for name in present - names:
        (folder / name).unlink(missing_ok=True)
    for name in names - present:
        (folder / name).symlink_to(source / name)
