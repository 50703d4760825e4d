"""Check that all that Triton loads of a published version is what was signed, and sign exports and versions.

The signature covers the manifest; the manifest has the sha256 of the graph, the golden requests and the files that run
inside Triton. The configs and labels of the two models are compared with those that Tailor writes for the manifest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tritonclient.grpc.model_config_pb2 import ModelConfig

from serving.repository.manifest import (
    EXPLAIN_NAME,
    GOLDEN_NAME,
    MANIFEST_NAME,
    STUDENT_NAME,
    Manifest,
    check_file,
    load_manifest,
    read_manifest,
)
from serving.repository.model_config import (
    Placement,
    add_extras,
    classifier_config,
    classifier_local_config,
    student_config,
    student_local_config,
)
from serving.repository.signature import SIGNATURE_NAME, SignatureError, sign_manifest, verify_manifest
from serving.repository.signing_keys import PublicKey
from serving.repository.version_policy import CONFIG_NAME, config_paths, read_config
from serving.repository.writer import labels_text
from serving.shared.atomic import write_file
from serving.shared.names import LABELS_NAME, STUDENT, image_model, models_of

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

# Evidence of the gate in a classifier's version folder: neither Python nor Triton runs files of these names.
DATA_SUFFIXES = (".json", ".parquet", ".html")
CACHE_BLOCKER = "__pycache__"  # an empty file (writer): a folder of this name could hold byte code that Python runs
VERSION_FOLDER = re.compile("[1-9][0-9]*")  # Triton also loads version 0, which Tailor neither writes nor checks
# What an operator or a promotion may change in a config. None of it names a file that Triton or Python runs.
FREE_FIELDS = ("version_policy", "instance_group", "dynamic_batching", "max_batch_size", "model_warmup")
FREE_PARAMETERS = ("default_outputs", "default_strength", "execution_provider", "intra_op_thread_count", "network")


def verify_version(root: Path, version: int, trusted: Sequence[PublicKey]) -> PublicKey:
    """Verify a version of a repository with both its models and their configs; returns the key that signed it.

    Raises SignatureError, ManifestError or RepositoryError naming the file: it is not signed by a trusted key, a file
    differs from the signed manifest, or a file is not in it.
    """
    classifier = root / image_model(root) / str(version)
    key = verify_manifest(classifier, trusted, published=True)
    check_contents(root, version, read_manifest(classifier))
    return key


def check_contents(root: Path, version: int, manifest: Manifest) -> None:
    """Compare a version's files, and the models' configs and labels, with its manifest. Raises as verify_version does."""
    path = root / STUDENT / str(version) / MANIFEST_NAME
    if path.read_bytes() != (root / image_model(root) / str(version) / MANIFEST_NAME).read_bytes():
        raise SignatureError(
            f"{path}: differs from the manifest of {image_model(root)} {version}; copy the release again"
        )
    for model in models_of(root):
        _check_folder(root / model / str(version), model, manifest)
        for entry in sorted((root / model).iterdir()):
            known = entry.name in (CONFIG_NAME, "configs", LABELS_NAME) or VERSION_FOLDER.fullmatch(entry.name)
            if not (known or entry.name.startswith(".")):  # hidden: a folder that is being written or removed
                raise SignatureError(f"{entry}: is not a file of Tailor, and Triton may run it; remove it")
    labels = root / STUDENT / LABELS_NAME
    if not labels.is_file() or labels.read_bytes() != labels_text(manifest).encode():
        raise SignatureError(f"{labels}: differs from the classes of the manifest; write the repository again")
    _check_configs(root, manifest)


def sign_export(folder: Path, key: Ed25519PrivateKey) -> None:
    """Sign an export after checking its files. Raises ManifestError naming a file that is not the manifest's."""
    _check_runtime(folder, load_manifest(folder))
    write_file(folder / SIGNATURE_NAME, sign_manifest(folder, key).text())


def sign_version(root: Path, version: int, key: Ed25519PrivateKey) -> None:
    """Sign a published version after checking its contents. The caller holds the lock. Raises as check_contents does."""
    folder = root / image_model(root) / str(version)
    check_contents(root, version, read_manifest(folder))
    write_file(folder / SIGNATURE_NAME, sign_manifest(folder, key).text())


def _check_runtime(folder: Path, manifest: Manifest) -> None:
    if not manifest.runtime:
        raise SignatureError(
            f"{folder / MANIFEST_NAME}: lacks the key runtime, so a signature would not cover the files that run inside "
            "Triton; an older Tailor made it: export again"
        )


def _check_folder(folder: Path, model: str, manifest: Manifest) -> None:
    """Check that a version folder has the files of the manifest, unchanged, and no other file that could run."""
    _check_runtime(folder, manifest)
    expected = {
        name.removeprefix(f"{model}/"): value
        for name, value in manifest.runtime.items()
        if name.startswith(f"{model}/")
    }
    data = ("model.onnx", STUDENT_NAME) if model == STUDENT else (GOLDEN_NAME, GOLDEN_NAME)
    expected[data[0]] = manifest.files[data[1]]
    if model != STUDENT and manifest.explain:
        expected[EXPLAIN_NAME] = manifest.files[EXPLAIN_NAME]
    for name, value in expected.items():
        check_file(folder / name, value)
    for path in sorted(folder.iterdir()):
        if path.name in (*expected, MANIFEST_NAME):
            continue
        blocker = path.name == CACHE_BLOCKER and path.is_file() and path.stat().st_size == 0
        hidden = path.name.startswith(".")  # no module's name; a killed run left it
        data_file = path.name == SIGNATURE_NAME or path.suffix in DATA_SUFFIXES
        if not (blocker or (path.is_file() and (hidden or data_file))):
            raise SignatureError(f"{path}: is not in the signed manifest, and Triton may run it; remove it")


def _check_configs(root: Path, manifest: Manifest) -> None:
    """Compare the config files with those that Tailor writes, except for FREE_FIELDS and FREE_PARAMETERS."""
    container = [student_config(manifest, Placement("gpu", tensorrt=precision)) for precision in (None, "fp32", "fp16")]
    local = [student_local_config(manifest, Placement())]
    classifier = [classifier_config(manifest), classifier_local_config(manifest, Placement())]
    for model, allowed in ((STUDENT, [container, local]), (image_model(root), [classifier, classifier])):
        for path, configs in zip(config_paths(root, model), allowed, strict=False):
            actual = _fixed(read_config(path))
            if not any(actual == _fixed(config) for config in configs):
                # Only the fields that are set: an empty message equals one that is absent.
                fields, expected = (
                    {field.name: value for field, value in config.ListFields()}
                    for config in (actual, _fixed(configs[0]))
                )
                differing = min(name for name in fields | expected if fields.get(name) != expected.get(name))
                raise SignatureError(
                    f"{path}: {differing} differs from what Tailor writes for this release; restore it, or write the "
                    "repository again"
                )


def _fixed(config: ModelConfig) -> ModelConfig:
    """A copy of a config without what may be changed."""
    fixed = ModelConfig()
    fixed.CopyFrom(config)
    for field in FREE_FIELDS:
        fixed.ClearField(field)
    for name in FREE_PARAMETERS:
        fixed.parameters.pop(name, None)
    add_extras(fixed)  # an older Tailor wrote the config
    return fixed
