"""Read and write the version policy in a model's config files: which versions a server loads.

Triton serves a request without a version from the highest loaded version. So the policy lists single versions
(`specific`). The highest version that `classifier`, or `segmenter`, lists is the champion. A version that was only
published is not listed, so a restart does not load it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from serving.repository.manifest import Manifest
from serving.repository.model_config import add_extras, default_outputs, set_defaults, to_text
from serving.shared.atomic import write_file
from serving.shared.errors import RepositoryError
from serving.shared.names import LOCAL_CONFIG, STUDENT, image_model, models_of

CONFIG_NAME = "config.pbtxt"
STEP_NS = 1_000_000  # 1 ms: stays different on file systems that round times


def config_paths(root: Path, model: str) -> list[Path]:
    """The config files of a model, the second one for the local server; an old `classifier` has no second one."""
    local = root / model / "configs" / f"{LOCAL_CONFIG}.pbtxt"
    return [root / model / CONFIG_NAME, *([local] if model == STUDENT or local.is_file() else [])]


def read_config(path: Path) -> ModelConfig:
    """Parse a config file into Triton's ModelConfig message. Raises RepositoryError naming the file."""
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except OSError as error:
        raise RepositoryError(f"{path}: {error.strerror}; write the repository again") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise RepositoryError(f"{path}: not a model configuration: {error}; write the repository again") from None


def served_versions(root: Path, model: str) -> tuple[int, ...]:
    """The versions that a server of this repository loads, ascending: those that all config files of the model list.

    Raises RepositoryError naming the file.
    """
    return tuple(sorted(set.intersection(*_version_lists(root, model))))


def listed_versions(root: Path) -> set[int]:
    """The versions that a config file of either model lists, also if another config file does not list them.

    A server reads one config file of each model and loads what that one lists, so a check of signatures covers all of
    these. Raises RepositoryError naming the file.
    """
    return set().union(*(versions for model in models_of(root) for versions in _version_lists(root, model)))


def _version_lists(root: Path, model: str) -> list[set[int]]:
    """The versions that each config file of a model lists."""
    lists = []
    for path in config_paths(root, model):
        policy = read_config(path).version_policy
        if policy.WhichOneof("policy_choice") == "specific":
            lists.append(set(policy.specific.versions))
        else:  # written by hand or by an old version of Tailor: without a policy Triton serves the latest version
            folders = version_folders(root, model)
            lists.append(set(folders if policy.HasField("all") else folders[-max(policy.latest.num_versions, 1) :]))
    return lists


def serve_versions(root: Path, model: str, versions: tuple[int, ...], defaults: Manifest | None = None) -> None:
    """Set the version policy in a model's configs, atomically per file, and the parameters of `classifier`.

    defaults: manifest of the release with the default strength and the default outputs; None: they stay.

    A `classifier` config of an older Tailor gets the inputs and outputs of this one. All other fields keep their values,
    which an operator may have edited. A server reads the configs at the next load call.
    """
    for path in config_paths(root, model):
        config = read_config(path)
        before = config.SerializeToString(deterministic=True)
        config.version_policy.specific.SetInParent()
        config.version_policy.specific.versions[:] = versions
        add_extras(config)
        if defaults is not None:
            set_defaults(config, defaults.strength, default_outputs(defaults))
        if config.SerializeToString(deterministic=True) != before:
            write_file(path, to_text(config))
            mark_changed(root, model, path)


def mark_changed(root: Path, model: str, path: Path) -> None:
    """Give a file of a model a later modification time than all other files and folders of that model.

    Triton reloads a model only if the latest modification time of its files has increased. After the system clock was
    set back, a file that was just written would be older than the others, and a load would have no effect
    (docs/experiments.md). Raises OSError.
    """
    latest = max(entry.lstat().st_mtime_ns for entry in (root / model).rglob("*"))
    time_ns = max(time.time_ns(), latest + STEP_NS)
    os.utime(path, ns=(time_ns, time_ns))


def version_folders(root: Path, model: str) -> list[int]:
    """The versions of which a model has a folder, ascending."""
    folder = root / model
    if not folder.is_dir():
        return []
    versions = sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())
    return [version for version in versions if version > 0]


def present_versions(root: Path) -> list[int]:
    """The versions of which at least one of the two models has a folder, ascending."""
    return sorted({version for model in models_of(root) for version in version_folders(root, model)})


def version_before(root: Path) -> int | None:
    """The previous champion if it is still loaded; None after the first promotion and after a rollback."""
    served = served_versions(root, image_model(root))
    return served[-2] if len(served) > 1 else None
