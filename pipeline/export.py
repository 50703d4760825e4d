"""Stage `export`: write the student as a checked ONNX file, its manifest and the Triton model repository."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.networks.backbones import NoFeatureMapError
from models.preprocess import ImageError, decode
from pipeline.command_line import stage_main
from pipeline.data.class_prior import load_prior
from pipeline.data.dataset import AnyImages, evaluation_images
from pipeline.model_io.checkpoint import attach_encoder, check_canvas, check_image, load_model, student_folder
from pipeline.onnx_export import segmentation
from pipeline.onnx_export.explanations import NO_MAP, check_map, write_explanations
from pipeline.onnx_export.float16 import to_float16
from pipeline.onnx_export.graph import ServedStudent, to_onnx
from pipeline.onnx_export.parity import Parity, TrainedNetwork, check_float16, check_parity
from pipeline.onnx_export.release import (
    build_manifest,
    decision_defaults,
    golden_requests,
    golden_tolerance,
    load_calibration,
    load_sets,
    load_unknown,
    open_session,
    taxonomy_tree,
    top_k,
)
from pipeline.onnx_export.segmentation import ServedSegmenter
from pipeline.params import Params, ServingParams
from pipeline.report.mlflow_record import record_after_stage
from pipeline.report.model_card import model_card, model_facts, network_name
from pipeline.segmentation.dataset import LabelMapSplit, fill_colour
from pipeline.shared.artifacts import EVALUATION, EXPORT, REPOSITORY, STUDENT, whole_folder, write_file, write_json
from pipeline.shared.errors import StageError
from serving.repository.manifest import GOLDEN_NAME, MANIFEST_NAME, Manifest, SegmentationFormat
from serving.repository.signature import SIGNATURE_NAME, sign_manifest
from serving.repository.signing_keys import signing_key
from serving.repository.writer import write_repository
from serving.shared.terminal import counted

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from onnxruntime import InferenceSession

ONNX_NAME = "student.onnx"
CARD_NAME = "model_card.md"


@dataclass(frozen=True)
class Result:
    """Result of an export.

    difference: largest logit difference between ONNX Runtime and PyTorch. half: effects of float16.
    """

    difference: float
    manifest: Manifest
    output: Path
    half: Parity | None = None

    def __str__(self) -> str:
        files = counted(len(self.manifest.files), "file")
        half = f", in float16 {self.half}" if self.half else ""
        return f"{files}, largest logit difference from PyTorch {self.difference:.1e}{half} → {self.output}"


def run(params: Params, output: Path = EXPORT, repository: Path = REPOSITORY) -> Result:
    """Export, compare with PyTorch, write export folder and model repository.

    The manifest is signed if TAILOR_SIGNING_KEY names a private key. Raises StageError when the comparison fails, and
    InputError for a key that cannot be used, before the export starts.
    """
    key = signing_key()
    if params.segmentation:
        return _export_segmentation(params, output, repository, key)
    prior, calibration, sets = load_prior(), load_calibration(params), load_sets(params)
    decision, unknown = decision_defaults(params.serving, prior), load_unknown(params)
    taxonomy = taxonomy_tree(params.serving)
    student, stage = student_folder(params)
    model, config = load_model(student, stage)
    check_image(config, params.image, student)
    attach_encoder(model, config, params, student)
    image, serving = params.image, params.serving
    held_out = evaluation_images(params, "validation")
    examples = held_out if len(held_out) else evaluation_images(params, "train")
    shift, explain = prior.balanced_shift(config.adjustment).tolist(), serving.explain
    if explain.map:
        check_map(model)
    served = ServedStudent(model, image.mean, image.std, prior.log_prior, shift, with_map=explain.map).eval()
    trained = TrainedNetwork(model, image, prior.log_prior, shift)
    with whole_folder(output) as folder:
        session, difference, half = _write_graph(folder / ONNX_NAME, served, trained, examples, params)
        chosen = _golden_images(examples, params)
        golden = golden_requests(
            session, examples, chosen, top_k(serving, prior), golden_tolerance(half, calibration), prior, calibration
        )
        write_json(folder / GOLDEN_NAME, [answer.model_dump(exclude_defaults=True) for answer in golden])
        metrics = json.loads((EVALUATION / "metrics.json").read_text(encoding="utf-8"))["student"]
        facts = model_facts(
            params.teacher, params.student, image.size, serving.strength, prior, config.encoder, config.memory,
            config.second_stage,
        )  # fmt: skip
        card = model_card(params.data, network_name(params), params.seed, facts, prior, metrics)
        write_file(folder / CARD_NAME, card)
        reasons = None
        if explain.images or explain.map:
            reasons = write_explanations(folder, session, model, evaluation_images(params, "train"), explain)
        manifest = build_manifest(
            folder, params, prior, model, metrics, half, config, calibration, sets, decision, unknown, taxonomy=taxonomy,
            explain=reasons,
        )  # fmt: skip
        write_file(folder / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")
        if key:
            write_file(folder / SIGNATURE_NAME, sign_manifest(folder, key).text())
    write_repository(output, repository)
    record_after_stage("export", params, output)
    return Result(difference, manifest, output, half)


def _golden_images(examples: AnyImages, params: Params) -> list[int]:
    """Indices of the images of the golden requests: the first ones in random order that the server accepts."""
    serving = params.serving
    order = np.random.default_rng(params.data.seed).permutation(len(examples)).tolist()
    usable = (index for index in order if _is_served(examples.encoded(index), params.image.resize_to, serving))
    chosen = list(islice(usable, params.export.golden))
    if not chosen:
        raise StageError(
            f"serving.image_pixels is {serving.image_pixels} and serving.request_pixels {serving.request_pixels}; every "
            "validation image has more pixels than one of them allows, so no golden request can be made; raise them"
        )
    return chosen


def _write_graph(
    path: Path, served: ServedStudent, trained: TrainedNetwork, examples: AnyImages, params: Params
) -> tuple[InferenceSession, float, Parity | None]:
    """Write the graph and check it against PyTorch; returns its session, the largest logit difference, effects of float16."""
    export, size = params.export, params.image.size
    if export.precision == "float16":
        graph = to_float16(served, size, export.opset)
        write_file(path, graph.served)
        session = open_session(path)
        half = check_float16(graph, (session, open_session(graph.rounding)), trained, examples, export, params.seed)
        return session, half.logit, half
    try:
        write_file(path, to_onnx(served, size, export.opset))
    except NoFeatureMapError as error:
        raise StageError(f"serving.explain.map is true, but {error}; {NO_MAP}") from None
    session = open_session(path)
    return session, check_parity(session, trained, examples, export, params.seed), None


def _export_segmentation(params: Params, output: Path, repository: Path, key: Ed25519PrivateKey | None) -> Result:
    """As `run`, for task segmentation: one graph from the canvas to the class map."""
    prior = load_prior()
    model, config = load_model(STUDENT, "student")
    check_image(config, params.image, STUDENT)
    check_canvas(config, params, STUDENT)
    image, export, canvas = params.image, params.export, params.segmentation.canvas
    log_prior, shift = np.array(prior.log_prior), prior.balanced_shift(config.adjustment)
    held_out = LabelMapSplit(params, "validation")
    examples = held_out if len(held_out) else LabelMapSplit(params, "train")
    served = ServedSegmenter(model, image.mean, image.std, canvas, shift.tolist()).eval()
    with whole_folder(output) as folder:
        path = folder / ONNX_NAME
        write_file(path, segmentation.to_onnx(served, len(prior.classes), export.opset))
        session = open_session(path)
        difference = segmentation.check_parity(session, model, examples, image, log_prior, shift, export, params.seed)
        golden = segmentation.golden_requests(
            session, examples, export.golden, log_prior, top_k(params.serving, prior), params.data.seed
        )
        write_json(folder / GOLDEN_NAME, [answer.model_dump(exclude_defaults=True) for answer in golden])
        metrics = json.loads((EVALUATION / "metrics.json").read_text(encoding="utf-8"))["student"]
        write_file(folder / CARD_NAME, segmentation.model_card(params, prior, metrics))
        cells = session.run(["logits"], segmentation.blank(canvas, len(prior.classes)))[0].shape[2:]
        form = SegmentationFormat(height=canvas[0], width=canvas[1], fill=fill_colour(image.mean), cells=cells)
        manifest = build_manifest(folder, params, prior, model, metrics, None, config, segmentation=form)
        write_file(folder / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")
        if key:
            write_file(folder / SIGNATURE_NAME, sign_manifest(folder, key).text())
    write_repository(output, repository)
    return Result(difference, manifest, output)


def _is_served(data: bytes, resize_to: int, serving: ServingParams) -> bool:
    """Whether the classifier decodes an image: serving.image_pixels can be below the limit of training."""
    limit = min(serving.image_pixels, serving.request_pixels)

    def allow(pixels: int) -> None:
        if pixels > limit:
            raise ImageError("pixels", "is above the limit")

    try:
        decode(data, resize_to, allow=allow)
    except ImageError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(stage_main(run, "Export the student to ONNX, check it, and write the Triton model repository."))
