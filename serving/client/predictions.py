"""Typed responses of a server (Prediction, ModelStatus, Status), and a prediction as JSON and as CSV rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.client.extras import DECISION, EXPLAIN, NODE, PACKED
from serving.shared.errors import ServingError
from serving.shared.terminal import csv_cell
from serving.transport.messages import Answer


@dataclass(frozen=True)
class Decision:
    """The class of least expected cost, by name and index, and its cost; both None where asking a person is cheaper."""

    name: str | None
    index: int | None
    cost: float


@dataclass(frozen=True)
class TaxonomyNode:
    """The deepest node of the taxonomy that reaches the wanted probability, a class or a group; None for every class."""

    name: str | None
    probability: float


@dataclass(frozen=True)
class NearestImage:
    """A training image near to an image: its name in the data set, its class, the cosine of both features, and a small copy.

    thumbnail: a JPEG file; None from a release without thumbnails.
    """

    name: str
    label: str
    cosine: float
    thumbnail: bytes | None = None


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image: top classes by name and index, their probabilities, and the model version.

    set: class names of the prediction set, most probable first. decision: by costs. unknown: whether the image resembles no
    class. typicality: share of known validation images that look at most as familiar. node: of the taxonomy. nearest: training
    images, most similar first. activation_map: rows of the class-activation map of the best class, over the part of the image
    that the network sees; their mean is the logit of the class without calibration, prior and bias. activation_crop: side of
    that part, a square in the centre, as a share of the image's shorter side. They are None if neither the request nor the
    release wants them.
    """

    classes: tuple[str, ...]
    indexes: tuple[int, ...]
    probabilities: tuple[float, ...]
    version: int
    set: tuple[str, ...] | None = None
    decision: Decision | None = None
    unknown: bool | None = None
    typicality: float | None = None
    node: TaxonomyNode | None = None
    nearest: tuple[NearestImage, ...] | None = None
    activation_map: tuple[tuple[float, ...], ...] | None = None
    activation_crop: float | None = None


@dataclass(frozen=True)
class ModelStatus:
    """A model on the server: its served versions; empty when the model is not loaded."""

    name: str
    versions: tuple[int, ...]


@dataclass(frozen=True)
class Status:
    """A server's state. `answers`: whether it classified a test image, which a ready endpoint does not prove."""

    url: str
    server: str
    server_version: str
    models: tuple[ModelStatus, ...]
    answers: bool
    problem: str | None


EXTRA_COLUMNS = ("unknown", "typicality", "decision", "cost", "set")
ASK = "(ask a person)"
CSV_COLUMNS = ("image", "version", "rank", "class", "index", "probability", "error")


def as_mapping(image: Path, answer: Prediction | ServingError, top: int | None) -> dict[str, object]:
    """Convert one image's result to a JSON object: its best `top` classes (None: all in the response), or its error."""
    if isinstance(answer, ServingError):
        return {"image": str(image), "error": str(answer)}
    rows = [{"class": name, "index": index, "probability": p} for name, index, p in best_classes(answer, top)]
    return {"image": str(image), "version": answer.version, "predictions": rows} | extras_mapping(answer)


def extras_mapping(answer: Prediction) -> dict[str, object]:
    """The extra parts of a prediction as JSON values, only those that it has."""
    parts: dict[str, object] = {} if answer.set is None else {"set": list(answer.set)}
    if answer.decision is not None:
        parts["decision"] = {
            "class": answer.decision.name,
            "index": answer.decision.index,
            "cost": answer.decision.cost,
        }
    if answer.unknown is not None:
        parts |= {"unknown": answer.unknown, "typicality": answer.typicality}
    if answer.node is not None:
        parts["node"] = {"name": answer.node.name, "probability": answer.node.probability}
    if answer.nearest is not None:
        parts["nearest"] = [{"name": each.name, "class": each.label, "cosine": each.cosine} for each in answer.nearest]
    if answer.activation_map is not None:
        parts["activation_map"] = [list(row) for row in answer.activation_map]
        parts["activation_crop"] = answer.activation_crop
    return parts


