"""Build the content of a release: golden requests, their tolerance, the manifest."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from models.calibration import MINIMUM_IMAGES
from models.decisions import check_costs, images_needed, largest_coverage
from models.networks.cosine_classifier import ImageClassifier
from models.preprocess import ROOM
from pipeline.data.class_prior import Prior
from pipeline.data.dataset import AnyImages
from pipeline.data.split_tables import data_sha256, load_taxonomy
from pipeline.model_io.checkpoint import ModelConfig
from pipeline.onnx_export.parity import Parity
from pipeline.params import Params, ServingParams
from pipeline.shared.artifacts import ANSWERS, SPLIT, sha256_of_json
from pipeline.shared.errors import ParamsError, StageError
from pipeline.shared.fingerprint import code_sha256
from pipeline.shared.lineage import code_revision
from serving.repository.manifest import (
    GOLDEN_TOLERANCE,
    Calibration,
    DecisionDefaults,
    Explain,
    Golden,
    HalfPrecision,
    ImageFormat,
    Limits,
    Manifest,
    PredictionSets,
    SegmentationFormat,
    TaxonomyTree,
    Unknown,
    served_probabilities,
    sha256_of,
)
from serving.repository.writer import runtime_sha256
from serving.shared.names import CLASSIFIER, SEGMENTER
from serving.shared.version import TAILOR_VERSION

if TYPE_CHECKING:
    import onnxruntime

VERSION = 1
LARGEST_TOLERANCE = 0.1  # of a golden probability; a larger difference means a wrong graph, not rounding


def open_session(graph: Path | bytes) -> onnxruntime.InferenceSession:
    """Check a graph (file or bytes) with ONNX's checker, and open it in ONNX Runtime on the CPU."""
    # Read at the first import; without it onnxruntime writes a telemetry file to the user's cache folder.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    model = onnx.load_from_string(graph) if isinstance(graph, bytes) else onnx.load(graph)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


