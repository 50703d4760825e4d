"""Write a Triton model repository from an export, and publish further releases into it."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np

from models import decisions, preprocess, prior, taxonomy
from models.prior import class_names_problem
from serving.repository.manifest import (
    EXPLAIN_NAME,
    GOLDEN_NAME,
    MANIFEST_NAME,
    STUDENT_NAME,
    Manifest,
    ManifestError,
    check_file,
    load_golden,
    load_manifest,
    read_manifest,
)
from serving.repository.model_config import (
    Device,
    Placement,
    classifier_config,
    classifier_local_config,
    student_config,
    student_local_config,
    to_text,
)
from serving.repository.signature import SIGNATURE_NAME, renumbered, verify_manifest
from serving.repository.signing_keys import trusted_keys
from serving.repository.version_policy import CONFIG_NAME, present_versions, read_config
from serving.shared.atomic import sha256_of, whole_folder, write_file
from serving.shared.errors import RepositoryError
from serving.shared.names import CLASSIFIER, LABELS_NAME, LOCAL_CONFIG, SEGMENTER, STUDENT, image_model, models_of

# By model, the files that run inside Triton: name in a version folder -> source file that is copied.
TRITON = Path(__file__).parents[1] / "triton"
_BOTH = ("network.py", "start.py")
_CLASSIFIER = (
    *("request_parser.py", "metrics.py", "live_prior.py", "extras.py", "explain.py"),
    *(f"storage/{name}.py" for name in ("access_log", "folder_files", "logit_log", "unknown_images")),
)
RUNTIME_FILES = {
    STUDENT: {"model.py": TRITON / "student_model.py", **{name: TRITON / name for name in _BOTH}},
    CLASSIFIER: {
        "model.py": TRITON / "classifier_model.py",
        **{Path(name).name: TRITON / name for name in (*_BOTH, *_CLASSIFIER)},
        **{
            f"{module.__name__.rpartition('.')[2]}.py": Path(module.__file__)
            for module in (decisions, preprocess, prior, taxonomy)
        },
    },
}
RUNTIME_FILES[SEGMENTER] = {**RUNTIME_FILES[CLASSIFIER], "segmenter.py": TRITON / "segmenter.py"}


def runtime_sha256(model: str = CLASSIFIER) -> dict[str, str]:
    """The sha256 of each file that runs inside Triton, by model/name, for the key `runtime` of a manifest.

    model: the model of the release that takes encoded images.
    """
    return {
        f"{each}/{name}": sha256_of(path) for each in (STUDENT, model) for name, path in RUNTIME_FILES[each].items()
    }


def write_repository(
    export_dir: Path, root: Path, device: Device | Placement = "cpu", evidence: Path | None = None
) -> Path:
    """Write the Triton model repository of one release and return its path.

    export_dir: has student.onnx, golden.json, model_card.md and the manifest.json that lists their sha256. device:
    where the student runs. evidence: a folder whose files are copied into the classifier's version folder. A server of
    the repository does not import Tailor. The write is atomic: `root` is the old or the new repository. Raises
    ManifestError if the export does not match its manifest, RepositoryError if `root` is not a repository and not
    empty, and InputError for an unknown device.
    """
    placement = device if isinstance(device, Placement) else Placement(device)
    manifest = load_export(export_dir)
    # On a CPU the weights of a float16 graph are stored as float32.
    local = placement.decided((export_dir / STUDENT_NAME).stat().st_size * (2 if manifest.half else 1))
    root = Path(os.path.abspath(root))  # noqa: PTH100 (does not resolve a link given as root)
    _check_replaceable(root)
    with whole_folder(root) as partial:
        student, classifier = partial / STUDENT, partial / manifest.image_model
        version = str(manifest.version)
        for folder in (student / "configs", student / version, classifier / "configs", classifier / version):
            folder.mkdir(parents=True)
        (student / CONFIG_NAME).write_text(to_text(student_config(manifest, placement)), encoding="utf-8")
        for folder, make_config in ((student, student_local_config), (classifier, classifier_local_config)):
            config = make_config(manifest, local)
            (folder / "configs" / f"{LOCAL_CONFIG}.pbtxt").write_text(to_text(config), encoding="utf-8")
        (student / LABELS_NAME).write_text(labels_text(manifest), encoding="utf-8")
        (classifier / CONFIG_NAME).write_text(to_text(classifier_config(manifest)), encoding="utf-8")
        _write_student(student / version, export_dir, manifest)
        _write_classifier(classifier / version, export_dir, manifest, evidence)
    return root


def publish(export_dir: Path, root: Path, evidence: Path | None = None) -> int:
    """Publish an export: write it into a repository as its next version and return the version.

    No server loads it before it is promoted. Each of its two folders is written atomically. evidence: a folder whose
    files, such as the decision, are copied into the classifier's version folder. An export that was published before
    keeps its version. A signature of the export is copied; with trusted keys one of them must have made it. Raises
    ManifestError if the export does not match its manifest or is not signed as required, and RepositoryError if its
    classes or shapes differ from the repository's, which all versions of a model must share.
    """
    check_signature(export_dir)
    manifest = load_export(export_dir)
    _check_same_signature(manifest, export_dir, root)
    present = present_versions(root)
    for version in present:
        if _same_release(root, version, manifest):
            _copy_signature(export_dir, root / manifest.image_model / str(version))
            return version
    numbered = manifest.model_copy(update={"version": max(present, default=0) + 1})
    version = str(numbered.version)
    with whole_folder(root / STUDENT / version) as folder:
        _write_student(folder, export_dir, numbered)
    with whole_folder(root / manifest.image_model / version) as folder:
        _write_classifier(folder, export_dir, numbered, evidence)
    return numbered.version


def load_export(export_dir: Path) -> Manifest:
    """Read the manifest of an export, check all its files. Raises ManifestError or RepositoryError naming the file."""
    manifest = load_manifest(export_dir)
    load_golden(export_dir)
    if problem := class_names_problem(manifest.classes):
        raise RepositoryError(f"{export_dir / MANIFEST_NAME}: {problem}")
    if manifest.explain:
        _check_index(export_dir / EXPLAIN_NAME, manifest)
    return manifest


def _check_index(path: Path, manifest: Manifest) -> None:
    """Raise RepositoryError unless the feature index was made with the graph of the release."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            graph = archive["graph"].item().decode()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RepositoryError(f"{path}: is no feature index ({error}); export again") from None
    if graph != manifest.files[STUDENT_NAME]:
        served = manifest.files[STUDENT_NAME]
        raise RepositoryError(
            f"{path}: is the feature index of graph {graph[:12]}…, the release has {served[:12]}…; export again"
        )


