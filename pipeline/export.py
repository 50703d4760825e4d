"""Stage `export`: the student as one checked ONNX file, its manifest and the Triton model repository."""

from __future__ import annotations

import base64
import json
import os
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from models.cosine_classifier import ImageClassifier
from models.preprocess import ROOM, ImageError, decode
from models.prior import softmax
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
from pipeline.dataset import AnyImages, evaluation_images
from pipeline.errors import StageError
from pipeline.fingerprint import code_sha256
from pipeline.half_graph import to_half
from pipeline.lineage import code_revision, data_sha256
from pipeline.model_card import model_card, model_facts
from pipeline.onnx_graph import ServedStudent, to_onnx
from pipeline.params import Params, ServingParams
from pipeline.parity import Parity, TrainedNetwork, check_half, check_parity
from pipeline.prior import Prior, load_prior
from pipeline.stage import stage_main
from pipeline.tracking import record_after_stage
from serving.manifest import (
    GOLDEN_NAME,
    GOLDEN_TOLERANCE,
    MANIFEST_NAME,
    Golden,
    HalfPrecision,
    ImageFormat,
    Limits,
    Manifest,
    sha256_of,
)
from serving.repository import write_repository
from serving.terminal import counted

if TYPE_CHECKING:
    import onnxruntime

ONNX_NAME = "student.onnx"
CARD_NAME = "model_card.md"
VERSION = 1
LARGEST_TOLERANCE = 0.1  # of a golden probability: what tells a wrong graph from a rounded one


@dataclass(frozen=True)
class Result:
    """difference: the largest seen between ONNX Runtime and PyTorch, of a logit. half: what else float16 changes."""

    difference: float
    manifest: Manifest
    output: Path
    half: Parity | None = None

    def __str__(self) -> str:
        found = (
            f"{counted(len(self.manifest.files), 'file')}, largest logit difference from PyTorch {self.difference:.1e}"
        )
        return f"{found}{f', in float16 {self.half}' if self.half else ''} → {self.output}"


