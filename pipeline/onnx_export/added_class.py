"""Add a class to an exported release without training: a prototype as one more row of the cosine classifier."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from models.preprocess import ImageError
from models.prior import class_key, class_names_problem, shot_group
from pipeline.data.assignment import SPLITS
from pipeline.data.class_prior import Prior
from pipeline.data.dataset import evaluation_images
from pipeline.data.split_tables import load_classes, read_split, read_taxonomy_file
from pipeline.evaluation.intervals import wilson
from pipeline.evaluation.metrics import mean_of, per_class_accuracy
from pipeline.evaluation.network_metrics import network_metrics
from pipeline.ingestion.ingest import ingest
from pipeline.onnx_export.larger_release import (
    append_class,
    check_old_logits,
    extended_manifest,
    run_graph,
    write_export,
)
from pipeline.onnx_export.release import open_session
from pipeline.params import IngestParams, Params
from pipeline.shared.artifacts import PRIOR, whole_folder, write_file, write_json
from pipeline.shared.errors import DataError, ParamsError, StageError
from pipeline.sources import BadImageError, Ingested
from pipeline.sources.source import read_image_file
from serving.repository.manifest import STUDENT_NAME, Manifest
from serving.repository.version_policy import present_versions
from serving.repository.writer import load_export, write_repository
from serving.shared.terminal import counted

EXPORT_NAME, REPOSITORY_NAME, EVIDENCE_NAME = "export", "repository", "evidence"
DECISION_NAME, PREDICTIONS_NAME = "decision.json", "predictions.parquet"
GOLDEN_IMAGES = 2  # golden requests with images of the new class


@dataclass(frozen=True)
class Rules:
    """Rules of the gate. held_out: images of the new class that are tested. margin: largest fall of the old classes'
    balanced accuracy on the test split. floor: least share of the held-out images that are recognised.
    """

    held_out: int = 5
    margin: float = 0.01
    floor: float = 0.5


@dataclass(frozen=True)
class AddedClass:
    """Result. before, after: balanced accuracy of the old classes. recognised: of the held-out images. images: of the
    prototype. skipped: file → reason. ingested: report of the ingest; empty if the gate refused.
    """

    name: str
    promote: bool
    reasons: list[str]
    before: float
    after: float
    images: int
    held_out: int
    recognised: int
    version: int
    output: str
    ingested: str = ""
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        verdict = "added" if self.promote else "refused"
        return f"class {self.name!r} {verdict}: {'; '.join(self.reasons)} → {self.output}"


def add_class(
    params: Params, name: str, files: Sequence[Path], export: Path, output: Path, rules: Rules, seed: int = 0
) -> AddedClass:
    """Add the class of these images to the release in `export`; writes decision.json, and if the gate passes the new release.

    The prototype is the mean of the unit features of the images that are not held out; its logit is its cosine / tau_s. The
    classes are in the order that the next retraining gives them. If the gate passes, `output` has the export and a
    repository of its own (all versions of a repository have the same classes), and all images are ingested. Raises
    ParamsError or DataError for a name or images that cannot be used, StageError for a release of another kind.
    """
    manifest, session = load_export(export), open_session(export / STUDENT_NAME)
    name, classes = class_key(name), load_classes()
    _check_name(name, manifest, classes)
    images, skipped = _read_images(files, manifest)
    if len(images) < 2:
        reason = f" ({next(iter(skipped.values()))})" if skipped else ""
        raise DataError(f"{counted(len(images), 'usable image')} of class {name!r}{reason}; expected at least 2")
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    held = order[: min(rules.held_out, len(order) // 2)]
    pixels = np.stack([image.pixels for image in images])
    features = run_graph(session, "feature", pixels[order[len(held) :]], manifest)
    prototype = _unit(features.mean(0))
    position = _position(name, classes)
    classes.insert(position, name)
    taxonomy = read_taxonomy_file(params.data.taxonomy, classes)
    extended = extended_manifest(manifest, params.prior.smoothing, name, position, len(order) - len(held), taxonomy)
    graph = append_class(export / STUDENT_NAME, prototype / manifest.tau_s, position, extended.log_prior)
    larger = open_session(graph)
    test = evaluation_images(params, "test")
    if not len(test):
        raise DataError("data/split/test.parquet: holds no images, so that the old classes cannot be tested")
    batches = test.batches(torch.arange(len(test)), manifest.max_batch_size)
    logits = np.concatenate([run_graph(larger, "logits", part.numpy(), manifest) for part in batches])
    labels = test.labels.numpy() + (test.labels.numpy() >= position)
    check_old_logits(session, larger, pixels, position, manifest)
    held_logits = run_graph(larger, "logits", pixels[held], manifest)
    version = _next_version(manifest, Path(params.retrain.repository))
    result = _decide(name, rules, logits, labels, position, held_logits) | {
        "images": len(order) - len(held), "skipped": {str(path): reason for path, reason in skipped.items()},
        "version": version,
    }  # fmt: skip
    with whole_folder(output) as folder:
        write_json(folder / DECISION_NAME, result | {"rules": asdict(rules)})
        if result["promote"]:
            all_labels = np.append(labels, [position] * len(held))
            prior = _prior(extended)
            metrics = network_metrics(np.concatenate([logits, held_logits]), all_labels, prior, params.evaluate)
            final = extended.model_copy(update={"metrics": metrics, "version": version})
            examples = [images[index].data for index in held[:GOLDEN_IMAGES]]
            added = {
                "position": position, "name": name, "row": prototype / manifest.tau_s, "features": features,
            }  # fmt: skip
            write_export(folder / EXPORT_NAME, export, graph, final, examples, result, added)
            _write_evidence(folder, prior, test.sample_ids, labels, logits)
            write_repository(folder / EXPORT_NAME, folder / REPOSITORY_NAME, evidence=folder / EVIDENCE_NAME)
    report = _ingest(params, name, images) if result["promote"] else ""
    return AddedClass(**result, output=str(output), ingested=report)


@dataclass(frozen=True)
class _Image:
    path: Path
    data: bytes
    pixels: np.ndarray


def _read_images(files: Sequence[Path], manifest: Manifest) -> tuple[list[_Image], dict[Path, str]]:
    """Decode the files as the server does; skipped are unreadable files, copies, and images of the data set."""
    seen = {
        digest: f"is an image of the {split} split"
        for split in SPLITS
        for digest in read_split(split, ["sha256"]).column("sha256").to_pylist()
    }
    images, skipped = [], {}
    for path in files:
        try:
            data = read_image_file(path)
            digest = hashlib.sha256(data).hexdigest()
            if digest in seen:
                skipped[path] = seen[digest]
                continue
            images.append(_Image(path, data, manifest.image.pixels(data)))
            seen[digest] = "is a copy of another file"
        except (BadImageError, ImageError) as error:
            skipped[path] = str(error)
    return images, skipped


def _check_name(name: str, manifest: Manifest, classes: list[str]) -> None:
    if classes != [class_key(each) for each in manifest.classes]:
        raise StageError("the release has other classes than data/split/classes.json; run `dvc repro` first")
    if name in classes:
        raise ParamsError(f"{name!r} is a class already; put the images into the drop folder and run `tailor ingest`")
    if problem := class_names_problem([*classes, name]):
        raise ParamsError(problem)
    if not name.isprintable() or name.strip() != name:
        raise ParamsError(f"class name {name[:40]!r}: expected printable text without spaces around it")


def _position(name: str, classes: list[str]) -> int:
    """Number of the new class: ingested new classes follow those of the source, sorted by name, also after a retraining."""
    added = set(Ingested().new_classes)
    first = len(classes)
    while first and classes[first - 1] in added:
        first -= 1
    return first + sorted([*classes[first:], name]).index(name)


def _next_version(manifest: Manifest, repository: Path) -> int:
    """Version after that of the release and those of the repository of promoted versions."""
    promoted = present_versions(repository) if repository.is_dir() else []
    return max([manifest.version, *promoted]) + 1


def _prior(manifest: Manifest) -> Prior:
    p = np.exp(manifest.log_prior).tolist()
    groups = [shot_group(count) for count in manifest.counts]
    return Prior(manifest.classes, manifest.counts, p, manifest.log_prior, groups)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _decide(
    name: str, rules: Rules, logits: np.ndarray, labels: np.ndarray, position: int, held: np.ndarray
) -> dict[str, Any]:
    """Compare the old classes without and with the new one, and test the held-out images of the new one."""
    classes = logits.shape[1]
    without = logits.copy()
    without[:, position] = -np.inf
    before, after = (mean_of(per_class_accuracy(each.argmax(1), labels, classes)) or 0.0 for each in (without, logits))
    recognised = int((held.argmax(1) == position).sum())
    estimate = wilson(recognised, len(held))
    taken = counted(int((logits.argmax(1) == position).sum()), "test image")
    reasons = [
        f"old classes {before:.1%} → {after:.1%} ({taken} of theirs predicted as {name!r}; margin {rules.margin:.1%})",
        f"{recognised} of {counted(len(held), 'held-out image')} recognised (95 % interval {estimate.low:.0%} to "
        f"{estimate.high:.0%}; floor {rules.floor:.0%})",
    ]
    promote = before - after <= rules.margin and recognised >= rules.floor * len(held)
    return {
        "name": name, "promote": promote, "reasons": reasons, "before": before, "after": after,
        "held_out": len(held), "recognised": recognised,
    }  # fmt: skip


def _write_evidence(
    folder: Path, prior: Prior, sample_ids: Sequence[str], labels: np.ndarray, logits: np.ndarray
) -> None:
    """Write what a release rests on: the decision, the class prior and the test predictions, as a retraining does."""
    evidence = folder / EVIDENCE_NAME
    evidence.mkdir()
    shutil.copyfile(folder / DECISION_NAME, evidence / DECISION_NAME)
    write_json(evidence / PRIOR.name, asdict(prior))
    columns = {"sample_id": list(sample_ids), "label": labels}
    columns["logits"] = pa.array(list(logits), type=pa.list_(pa.float32()))
    pyarrow.parquet.write_table(pa.table(columns), evidence / PREDICTIONS_NAME)


def _ingest(params: Params, name: str, images: list[_Image]) -> str:
    """Add all images to the data set as rows of the new class, for the next retraining; the given files stay."""
    with tempfile.TemporaryDirectory() as folder:
        drop = Path(folder)
        (drop / "images").mkdir()
        names = [f"images/{number:06d}{image.path.suffix.lower()}" for number, image in enumerate(images)]
        for path, image in zip(names, images, strict=True):
            write_file(drop / path, image.data)
        # Not a folder per class, whose name cannot be every class name; not CSV, in which a class 7 would be a number.
        table = pa.table({"path": names, "label": [name] * len(names)})
        pyarrow.parquet.write_table(table, drop / "labels.parquet")
        changes = {
            "settle_seconds": 0.0, "require_marker": False, "new_classes": [name], "min_good_share": 0.0,
            "columns": {"label": "label", "path": "path", "image": "image"},
        }  # fmt: skip
        section = IngestParams.model_validate(params.ingest.model_dump(mode="json") | changes)
        return str(ingest(params.model_copy(update={"ingest": section}), drop))
