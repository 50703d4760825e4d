"""Which versions of a model are served: the version policy in its config files, on disk.

Triton answers a request that names no version from the highest one it has loaded. So the policy lists versions one by
one (`specific`): the highest that `classifier` lists is the champion, and a version that was only published is in no
list and is loaded by no restart.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from serving.repository.model_config import to_text
from serving.shared.atomic import write_file
from serving.shared.errors import RepositoryError
from serving.shared.names import CLASSIFIER, LOCAL_CONFIG, STUDENT

CONFIG_NAME = "config.pbtxt"
STEP_NS = 1_000_000  # a millisecond, which file systems that round times keep apart


def config_paths(root: Path, model: str) -> list[Path]:
    """The config files of a model: the second one is for the local server. `classifier` of an older Tailor has none."""
    local = root / model / "configs" / f"{LOCAL_CONFIG}.pbtxt"
    return [root / model / CONFIG_NAME, *([local] if model == STUDENT or local.is_file() else [])]


def read_config(path: Path) -> ModelConfig:
    """A config file as Triton's message. Raises RepositoryError naming the file."""
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except OSError as error:
        raise RepositoryError(f"{path}: {error.strerror}; write the repository again") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise RepositoryError(f"{path}: not a model configuration: {error}; write the repository again") from None


def served_versions(root: Path, model: str) -> tuple[int, ...]:
    """The versions that a server of this repository loads, ascending; of `student`, those that both its configs list.

    Raises RepositoryError naming the file.
    """
    lists = []
    for path in config_paths(root, model):
        policy = read_config(path).version_policy
        if policy.WhichOneof("policy_choice") == "specific":
            lists.append(set(policy.specific.versions))
        else:  # a tree written by hand or by an older Tailor: Triton's own default is the latest one
            found = version_folders(root, model)
            lists.append(set(found if policy.HasField("all") else found[-max(policy.latest.num_versions, 1) :]))
    return tuple(sorted(set.intersection(*lists)))


def serve_versions(root: Path, model: str, versions: tuple[int, ...], default_strength: float | None = None) -> None:
    """Rewrite the version policy of a model's configs, each file whole, and of `classifier` its default strength.

    Everything else in them stays, as someone may have set it by hand. A server notices at its next load call.
    """
    for path in config_paths(root, model):
        config = read_config(path)
        before = config.SerializeToString(deterministic=True)
        config.version_policy.specific.SetInParent()
        config.version_policy.specific.versions[:] = versions
        if default_strength is not None:
            config.parameters["default_strength"].string_value = repr(default_strength)
        if config.SerializeToString(deterministic=True) != before:
            write_file(path, to_text(config))
            mark_changed(root, model, path)


def mark_changed(root: Path, model: str, path: Path) -> None:
    """Give a file of a model a later modification time than every other file and folder of that model has.

    Triton loads a model again only when the latest time of all its files has increased. After the system clock was set
    back, a file that was just written would be older than the others, and every load without effect. Raises OSError.
    """
    latest = max(entry.lstat().st_mtime_ns for entry in (root / model).rglob("*"))
    time_ns = max(time.time_ns(), latest + STEP_NS)
    os.utime(path, ns=(time_ns, time_ns))


def version_folders(root: Path, model: str) -> list[int]:
    """The version folders of a model, ascending."""
    folder = root / model
    if not folder.is_dir():
        return []
    found = sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())
    return [version for version in found if version > 0]


def present_versions(root: Path) -> list[int]:
    """The versions that at least one of the two models has a folder of, ascending."""
    return sorted({*version_folders(root, STUDENT), *version_folders(root, CLASSIFIER)})


def version_before(root: Path) -> int | None:
    """The champion before the last promotion, which is still loaded; None after the first promotion and a rollback."""
    served = served_versions(root, CLASSIFIER)
    return served[-2] if len(served) > 1 else None
