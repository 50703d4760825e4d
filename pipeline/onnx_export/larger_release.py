"""Graph, manifest and export folder of a release with one more class, from those of the release without it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from models.prior import log_class_prior
from models.taxonomy import Taxonomy
from pipeline.onnx_export.explanations import with_class, write_arrays
from pipeline.onnx_export.release import open_session
from pipeline.shared.artifacts import write_file, write_json
from pipeline.shared.errors import StageError
from pipeline.shared.fingerprint import code_sha256
from pipeline.shared.lineage import code_revision
from serving.repository.manifest import (
    EXPLAIN_NAME,
    GOLDEN_NAME,
    MANIFEST_NAME,
    STUDENT_NAME,
    Golden,
    Manifest,
    TaxonomyTree,
    load_golden,
    served_probabilities,
    sha256_of,
)
from serving.repository.signature import SIGNATURE_NAME, sign_manifest
from serving.repository.signing_keys import signing_key
from serving.repository.writer import runtime_sha256

HEAD = CLASS_MATRIX, CLASS_BIAS, LOG_PRIOR = "class_matrix", "class_bias", "log_prior"  # buffers of ServedStudent
CARD_NAME = "model_card.md"
TOLERANCE = 2e-4  # largest difference of an old class's logit, as export.tolerance


def append_class(graph: Path, row: np.ndarray, position: int, log_prior: Sequence[float]) -> bytes:
    """The served graph with one more class at `position`. row: [D], its row of the class matrix.

    Raises StageError for a graph without a class matrix, which has a memory or the head of a second stage.
    """
    model = onnx.load(graph)
    initialisers = {tensor.name: tensor for tensor in model.graph.initializer}
    values = {name: numpy_helper.to_array(initialisers[name]) for name in HEAD if name in initialisers}
    matrix = values.get(CLASS_MATRIX)
    readers = [node.op_type for node in model.graph.node if CLASS_MATRIX in node.input]
    if matrix is None or matrix.shape[1:] != row.shape or readers != ["Gemm"] or LOG_PRIOR not in values:
        raise StageError(
            f"{graph}: has no cosine classifier of one row per class (a memory, a second stage or another head has none); "
            "ingest the images and retrain instead"
        )
    new = {CLASS_MATRIX: np.insert(matrix, position, row, axis=0), LOG_PRIOR: np.asarray(log_prior)}
    if CLASS_BIAS in values:  # the bias makes logits balanced that were trained without adjustment; neutral: its mean
        new[CLASS_BIAS] = np.insert(values[CLASS_BIAS], position, values[CLASS_BIAS].mean())
    for name, value in new.items():
        initialisers[name].CopyFrom(numpy_helper.from_array(value.astype(values[name].dtype), name))
    del model.graph.value_info[:]  # shapes of inner values, which are inferred again
    for value in model.graph.output:
        if value.name == "logits":
            value.type.tensor_type.shape.dim[1].dim_value = len(new[CLASS_MATRIX])
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def extended_manifest(
    manifest: Manifest, smoothing: float, name: str, position: int, count: int, taxonomy: Taxonomy | None
) -> Manifest:
    """The manifest with the class at `position`, its number of images, and the class prior with it.

    taxonomy: of all classes with the new one, or None. Raises StageError for a default cost matrix, which has no costs of
    the class; a cost per class is 1.
    """
    classes, counts = list(manifest.classes), list(manifest.counts)
    classes.insert(position, name)
    counts.insert(position, count)
    changes: dict[str, Any] = {"classes": classes, "counts": counts}
    changes["log_prior"] = log_class_prior(counts, smoothing).tolist()
    if manifest.sets:  # a class without validation scores has the quantile of all classes
        scores = list(manifest.sets.scores)
        scores.insert(position, [])
        changes["sets"] = manifest.sets.model_copy(update={"scores": scores})
    if manifest.decision and manifest.decision.costs:
        costs: list[Any] = list(manifest.decision.costs)
        if isinstance(costs[0], list):
            raise StageError(
                "serving.costs is a matrix, in which the new class has no costs; set it to null and export again"
            )
        costs.insert(position, 1.0)
        changes["decision"] = manifest.decision.model_copy(update={"costs": costs})
    if taxonomy:
        level = manifest.taxonomy.level if manifest.taxonomy else None
        changes["taxonomy"] = TaxonomyTree(names=taxonomy.names, parents=taxonomy.parents, level=level)
    return manifest.model_copy(update=changes)


def check_old_logits(session: Any, larger: Any, pixels: np.ndarray, position: int, manifest: Manifest) -> None:
    """Raise StageError unless the logits of the old classes are those of the old graph."""
    old = run_graph(session, "logits", pixels[: manifest.max_batch_size], manifest)
    new = np.delete(run_graph(larger, "logits", pixels[: manifest.max_batch_size], manifest), position, axis=1)
    if not np.abs(old - new).max() <= TOLERANCE:
        raise StageError(f"a logit of an old class differs by {np.abs(old - new).max():.1e} after the class was added")


def write_export(
    folder: Path,
    export: Path,
    graph: bytes,
    manifest: Manifest,
    examples: list[bytes],
    decision: dict[str, Any],
    added: dict[str, Any],
) -> None:
    """Write the export folder of the larger release: graph, golden requests, card, manifest, signature if a key is set.

    added: arguments of `with_class` for the feature index of a release that has one.
    """
    folder.mkdir()
    write_file(folder / STUDENT_NAME, graph)
    session = open_session(folder / STUDENT_NAME)
    requests = [(answer.image_bytes(), answer.strength, answer.tolerance) for answer in load_golden(export)]
    requests += [(data, float(number % 2), requests[0][2]) for number, data in enumerate(examples)]
    golden = [_golden(session, *request, manifest) for request in requests]
    write_json(folder / GOLDEN_NAME, [answer.model_dump(exclude_defaults=True) for answer in golden])
    card = (export / CARD_NAME).read_text(encoding="utf-8")
    note = f"\n## Class added without training\n\n{decision['name']}: {'; '.join(decision['reasons'])}.\n"
    write_file(folder / CARD_NAME, card.rstrip("\n") + "\n" + note)
    explain = None
    if manifest.explain:
        explain = write_arrays(folder, with_class(export / EXPLAIN_NAME, **added), manifest.explain.map)
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    changes: dict[str, Any] = {
        "explain": explain,
        "files": files, "runtime": runtime_sha256(), "code_revision": code_revision(), "code_sha256": code_sha256(),
    }  # fmt: skip
    write_file(folder / MANIFEST_NAME, manifest.model_copy(update=changes).model_dump_json(indent=2) + "\n")
    if key := signing_key():
        write_file(folder / SIGNATURE_NAME, sign_manifest(folder, key).text())


def _golden(session: Any, data: bytes, strength: float, tolerance: float, manifest: Manifest) -> Golden:
    logits = run_graph(session, "logits", manifest.image.pixels(data)[None], manifest, strength)[0]
    probability = served_probabilities(logits, strength, manifest.log_prior, manifest.calibration)
    index = np.argsort(-probability, kind="stable")[: manifest.top_k]
    return Golden(
        image=base64.b64encode(data).decode(), strength=strength, index=index.tolist(),
        probability=probability[index].tolist(), tolerance=tolerance,
    )  # fmt: skip


def run_graph(session: Any, output: str, pixels: np.ndarray, manifest: Manifest, strength: float = 0.0) -> np.ndarray:
    """One output of the served graph, `logits` or `feature`, for pixels uint8 [N,3,H,W]."""
    parts = []
    for start in range(0, len(pixels), manifest.max_batch_size):
        part = pixels[start : start + manifest.max_batch_size]
        inputs = {"image": part, "strength": np.full((len(part), 1), strength, np.float32)}
        parts.append(session.run([output], inputs)[0])
    return np.concatenate(parts)