def _answers() -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(ANSWERS.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{ANSWERS}: no such file; run `dvc repro evaluate` first") from None
    return content


def load_calibration(params: Params) -> Calibration | None:
    """The calibration that evaluation fitted; None if there is none, or serving.calibration is none.

    Raises StageError if the evaluation has not written its file.
    """
    fitted = _answers()["calibration"]
    if fitted is None or params.serving.calibration == "none":
        return None
    return Calibration.model_validate({key: fitted[key] for key in Calibration.model_fields})


def load_sets(params: Params) -> PredictionSets | None:
    """The scores of prediction sets that evaluation wrote; None if validation had too few images for them.

    Raises StageError if serving.coverage is more than the validation images support, or the file does not exist.
    """
    fitted, coverage = _answers()["sets"], params.serving.coverage
    if coverage is not None:
        images = fitted["images"] if fitted else 0
        if coverage > largest_coverage(images) + 1e-9 or not fitted:
            needed = max(images_needed(coverage), MINIMUM_IMAGES)
            raise StageError(
                f"serving.coverage is {coverage:g}; it needs {needed} validation images, the split has {images}"
            )
    if fitted is None:
        return None
    return PredictionSets(scores=fitted["scores"], interpolation=fitted["interpolation"], coverage=coverage)


def load_unknown(params: Params) -> Unknown | None:
    """The scores by which the classifier detects unknown images; None if validation had too few images for them."""
    fitted, rate = _answers()["unknown"], params.serving.false_alarms
    if fitted is None:
        if rate is not None:
            raise StageError(f"serving.false_alarms is {rate:g}; it needs at least {MINIMUM_IMAGES} validation images")
        return None
    return Unknown(scores=fitted["scores"], false_alarms=rate)


def decision_defaults(serving: ServingParams, prior: Prior) -> DecisionDefaults | None:
    """The defaults of a decision from params; None without any. Raises ParamsError for an unknown class or a wrong shape."""
    costs = serving.costs
    if costs is None and serving.ask is None:
        return None
    if isinstance(costs, dict):
        if unknown := sorted(costs.keys() - set(prior.classes)):
            raise ParamsError(f"serving.costs names {unknown[0]!r}; expected class names, such as {prior.classes[0]!r}")
        costs = [costs.get(name, 1.0) for name in prior.classes]
    if costs is not None:
        try:
            check_costs(costs, len(prior.classes))
        except ValueError as error:
            raise ParamsError(f"serving.{error}") from None
    return DecisionDefaults(costs=costs, ask=serving.ask)


def taxonomy_tree(serving: ServingParams) -> TaxonomyTree | None:
    """The taxonomy of the split with serving.level; None without one. Raises ParamsError for a level without a taxonomy."""
    taxonomy = load_taxonomy()
    if taxonomy is None:
        if serving.level is not None:
            raise ParamsError(f"serving.level is {serving.level:g}, but data.taxonomy is null; name a CSV file in it")
        return None
    return TaxonomyTree(names=taxonomy.names, parents=taxonomy.parents, level=serving.level)


def golden_tolerance(half: Parity | None, calibration: Calibration | None = None) -> float:
    """Largest allowed difference from a golden probability; larger for float16, which a GPU rounds differently.

    GPU and CPU logits are both within half.logit of PyTorch's. If each logit changes by at most d, a probability
    changes by at most d/2. A temperature divides the change of a logit.
    """
    if half is None:
        return GOLDEN_TOLERANCE
    change = half.logit / (calibration.temperature if calibration else 1.0)
    return min(GOLDEN_TOLERANCE + change, LARGEST_TOLERANCE)


def top_k(serving: ServingParams, prior: Prior) -> int:
    """Number of classes in a response: serving.top_k, at most the number of classes."""
    return min(serving.top_k, len(prior.classes))


def golden_requests(
    session: onnxruntime.InferenceSession,
    examples: AnyImages,
    chosen: list[int],
    best: int,
    tolerance: float,
    prior: Prior,
    calibration: Calibration | None,
) -> list[Golden]:
    """Golden requests: the chosen images at strength 0 and 1 alternately, with the classifier's response to them."""
    golden = []
    for number, example in enumerate(chosen):
        strength = float(number % 2)
        pixels = examples.pixels(torch.tensor([example])).numpy()
        logits = session.run(["logits"], {"image": pixels, "strength": np.array([[strength]], dtype=np.float32)})[0][0]
        probability = served_probabilities(logits, strength, prior.log_prior, calibration)
        index = np.argsort(-probability, kind="stable")[:best]
        image = base64.b64encode(examples.encoded(example)).decode()
        golden.append(
            Golden(
                image=image, strength=strength, index=index.tolist(), probability=probability[index].tolist(),
                tolerance=tolerance,
            )
        )  # fmt: skip
    return golden


def build_manifest(
    folder: Path,
    params: Params,
    prior: Prior,
    model: ImageClassifier,
    metrics: dict[str, Any],
    half: Parity | None,
    config: ModelConfig,
    calibration: Calibration | None = None,
    sets: PredictionSets | None = None,
    decision: DecisionDefaults | None = None,
    unknown: Unknown | None = None,
    segmentation: SegmentationFormat | None = None,
    taxonomy: TaxonomyTree | None = None,
    explain: Explain | None = None,
) -> Manifest:
    """Build the manifest of a release; files: sha256 of each file that is in the folder."""
    return Manifest(
        version=VERSION,
        classes=prior.classes,
        counts=prior.counts,
        log_prior=prior.log_prior,
        image=ImageFormat(**params.image.model_dump(include={"size", "resize_to", "interpolation"}), room=ROOM),
        feature_dim=model.feature_dim,
        tau_s=model.tau_s,
        strength=params.serving.strength,
        top_k=top_k(params.serving, prior),
        max_batch_size=params.export.max_batch_size,
        files={path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        runtime=runtime_sha256(SEGMENTER if segmentation else CLASSIFIER),
        # Without the trusted keys: after a rotation the release is still the same.
        params_sha256=sha256_of_json(params.model_dump(mode="json", exclude={"serving": {"trusted_keys"}})),
        data_sha256=data_sha256(SPLIT),
        code_revision=code_revision(),
        code_sha256=code_sha256(),
        versions={"tailor": TAILOR_VERSION} | {name: version(name) for name in ("torch", "onnx", "onnxruntime")},
        metrics=metrics,
        encoder={**config.encoder, "tune": config.tune} if config.encoder else None,
        memory=config.memory,
        calibration=calibration,
        sets=sets,
        decision=decision,
        unknown=unknown,
        taxonomy=taxonomy,
        explain=explain,
        half=HalfPrecision(**asdict(half)) if half else None,
        limits=Limits(image_pixels=params.serving.image_pixels, request_pixels=params.serving.request_pixels),
        segmentation=segmentation,
    )