def check_signature(export_dir: Path) -> None:
    """Verify the signature of an export if there are trusted keys. Raises SignatureError."""
    if trusted := trusted_keys():
        verify_manifest(export_dir, trusted)


def _copy_signature(export_dir: Path, folder: Path) -> None:
    """Copy the signature of an export, if it has one, unless the folder has the same."""
    source, target = export_dir / SIGNATURE_NAME, folder / SIGNATURE_NAME
    if source.is_file() and not (target.is_file() and target.read_bytes() == source.read_bytes()):
        write_file(target, source.read_bytes())


def _write_runtime(folder: Path, model: str, export_dir: Path, manifest: Manifest) -> None:
    """Write the manifest and the files that run inside Triton into a version folder.

    The manifest keeps the text of the export's, except for the version number, so that its signature stays valid.
    """
    for name, source in RUNTIME_FILES[model].items():
        shutil.copyfile(source, folder / name)
    path = export_dir / MANIFEST_NAME
    (folder / MANIFEST_NAME).write_bytes(renumbered(path.read_bytes(), manifest.version))
    if read_manifest(folder) != manifest:
        raise ManifestError(f'{path}: changed while it was read, or its first "version" is not its own; export again')
    # An empty file prevents the folder __pycache__ of Python: Triton would detect the new folder as a change of the
    # model and reload every version at the next load call.
    (folder / "__pycache__").touch()


