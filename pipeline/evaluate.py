"""Stage `evaluate`: teacher and student on the test split, for both target priors; writes artifacts/evaluation/."""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from models.cosine_classifier import ImageClassifier
from pipeline.artifacts import EVALUATION, STUDENT, TEACHER, whole_folder, write_file, write_json
from pipeline.checkpoint import check_image, load_model
from pipeline.dataset import Images, load_images
from pipeline.errors import DataError
from pipeline.inference import outputs
from pipeline.metrics import answers, evaluate_answers, per_class_accuracy
from pipeline.params import Params
from pipeline.prior import Prior, load_prior
from pipeline.ranks import choose_device
from pipeline.report import render_report
from pipeline.stage import stage_main

TARGET_PRIORS = {"balanced": 0.0, "train": 1.0}


@dataclass(frozen=True)
class Result:
    """metrics.json: network, then target prior, then metric."""

    metrics: dict[str, Any]
    output: Path

    def __str__(self) -> str:
        scores = [
            f"{network} {self.metrics[network]['balanced']['balanced_accuracy']:.1%}"
            for network in ("teacher", "student")
        ]
        return f"balanced accuracy {', '.join(scores)} → {self.output}/report.html"


def run(params: Params, output: Path = EVALUATION) -> Result:
    """Evaluate both networks on the test split, the only stage that reads it. Raises DataError when it is empty."""
    prior, test = load_prior(), load_images(params, "test")
    if len(test) == 0:
        raise DataError(
            "data/split/test.parquet: holds no images; set data.test_per_class or give the source a test split"
        )
    device, labels = choose_device(params.device), test.labels.numpy()
    logits = {}
    for name, folder in (("teacher", TEACHER), ("student", STUDENT)):
        model, config = load_model(folder, name)
        check_image(config, params.image, folder)
        logits[name] = _logits(model, test, params, device)
    found = {name: _answers(values, prior) for name, values in logits.items()}
    metrics = {name: _metrics(by_prior, labels, prior, params) for name, by_prior in found.items()}
    chosen = choose_samples(found["student"], params.evaluate.samples, params.data.seed)
    with whole_folder(output) as folder:
        write_json(folder / "metrics.json", metrics)
        classes = _per_class(found, labels, prior)
        write_file(folder / "per_class.csv", _csv(classes))
        predicted = found["student"]["balanced"].argmax(1)
        pairs = [
            {"actual": prior.classes[a], "predicted": prior.classes[b]} for a, b in zip(labels, predicted, strict=True)
        ]
        write_file(folder / "confusion.csv", _csv(pairs))
        pyarrow.parquet.write_table(
            _predictions(test, found["student"], logits["student"]), folder / "predictions.parquet"
        )
        samples = _write_samples(folder / "samples", test, chosen, found["student"], prior.classes)
        write_file(folder / "report.html", render_report(metrics, classes, samples, params))
    return Result(metrics, output)


def _logits(model: ImageClassifier, test: Images, params: Params, device: torch.device) -> np.ndarray:
    model = model.to(device, memory_format=torch.channels_last)
    return outputs(model, test.images, params.image, device)[1].numpy()


def choose_samples(found: dict[str, np.ndarray], wanted: int, seed: int) -> list[int]:
    """Test images to keep as files: up to half of them where the two target priors disagree, the rest drawn from all."""
    disagree = np.flatnonzero(found["balanced"].argmax(1) != found["train"].argmax(1))
    generator = np.random.default_rng(seed)
    first = generator.permutation(disagree)[: (wanted + 1) // 2].tolist()
    others = np.setdiff1d(np.arange(len(found["balanced"])), first)
    return sorted(first + generator.permutation(others)[: wanted - len(first)].tolist())


def _answers(logits: np.ndarray, prior: Prior) -> dict[str, np.ndarray]:
    log_prior = np.array(prior.log_prior)
    return {name: answers(logits, log_prior, strength) for name, strength in TARGET_PRIORS.items()}


def _metrics(found: dict[str, np.ndarray], labels: np.ndarray, prior: Prior, params: Params) -> dict[str, Any]:
    classes = len(prior.classes)
    targets = {"balanced": np.full(classes, 1 / classes), "train": np.array(prior.p)}
    bins, top_k = params.evaluate.ece_bins, params.evaluate.top_k
    return {
        name: evaluate_answers(found[name], labels, prior.groups, targets[name], bins=bins, top_k=top_k)
        for name in TARGET_PRIORS
    }


def _per_class(found: dict[str, dict[str, np.ndarray]], labels: np.ndarray, prior: Prior) -> list[dict[str, Any]]:
    accuracies = {
        f"{network}_{name}": per_class_accuracy(probabilities.argmax(1), labels, len(prior.classes))
        for network, by_prior in found.items()
        for name, probabilities in by_prior.items()
    }
    tested = np.bincount(labels, minlength=len(prior.classes))
    return [
        {
            "class": name,
            "group": prior.groups[c],
            "train_count": prior.counts[c],
            "test_count": int(tested[c]),
            **{key: values[c] for key, values in accuracies.items()},
        }
        for c, name in enumerate(prior.classes)
    ]


def _predictions(test: Images, found: dict[str, np.ndarray], logits: np.ndarray) -> pa.Table:
    columns: dict[str, Any] = {"sample_id": test.sample_ids, "label": test.labels.numpy()}
    for name, probabilities in found.items():
        columns[f"predicted_{name}"] = probabilities.argmax(1)
        columns[f"probability_{name}"] = probabilities.max(1)
    columns["logits"] = pa.array(list(logits), type=pa.list_(pa.float32()))
    return pa.table(columns)


def _write_samples(
    folder: Path, test: Images, chosen: list[int], found: dict[str, np.ndarray], classes: list[str]
) -> list[dict[str, Any]]:
    folder.mkdir()
    samples = []
    for number, index in enumerate(chosen):
        data = test.encoded(index)
        suffix = {b"\x89PNG": "png", b"RIFF": "webp"}.get(data[:4], "jpg")
        name = f"{number:03d}.{suffix}"
        write_file(folder / name, data)
        answered = {prior: classes[int(values[index].argmax())] for prior, values in found.items()}
        samples.append({"file": name, "label": classes[int(test.labels[index])], **answered})
    write_file(folder / "samples.csv", _csv([{"file": s["file"], "label": s["label"]} for s in samples]))
    return [{**sample, "bytes": test.encoded(index)} for sample, index in zip(samples, chosen, strict=True)]


def _csv(rows: list[dict[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


if __name__ == "__main__":
    sys.exit(stage_main(run, "Evaluate teacher and student on the test split."))
