"""The Triton model repository: written whole from an export, and checked dry before a server is asked to load it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from models import preprocess, prior
from serving.atomic import whole_folder
from serving.errors import ServingError
from serving.manifest import GOLDEN_NAME, MANIFEST_NAME, STUDENT_NAME, Manifest, check_file, load_golden, load_manifest
from serving.model_config import (
    CLASSIFIER,
    LABELS_NAME,
    STUDENT,
    Device,
    classifier_config,
    student_config,
    student_local_config,
    to_text,
)

LOCAL_CONFIG = "local"


class RepositoryError(ServingError):
    """A model repository that cannot be written or does not hold together; the message names the file."""


def write_repository(export_dir: Path, root: Path, device: Device = "cpu") -> Path:
    """Write the Triton model repository of one release and return its path.

    export_dir holds student.onnx, golden.json, model_card.md and the manifest.json that lists their sha256. device says
    where the student runs. The tree needs nothing of Tailor at serving time. It is built beside `root` and renamed in,
    so `root` is always the old tree or the new one. Raises ManifestError when the export does not match its manifest,
    and RepositoryError when `root` holds something else than a repository, or device is not cpu or gpu.
    """
    if device not in ("cpu", "gpu"):
        raise RepositoryError(f"device is {device!r}; expected cpu or gpu")
    manifest = load_manifest(export_dir)
    for name in (STUDENT_NAME, GOLDEN_NAME):
        if name not in manifest.files:
            raise RepositoryError(f"{export_dir / MANIFEST_NAME}: files lacks {name}; export again")
    load_golden(export_dir)
    _check_names(manifest, export_dir / MANIFEST_NAME)
    root = Path(os.path.abspath(root))  # noqa: PTH100 (a link given as root stays a name, it is not followed)
    _check_replaceable(root)
    with whole_folder(root) as partial:
        _write_tree(partial, export_dir, manifest, device)
    return root


def _write_tree(root: Path, export_dir: Path, manifest: Manifest, device: Device) -> None:
    sources = Path(__file__).with_name("triton")
    student, classifier = root / STUDENT, root / CLASSIFIER
    version = str(manifest.version)
    for folder in (student / "configs", student / version, classifier / version):
        folder.mkdir(parents=True)
    (student / "config.pbtxt").write_text(to_text(student_config(manifest, device)), encoding="utf-8")
    local = student / "configs" / f"{LOCAL_CONFIG}.pbtxt"
    local.write_text(to_text(student_local_config(manifest, device)), encoding="utf-8")
    (student / LABELS_NAME).write_text("".join(f"{name}\n" for name in manifest.classes), encoding="utf-8")
    (classifier / "config.pbtxt").write_text(to_text(classifier_config(manifest)), encoding="utf-8")
    copies = {
        student / version / "model.onnx": export_dir / STUDENT_NAME,
        student / version / "model.py": sources / "student_model.py",
        student / version / MANIFEST_NAME: export_dir / MANIFEST_NAME,
        classifier / version / "model.py": sources / "classifier_model.py",
        classifier / version / "metrics.py": sources / "metrics.py",
        classifier / version / "access_log.py": sources / "access_log.py",
        classifier / version / "prior.py": Path(prior.__file__),
        classifier / version / "preprocess.py": Path(preprocess.__file__),
        classifier / version / MANIFEST_NAME: export_dir / MANIFEST_NAME,
        classifier / version / GOLDEN_NAME: export_dir / GOLDEN_NAME,
    }
    for target, source in copies.items():
        shutil.copyfile(source, target)
    # The export may have been written anew while it was copied: what counts is what lies in the tree.
    check_file(student / version / "model.onnx", manifest.files[STUDENT_NAME])
    check_file(classifier / version / GOLDEN_NAME, manifest.files[GOLDEN_NAME])


def _check_names(manifest: Manifest, path: Path) -> None:
    """Class names become lines of a label file, so each is one line with something on it, and none comes twice."""
    seen: set[str] = set()
    for name in manifest.classes:
        if not name.strip() or name.splitlines() != [name]:
            raise RepositoryError(f"{path}: class name {name!r} is empty or has a line break; rename the class")
        if name in seen:
            raise RepositoryError(f"{path}: class name {name!r} occurs twice; rename one of the two classes")
        seen.add(name)


def _check_replaceable(root: Path) -> None:
    """Refuse to replace a folder that is not ours: an empty one or a repository may go, someone's data may not."""
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        raise RepositoryError(f"{root}: is not a folder; give the path of a new or an old model repository")
    if root.is_dir() and any(root.iterdir()) and not (root / STUDENT / "config.pbtxt").is_file():
        raise RepositoryError(
            f"{root}: holds files but no {STUDENT}/config.pbtxt; give an empty folder or a repository"
        )