def run(params: Params, output: Path = EXPORT, repository: Path = REPOSITORY) -> Result:
    """Export, check against PyTorch, write export folder and model repository. Raises StageError when the check fails."""
    prior = load_prior()
    model, config = load_model(STUDENT, "student")
    check_image(config, params.image, STUDENT)
    image, export, serving = params.image, params.export, params.serving
    held_out = evaluation_images(params, "validation")
    examples = held_out if len(held_out) else evaluation_images(params, "train")
    shift = prior.balanced_shift(config.adjustment).tolist()
    served = ServedStudent(model, image.mean, image.std, prior.log_prior, shift).eval()
    trained = TrainedNetwork(model, image, prior.log_prior, shift)
    with whole_folder(output) as folder:
        path, half = folder / ONNX_NAME, None
        if export.precision == "float16":
            graph = to_half(served, image.size, export.opset)
            write_file(path, graph.served)
            session = open_session(path)
            sessions = session, open_session(graph.rounding)
            half = check_half(graph, sessions, trained, examples, export, params.seed)
            difference = half.logit
        else:
            write_file(path, to_onnx(served, image.size, export.opset))
            session = open_session(path)
            difference = check_parity(session, trained, examples, export, params.seed)
        order = np.random.default_rng(params.data.seed).permutation(len(examples)).tolist()
        usable = (index for index in order if _is_served(examples.encoded(index), image.resize_to, serving))
        chosen = list(islice(usable, export.golden))
        if not chosen:
            raise StageError(
                f"serving.image_pixels is {serving.image_pixels}, and every validation image has more; give a larger one"
            )
        golden = golden_answers(session, examples, chosen, top_k(serving, prior), golden_tolerance(half))
        write_json(folder / GOLDEN_NAME, [answer.model_dump(exclude_defaults=True) for answer in golden])
        metrics = json.loads((EVALUATION / "metrics.json").read_text(encoding="utf-8"))["student"]
        facts = model_facts(params.teacher, params.student, image.size, serving.strength, prior)
        card = model_card(params.data, params.student.backbone, params.seed, facts, prior, metrics)
        write_file(folder / CARD_NAME, card)
        manifest = build_manifest(folder, params, prior, model, metrics, half)
        write_file(folder / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")
    write_repository(output, repository)
    record_after_stage("export", params, output)
    return Result(difference, manifest, output, half)


def open_session(graph: Path | bytes) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU over a graph, in a file or in memory, that passes ONNX's own checker."""
    # Its package would otherwise write a telemetry file under the user's cache folder; read when it is first imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    model = onnx.load_from_string(graph) if isinstance(graph, bytes) else onnx.load(graph)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


def golden_tolerance(half: Parity | None) -> float:
    """How far a probability may be from a golden one: where the graph is float16, a GPU rounds what a CPU does not.

    Both are within half.logit of PyTorch. Logits that each move by d move a probability by d/2 at most.
    """
    return min(GOLDEN_TOLERANCE + half.logit, LARGEST_TOLERANCE) if half else GOLDEN_TOLERANCE


def top_k(serving: ServingParams, prior: Prior) -> int:
    """Answers per image: serving.top_k, or all classes where there are fewer."""
    return min(serving.top_k, len(prior.classes))


def golden_answers(
    session: onnxruntime.InferenceSession, examples: AnyImages, chosen: list[int], best: int, tolerance: float
) -> list[Golden]:
    """Requests with known answers: the chosen images at strength 0 and 1 in turn, answered by ONNX Runtime."""
    golden = []
    for number, example in enumerate(chosen):
        strength = float(number % 2)
        pixels = examples.pixels(torch.tensor([example])).numpy()
        logits = session.run(["logits"], {"image": pixels, "strength": np.array([[strength]], dtype=np.float32)})[0][0]
        probability = softmax(logits)
        index = np.argsort(-probability, kind="stable")[:best]
        golden.append(
            Golden(
                image=base64.b64encode(examples.encoded(example)).decode(),
                strength=strength,
                index=index.tolist(),
                probability=probability[index].tolist(),
                tolerance=tolerance,
            )
        )
    return golden


def _is_served(data: bytes, resize_to: int, serving: ServingParams) -> bool:
    """Whether the classifier decodes an image: serving.image_pixels bounds it, above what training reads."""
    most = min(serving.image_pixels, serving.request_pixels)

    def allow(pixels: int) -> None:
        if pixels > most:
            raise ImageError("pixels", "is above the limit")

    try:
        decode(data, resize_to, allow=allow)
    except ImageError:
        return False
    return True


def build_manifest(
    folder: Path, params: Params, prior: Prior, model: ImageClassifier, metrics: dict[str, Any], half: Parity | None
) -> Manifest:
    """The release's manifest over the files already in the folder."""
    return Manifest(
        version=VERSION,
        classes=prior.classes,
        counts=prior.counts,
        log_prior=prior.log_prior,
        image=ImageFormat(size=params.image.size, resize_to=params.image.resize_to, room=ROOM),
        feature_dim=model.feature_dim,
        tau_s=model.tau_s,
        strength=params.serving.strength,
        top_k=top_k(params.serving, prior),
        max_batch_size=params.export.max_batch_size,
        files={path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        params_sha256=sha256_of_json(params.model_dump(mode="json")),
        data_sha256=data_sha256(SPLIT),
        code_revision=code_revision(),
        code_sha256=code_sha256(),
        versions={name: version(name) for name in ("tailor", "torch", "onnx", "onnxruntime")},
        metrics=metrics,
        half=HalfPrecision(**asdict(half)) if half else None,
        limits=Limits(image_pixels=params.serving.image_pixels, request_pixels=params.serving.request_pixels),
    )


if __name__ == "__main__":
    sys.exit(stage_main(run, "Export the student to ONNX, check it, and write the Triton model repository."))
