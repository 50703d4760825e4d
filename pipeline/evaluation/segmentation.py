"""Evaluation of task segmentation: areas over the test split at several strengths, classes, the images with the lowest mIoU."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from models.segmentation.metrics import Areas
from pipeline.data.class_prior import Prior
from pipeline.model_io.checkpoint import check_canvas, check_image, load_model
from pipeline.model_io.inference import divergence_named
from pipeline.params import Params
from pipeline.segmentation.dataset import LabelMapSplit, read_pair
from pipeline.segmentation.inference import areas_by_adjustment, cell_logits, class_maps
from pipeline.segmentation.overlays import colour_text, data_uri, overlay
from pipeline.shared.artifacts import as_csv, write_file, write_json
from pipeline.shared.errors import DataError

# Served strengths of Fig. 2: 0 is the balanced prior, 1 the training prior. A network trained with L_cls of any strength
# acts at strength s like the paper's alpha = 1 - s.
STRENGTHS = (-1.0, -0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
TARGET_PRIORS = {"balanced": 0.0, "train": 1.0}


@dataclass
class SegmentationEvaluation:
    """Results on the test split.

    metrics: network → target prior → metric; the mIoU, mAcc and aAcc of `Areas.metrics`, in 0..1. curve: a row for each
    strength. classes: a row for each class. images: the areas of the student on each image at the strengths of
    TARGET_PRIORS. worst: images with the lowest mIoU at serving.strength, with pictures as data URIs.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    classes: list[dict[str, Any]] = field(default_factory=list)
    images: pa.Table | None = None
    worst: list[dict[str, Any]] = field(default_factory=list)

    def curve_figure(self) -> dict[str, Any]:
        """Plotly figure of the student's mIoU and mAcc by strength."""
        strengths = [row["strength"] for row in self.curve]
        lines = [
            {
                "type": "scatter", "mode": "lines+markers", "name": name, "x": strengths,
                "y": [row[f"student_{key}"] for row in self.curve], "line": {"dash": dash},
            }
            for name, key, dash in (("mIoU", "miou", "solid"), ("mAcc", "macc", "dash"))
        ]  # fmt: skip
        axes = {"xaxis": {"title": {"text": "strength"}}, "yaxis": {"tickformat": ".0%"}}
        return {"data": lines, "layout": {**axes, "height": 360, "margin": {"l": 56, "r": 12, "t": 12, "b": 52}}}

    def write(self, folder: Path) -> None:
        """Write metrics.json, a metrics file per network and target prior, per_class.csv, strength.csv, predictions.parquet."""
        write_json(folder / "metrics.json", self.metrics)
        for network, by_prior in self.metrics.items():
            for name, values in by_prior.items():
                write_json(folder / "metrics" / f"{network}_{name}.json", values)
        write_file(folder / "per_class.csv", as_csv(self.classes))
        write_file(folder / "plots" / "strength.csv", as_csv(self.curve))
        pyarrow.parquet.write_table(self.images, folder / "predictions.parquet")


def evaluate_networks(
    params: Params, prior: Prior, folders: dict[str, Path], device: torch.device
) -> SegmentationEvaluation:
    """Evaluate the networks in `folders`, by stage, on the test split. Raises DataError when the split is empty."""
    test = LabelMapSplit(params, "test")
    if not len(test):
        raise DataError(
            "data/split/test.parquet: holds no images; set data.test_per_class or give the source a test split"
        )
    strengths = sorted({*STRENGTHS, params.serving.strength})
    result, rows = SegmentationEvaluation(), [{"strength": s, "alpha": 1 - s} for s in strengths]
    classes = [
        {"class": name, "group": group, "train_pixels": count}
        for name, group, count in zip(prior.classes, prior.groups, prior.counts, strict=True)
    ]
    for name, folder in folders.items():
        model, added = load_network(params, folder, name, prior, strengths)
        with divergence_named(folder, name):
            totals, images = areas_by_adjustment(model.to(device), test, params.image, device, added)
        by_strength = dict(zip(strengths, totals, strict=True))
        result.metrics[name] = {
            target: by_strength[strength].metrics(prior.groups) for target, strength in TARGET_PRIORS.items()
        }
        for row, total in zip(rows, totals, strict=True):
            values = total.metrics()
            row |= {f"{name}_{key}": values[key] for key in ("miou", "macc", "aacc")}
        for target, strength in TARGET_PRIORS.items():
            _add_columns(classes, by_strength[strength], f"{name}_{target}")
        if name == "student":
            result.images = _areas_table(test.sample_ids, images, strengths)
            served = strengths.index(params.serving.strength)
            scores = [own[served].metrics()["miou"] for own in images]
            worst = sorted(range(len(scores)), key=lambda i: 2.0 if scores[i] is None else scores[i])
            result.worst = _pictures(
                model, test, worst[: params.evaluate.samples], scores, params, device, added[served : served + 1]
            )
    for row, count in zip(classes, next(iter(by_strength.values())).labelled.tolist(), strict=True):
        row["test_pixels"] = count
    result.curve, result.classes = rows, classes
    return result


def load_network(
    params: Params, folder: Path, stage: str, prior: Prior, strengths: list[float]
) -> tuple[Any, np.ndarray]:
    """A network in eval mode on the CPU, and what its logits need for each strength: float64 [S,C]."""
    model, config = load_model(folder, stage)
    check_image(config, params.image, folder)
    check_canvas(config, params, folder)
    shift, log_prior = prior.balanced_shift(config.adjustment), np.array(prior.log_prior)
    return model, shift + np.array(strengths)[:, None] * log_prior


def _add_columns(classes: list[dict[str, Any]], areas: Areas, name: str) -> None:
    for row, iou, accuracy in zip(classes, areas.iou(), areas.accuracy(), strict=True):
        row[f"{name}_iou"] = None if np.isnan(iou) else float(iou)
        row[f"{name}_accuracy"] = None if np.isnan(accuracy) else float(accuracy)


def _areas_table(sample_ids: list[str], images: list[list[Areas]], strengths: list[float]) -> pa.Table:
    columns: dict[str, Any] = {"sample_id": sample_ids}
    for target, strength in TARGET_PRIORS.items():
        own = [areas[strengths.index(strength)] for areas in images]
        for part in ("intersection", "predicted", "labelled"):
            columns[f"{part}_{target}"] = pa.array([getattr(each, part) for each in own], pa.list_(pa.int64()))
    return pa.table(columns)


def _pictures(
    model: Any,
    test: LabelMapSplit,
    chosen: list[int],
    scores: list[float | None],
    params: Params,
    device: torch.device,
    added: np.ndarray,
) -> list[dict[str, Any]]:
    pictures = []
    adjustment = torch.from_numpy(added).float().to(device)
    for index, (logits, inside, labels) in zip(
        chosen, cell_logits(model, test, chosen, params.image, device), strict=True
    ):
        predicted = class_maps(logits, adjustment, test.canvas, inside, labels.shape)[0]
        image = np.asarray(read_pair(test.source, test.references[index])[0])
        pictures.append(
            {
                "sample_id": test.sample_ids[index],
                "miou": scores[index],
                "image": data_uri(image),
                "truth": data_uri(overlay(image, labels)),
                "prediction": data_uri(overlay(image, predicted)),
            }
        )
    return pictures


def legend(prior: Prior) -> list[tuple[str, str]]:
    """Name and colour of each class, for the page."""
    return [(name, colour_text(index)) for index, name in enumerate(prior.classes)]
