"""A release inside a model repository, checked dry: files, hashes and one run of the graph, before a server loads it.

Triton waits for ever on a model without its model.py, so whatever can be known without the server is known first.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from models.preprocess import preprocess
from models.prior import softmax
from serving.manifest import GOLDEN_NAME, STUDENT_NAME, Golden, Manifest, check_file, load_golden, read_manifest
from serving.model_config import CLASSIFIER, STUDENT, VERSIONS_SERVED
from serving.repository import LOCAL_CONFIG, RepositoryError

NEEDED = {
    STUDENT: ("model.onnx", "model.py", "manifest.json"),
    CLASSIFIER: (
        "model.py",
        "prior.py",
        "preprocess.py",
        "metrics.py",
        "access_log.py",
        "manifest.json",
        "golden.json",
    ),
}


@dataclass(frozen=True)
class Release:
    """One version that both models have, with its manifest and golden requests."""

    version: int
    manifest: Manifest
    golden: list[Golden]


def find_releases(root: Path) -> list[Release]:
    """The releases that a server of this repository would load, oldest first; at most two.

    Raises RepositoryError or ManifestError naming the file: no repository, a config that does not parse, a version that
    only one model has, a missing file, or a file whose sha256 is not the manifest's.
    """
    if not (root / STUDENT / "config.pbtxt").is_file():
        raise RepositoryError(f"{root}: holds no {STUDENT}/config.pbtxt; run `dvc repro` or give --repository")
    for path in (
        root / STUDENT / "config.pbtxt",
        root / STUDENT / "configs" / f"{LOCAL_CONFIG}.pbtxt",
        root / CLASSIFIER / "config.pbtxt",
    ):
        _check_config(path)
    versions = {name: _versions(root / name) for name in (STUDENT, CLASSIFIER)}
    if versions[STUDENT] != versions[CLASSIFIER] or not versions[STUDENT]:
        raise RepositoryError(
            f"{root}: student has versions {versions[STUDENT]}, classifier {versions[CLASSIFIER]}; "
            "expected the same ones, at least one; write the repository again"
        )
    return [_read_release(root, version) for version in versions[STUDENT]]


def dry_run(root: Path, release: Release) -> None:
    """Run the graph once per golden request in this process, on the CPU, and compare the answers.

    Raises RepositoryError naming the model when ONNX Runtime refuses it or when an answer is not the golden one.
    """
    # Its package would otherwise write a telemetry file under the user's cache folder; read when it is first imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    path = root / STUDENT / str(release.version) / "model.onnx"
    form = release.manifest.image
    try:
        images = [preprocess(golden.image_bytes(), form.size, form.resize_to)[None] for golden in release.golden]
    except ValueError as error:
        raise RepositoryError(f"{root / CLASSIFIER / str(release.version) / GOLDEN_NAME}: image {error}") from None
    strengths = [np.array([[golden.strength]], dtype=np.float32) for golden in release.golden]
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        answers = [
            session.run(["logits"], {"image": image, "strength": strength})[0][0]
            for image, strength in zip(images, strengths, strict=True)
        ]
    except Exception as error:  # its exceptions have no base of their own below Exception
        reason = " ".join(str(error).split())[:300]
        raise RepositoryError(f"{path}: ONNX Runtime cannot run it: {reason}; export again") from error
    for golden, logits in zip(release.golden, answers, strict=True):
        best = np.argsort(-logits, kind="stable")
        wrong = golden.difference(best.tolist(), softmax(logits)[best].tolist())
        if wrong:
            raise RepositoryError(f"{path}: a golden request is answered wrongly: {wrong}; export again")


def _check_config(path: Path) -> None:
    try:
        text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except OSError as error:
        raise RepositoryError(f"{path}: {error.strerror}; write the repository again") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise RepositoryError(f"{path}: not a model configuration: {error}; write the repository again") from None


def _versions(folder: Path) -> list[int]:
    """The version folders that Triton would serve under `latest`, ascending."""
    if not folder.is_dir():
        return []
    found = sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())
    return [version for version in found if version > 0][-VERSIONS_SERVED:]


def _read_release(root: Path, version: int) -> Release:
    for name, files in NEEDED.items():
        for file in files:
            if not (root / name / str(version) / file).is_file():
                raise RepositoryError(f"{root / name / str(version) / file}: is missing; write the repository again")
    student, classifier = root / STUDENT / str(version), root / CLASSIFIER / str(version)
    manifest = read_manifest(classifier)
    if read_manifest(student) != manifest or manifest.version != version:
        raise RepositoryError(
            f"{student / 'manifest.json'}: is not the manifest of classifier {version}; write it again"
        )
    for name, path in ((STUDENT_NAME, student / "model.onnx"), (GOLDEN_NAME, classifier / GOLDEN_NAME)):
        if name not in manifest.files:
            raise RepositoryError(f"{classifier / 'manifest.json'}: files lacks {name}; export again")
        check_file(path, manifest.files[name])
    return Release(version, manifest, load_golden(classifier))
