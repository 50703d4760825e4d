"""Stage `export`: the student as one checked ONNX file, its manifest and the Triton model repository."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pyarrow.parquet
import torch

from models.cosine_classifier import ImageClassifier
from models.prior import adjust_logits, softmax
from pipeline.artifacts import (
    EVALUATION,
    EXPORT,
    REPOSITORY,
    SPLIT,
    STUDENT,
    sha256_of_json,
    whole_folder,
    write_file,
    write_json,
)
from pipeline.checkpoint import check_image, load_model
from pipeline.dataset import AnyImages, evaluation_images, normalise
from pipeline.errors import StageError
from pipeline.model_card import model_card
from pipeline.onnx_graph import ServedStudent, to_onnx
from pipeline.params import ImageParams, Params
from pipeline.prior import Prior, load_prior
from pipeline.stage import stage_main
from pipeline.tracking import tell_after
from serving.errors import ServingError
from serving.manifest import GOLDEN_NAME, MANIFEST_NAME, Golden, ImageFormat, Manifest, sha256_of
from serving.repository import write_repository

if TYPE_CHECKING:
    import onnxruntime

ONNX_NAME = "student.onnx"
CARD_NAME = "model_card.md"
VERSION = 1


@dataclass(frozen=True)
class Result:
    """The largest difference seen between ONNX Runtime and PyTorch, of a logit."""

    difference: float
    manifest: Manifest
    output: Path

    def __str__(self) -> str:
        return f"{len(self.manifest.files)} files, largest logit difference from PyTorch {self.difference:.1e} → {self.output}"


def run(params: Params, output: Path = EXPORT, repository: Path = REPOSITORY) -> Result:
    """Export, check against PyTorch, write export folder and model repository. Raises StageError when the check fails."""
    prior = load_prior()
    model, config = load_model(STUDENT, "student")
    check_image(config, params.image, STUDENT)
    image = params.image
    held_out = evaluation_images(params, "validation")
    examples = held_out if len(held_out) else evaluation_images(params, "train")
    served = ServedStudent(model, image.mean, image.std, prior.log_prior).eval()
    with whole_folder(output) as folder:
        path = folder / ONNX_NAME
        write_file(path, to_onnx(served, image.size, params.export.opset))
        session = open_session(path)
        difference = check_parity(session, model, examples, image, prior, params)
        golden = golden_answers(session, examples, params, top_k(params, prior))
        write_json(folder / GOLDEN_NAME, [answer.model_dump() for answer in golden])
        metrics = json.loads((EVALUATION / "metrics.json").read_text(encoding="utf-8"))["student"]
        write_file(folder / CARD_NAME, model_card(params, prior, metrics))
        manifest = build_manifest(folder, params, prior, model, metrics)
        write_file(folder / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")
    try:
        write_repository(output, repository)
    except ServingError as error:
        raise StageError(str(error)) from None
    tell_after("export", params, output)
    return Result(difference, manifest, output)


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU over a graph that passes ONNX's own checker."""
    # Its package would otherwise write a telemetry file under the user's cache folder; read when it is first imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    onnx.checker.check_model(onnx.load(path), full_check=True)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def check_parity(
    session: onnxruntime.InferenceSession,
    model: ImageClassifier,
    examples: AnyImages,
    image: ImageParams,
    prior: Prior,
    params: Params,
) -> float:
    """Largest absolute logit difference between the graph in ONNX Runtime and the training path in PyTorch.

    Batch sizes 1, 2, 7 and the maximum, half real images and half noise, a strength per row. Raises StageError when a
    logit or a feature differs by more than export.tolerance, or is not finite.
    """
    generator = np.random.default_rng(params.seed)
    log_prior = torch.tensor(prior.log_prior)
    largest = 0.0
    for batch in (1, 2, 7, params.export.max_batch_size):
        pixels = generator.integers(0, 256, (batch, 3, image.size, image.size), dtype=np.uint8)
        chosen = generator.integers(0, len(examples), (batch + 1) // 2)
        real = examples.pixels(torch.from_numpy(chosen)).numpy()
        pixels[: len(real)] = real
        strength = generator.choice([0.0, 1.0, -0.5, 2.5], (batch, 1)).astype(np.float32)
        with torch.inference_mode():
            features, logits = model(normalise(torch.from_numpy(pixels), image))
            expected = adjust_logits(logits, log_prior, torch.from_numpy(strength)).numpy()
            expected_feature = torch.nn.functional.normalize(features, dim=1).numpy()
        found, feature = session.run(["logits", "feature"], {"image": pixels, "strength": strength})
        gaps = np.abs(found - expected).max(), np.abs(feature - expected_feature).max()
        if not max(gaps) <= params.export.tolerance:
            raise StageError(
                f"at batch size {batch} ONNX Runtime differs from PyTorch by {gaps[0]:.2e} (logits) and {gaps[1]:.2e} "
                f"(feature), above export.tolerance = {params.export.tolerance:g}; nothing was exported"
            )
        largest = max(largest, float(gaps[0]))
    return largest


def top_k(params: Params, prior: Prior) -> int:
    """Answers per image: serving.top_k, or all classes where there are fewer."""
    return min(params.serving.top_k, len(prior.classes))


def golden_answers(
    session: onnxruntime.InferenceSession, examples: AnyImages, params: Params, best: int
) -> list[Golden]:
    """Requests whose answers are known: validation images at strength 0 and 1 in turn, answered by ONNX Runtime."""
    generator = np.random.default_rng(params.data.seed)
    chosen = generator.permutation(len(examples))[: params.export.golden]
    golden = []
    for number, example in enumerate(chosen):
        strength = float(number % 2)
        pixels = examples.pixels(torch.tensor([example])).numpy()
        logits = session.run(["logits"], {"image": pixels, "strength": np.array([[strength]], dtype=np.float32)})[0][0]
        probability = softmax(logits)
        index = np.argsort(-probability, kind="stable")[:best]
        image = base64.b64encode(examples.encoded(int(example))).decode()
        golden.append(
            Golden(image=image, strength=strength, index=index.tolist(), probability=probability[index].tolist())
        )
    return golden


def build_manifest(
    folder: Path, params: Params, prior: Prior, model: ImageClassifier, metrics: dict[str, Any]
) -> Manifest:
    """The release's manifest over the files already in the folder."""
    return Manifest(
        version=VERSION,
        classes=prior.classes,
        counts=prior.counts,
        log_prior=prior.log_prior,
        image=ImageFormat(size=params.image.size, resize_to=params.image.resize_to),
        feature_dim=model.feature_dim,
        tau_s=model.tau_s,
        strength=params.serving.strength,
        top_k=top_k(params, prior),
        max_batch_size=params.export.max_batch_size,
        files={path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        params_sha256=sha256_of_json(params.model_dump(mode="json")),
        data_sha256=data_sha256(SPLIT),
        code_revision=code_revision(),
        versions={name: version(name) for name in ("torch", "onnx", "onnxruntime")},
        metrics=metrics,
    )


def data_sha256(split: Path) -> str:
    """sha256 over every image's split, id, label and content hash: equal for equal data, whatever wrote the tables."""
    digest = hashlib.sha256()
    for name in ("train", "validation", "test"):
        table = pyarrow.parquet.read_table(split / f"{name}.parquet", columns=["sample_id", "label", "sha256"])
        digest.update(json.dumps([name, *table.to_pydict().values()]).encode())
    return digest.hexdigest()


def code_revision() -> str:
    """The git commit that runs, with `+changes` when the working tree differs from it; `unknown` outside a repository."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(stage_main(run, "Export the student to ONNX, check it, and write the Triton model repository."))