def extras_text(answer: Prediction) -> list[str]:
    """The extra parts of a prediction as lines of text, only those that it has."""
    lines = []
    if answer.unknown is not None:
        lines.append(f"{'unknown' if answer.unknown else 'known'}, typicality {answer.typicality:.3f}")
    if answer.decision is not None:
        lines.append(f"decision: {answer.decision.name or ASK}, expected cost {answer.decision.cost:.4g}")
    if answer.node is not None:
        lines.append(f"node: {answer.node.name or 'any class'}, {answer.node.probability:.4f}")
    if answer.set is not None:
        lines.append(f"set of {len(answer.set)}: {', '.join(answer.set)}")
    if answer.nearest is not None:
        images = ", ".join(f"{each.name} ({each.label}, {each.cosine:.3f})" for each in answer.nearest)
        lines.append(f"nearest training images: {images}")
    return lines


def as_rows(
    image: Path, answer: Prediction | ServingError, top: int | None, extras: bool = False
) -> list[list[object]]:
    """Convert one image's result to rows of CSV_COLUMNS, best class first; or to one row with its error.

    extras: EXTRA_COLUMNS too; empty if the prediction has no such part. A set is its names joined by semicolons.
    """
    more: list[object] = [""] * len(EXTRA_COLUMNS) if extras else []
    if isinstance(answer, ServingError):
        return [[csv_cell(image), "", "", "", "", "", csv_cell(answer), *more]]
    if extras:
        decision = answer.decision
        more = [
            "" if answer.unknown is None else answer.unknown,
            "" if answer.typicality is None else answer.typicality,
        ]
        more += ["", ""] if decision is None else [csv_cell(decision.name or ASK), decision.cost]
        more.append("" if answer.set is None else csv_cell(";".join(answer.set)))
    best = enumerate(best_classes(answer, top), start=1)
    return [
        [csv_cell(image), answer.version, rank, csv_cell(name), index, p, "", *more] for rank, (name, index, p) in best
    ]


def best_classes(answer: Prediction, top: int | None) -> list[tuple[str, int, float]]:
    """Return name, index and probability of the best `top` classes (None: all in the response)."""
    return list(zip(answer.classes, answer.indexes, answer.probabilities, strict=True))[:top]


def extra_parts(answer: Answer, row: int) -> dict[str, Any]:
    """The fields of Prediction for the extras that a response has."""
    parts: dict[str, Any] = {}
    values = _extra_values(answer, row)
    if "set" in values:
        parts["set"] = tuple(values["set"])
    if "decision" in values:
        name, index, cost = (values[each] for each in DECISION)
        parts["decision"] = Decision(name or None, None if index < 0 else int(index), float(cost))
    if "unknown" in values:
        parts["unknown"], parts["typicality"] = bool(values["unknown"]), float(values["typicality"])
    if "node" in values:
        name, probability = (values[each] for each in NODE)
        parts["node"] = TaxonomyNode(name or None, float(probability))
    if "nearest" in answer.outputs:
        names, classes, cosines = (answer.outputs[each][row] for each in EXPLAIN[:3])
        files = answer.outputs["nearest_image"][row] if "nearest_image" in answer.outputs else [b""] * len(names)
        parts["nearest"] = tuple(
            NearestImage(name.decode(), label.decode(), float(cosine), bytes(file) or None)
            for name, label, cosine, file in zip(names, classes, cosines, files, strict=True)
            if name
        )
    if "activation_map" in answer.outputs:
        parts["activation_map"] = tuple(map(tuple, answer.outputs["activation_map"][row].tolist()))
    if "activation_crop" in answer.outputs:
        parts["activation_crop"] = float(answer.outputs["activation_crop"][row][0])
    return parts


def _extra_values(answer: Answer, row: int) -> dict[str, Any]:
    """The values of the extras of a row by output: from JSON, or from the separate outputs of an older release."""
    if PACKED in answer.outputs:
        # As in the separate outputs, numbers are those of a float32.
        return dict(json.loads(answer.outputs[PACKED][row][0], parse_float=np.float32))
    names = (*DECISION, *NODE, "unknown", "typicality")
    values = {name: answer.outputs[name][row][0] for name in names if name in answer.outputs}
    values |= {name: values[name].decode() for name in ("decision", "node") if name in values}
    if "set" in answer.outputs:
        values["set"] = [name.decode() for name in answer.outputs["set"][row] if name]
    return values