def _write_student(folder: Path, export_dir: Path, manifest: Manifest) -> None:
    shutil.copyfile(export_dir / STUDENT_NAME, folder / "model.onnx")
    _write_runtime(folder, STUDENT, export_dir, manifest)
    # Check the copy, because the export may have changed while it was copied.
    check_file(folder / "model.onnx", manifest.files[STUDENT_NAME])


def _write_classifier(folder: Path, export_dir: Path, manifest: Manifest, evidence: Path | None) -> None:
    for path in sorted(evidence.iterdir()) if evidence else []:
        shutil.copyfile(path, folder / path.name)  # first, so that no evidence file replaces a file of the model
    _write_runtime(folder, manifest.image_model, export_dir, manifest)
    _copy_signature(export_dir, folder)
    shutil.copyfile(export_dir / GOLDEN_NAME, folder / GOLDEN_NAME)
    check_file(folder / GOLDEN_NAME, manifest.files[GOLDEN_NAME])
    if manifest.explain:
        shutil.copyfile(export_dir / EXPLAIN_NAME, folder / EXPLAIN_NAME)
        check_file(folder / EXPLAIN_NAME, manifest.files[EXPLAIN_NAME])


def labels_text(manifest: Manifest) -> str:
    """The content of labels.txt: a line for each class."""
    return "".join(f"{name}\n" for name in manifest.classes)


def _same_release(root: Path, version: int, manifest: Manifest) -> bool:
    """Whether both folders of a version exist and have this manifest, except for its version number."""
    expected = manifest.model_copy(update={"version": version})
    try:
        # Compare parsed manifests, because older versions of Tailor wrote fewer keys.
        return all(read_manifest(root / model / str(version)) == expected for model in models_of(root))
    except ManifestError:
        return False


def _check_same_signature(manifest: Manifest, export_dir: Path, root: Path) -> None:
    hint = "write a repository of its own with `tailor repository --output` and serve that"
    if manifest.image_model != image_model(root):
        raise RepositoryError(
            f"{export_dir}: is a release of `{manifest.image_model}`, but {root} holds `{image_model(root)}`; {hint}"
        )
    labels = root / STUDENT / LABELS_NAME
    if not labels.is_file():
        raise RepositoryError(f"{labels}: is missing; write the repository again")
    if labels.read_text(encoding="utf-8") != labels_text(manifest):
        raise RepositoryError(f"{export_dir}: has other classes than {labels}; {hint}")
    expected = {STUDENT: student_config(manifest, Placement()), manifest.image_model: classifier_config(manifest)}
    for model, config in expected.items():
        path = root / model / CONFIG_NAME
        existing = read_config(path)
        dims = {tensor.name: list(tensor.dims) for tensor in (*config.input, *config.output)}
        if "feature_map" in dims and not any(tensor.name == "feature_map" for tensor in existing.output):
            raise RepositoryError(f"{export_dir}: {model} has a feature_map, but {path} has none; {hint}")
        for tensor in (*existing.input, *existing.output):
            if dims.get(tensor.name) != list(tensor.dims):
                old = f"{tensor.name} {list(tensor.dims)}"
                new = f"{tensor.name} {dims[tensor.name]}" if tensor.name in dims else f"no {tensor.name}"
                raise RepositoryError(f"{export_dir}: {model} has {new}, but {path} has {old}; {hint}")


def _check_replaceable(root: Path) -> None:
    """Raise RepositoryError if `root` is neither absent, an empty folder, nor a repository."""
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        raise RepositoryError(f"{root}: is not a folder; give the path of a new or an old model repository")
    if root.is_dir() and any(root.iterdir()) and not (root / STUDENT / "config.pbtxt").is_file():
        raise RepositoryError(
            f"{root}: holds files but no {STUDENT}/config.pbtxt; give an empty folder or a repository"
        )
