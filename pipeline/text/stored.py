"""Stored features of texts: write, check and load artifacts/text, the Gaussian centres of classes (paper, Sec. 3.4).

The folder holds text_features.safetensors, with the tensors `features`, float32 [N,D], and `row_class`, int64 [N], and
text.json, with the class names, the sentence of each row and the record of the encoder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from pipeline.shared.artifacts import whole_folder, write_file, write_json
from pipeline.shared.errors import ParamsError, StageError

FEATURES_FILE, INDEX_FILE = "text_features.safetensors", "text.json"
UNIT_TOLERANCE = 1e-4  # of the norm of a row; float32 rounding is below 1e-6


@dataclass(frozen=True)
class TextFeatures:
    """Unit features of the sentences of each class.

    features: float32 [N,D], rows sorted by class. row_class: int64 [N], index into class_names; each class has a row.
    sentences: one for each row; empty for features of the user's own. record: `encoder` (name), `sha256` of its weights
    or of the user's file, `templates`.
    """

    features: np.ndarray
    row_class: np.ndarray
    class_names: tuple[str, ...]
    sentences: tuple[str, ...]
    record: dict[str, Any]


def write_text_features(folder: Path, text: TextFeatures) -> None:
    """Write the folder; an interrupted call leaves the old one. Raises StageError if `text` is not valid."""
    _check(text, folder)
    tensors = {"features": text.features, "row_class": text.row_class}
    index = {"class_names": text.class_names, "sentences": text.sentences, "encoder": text.record}
    with whole_folder(folder) as new:
        write_file(new / FEATURES_FILE, safetensors.numpy.save(tensors))
        write_json(new / INDEX_FILE, index)


def write_no_features(folder: Path) -> None:
    """Write a folder without features, for params without section `text`."""
    with whole_folder(folder) as new:
        write_json(new / INDEX_FILE, {"encoder": None})


def load_text_features(folder: Path, class_names: Sequence[str]) -> TextFeatures:
    """Load the folder, with classes in the order of `class_names`; rows are assigned to classes by name.

    Raises ParamsError if the folder has no features, StageError if they are damaged, of another shape, not of unit
    norm, or of other classes than `class_names`.
    """
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["encoder"] is None:
            raise ParamsError(
                f"{path}: has no features; set section text in params.yaml and run `dvc repro embed_text`"
            )
        stored = safetensors.numpy.load_file(folder / FEATURES_FILE)
        text = TextFeatures(
            stored["features"], stored["row_class"], tuple(index["class_names"]), tuple(index["sentences"]),
            dict(index["encoder"]),
        )  # fmt: skip
    except FileNotFoundError:
        raise ParamsError(f"{folder}: no features of texts; run `dvc repro embed_text` first") from None
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError):
        raise StageError(f"{folder}: damaged; run `dvc repro -f embed_text`") from None
    _check(text, folder)
    return _in_order(text, tuple(class_names), folder)


def _in_order(text: TextFeatures, class_names: tuple[str, ...], folder: Path) -> TextFeatures:
    """Rows in the order of `class_names`. Raises StageError if the classes are others."""
    if text.class_names == class_names:
        return text
    for name in sorted({*text.class_names} ^ {*class_names}):
        state = "no text feature" if name in class_names else "text features, but no images in data/split"
        raise StageError(f"{folder}: class {name!r} has {state}; run `dvc repro embed_text`")
    index = {name: number for number, name in enumerate(class_names)}
    row_class = np.array([index[name] for name in text.class_names])[text.row_class]
    order = np.argsort(row_class, kind="stable")
    sentences = tuple(text.sentences[row] for row in order) if text.sentences else ()
    return TextFeatures(text.features[order], row_class[order], class_names, sentences, text.record)


def _check(text: TextFeatures, folder: Path) -> None:
    """Raise StageError unless the shapes agree, rows are finite and of unit norm, and each class has a row."""
    features, row_class = text.features, text.row_class
    path = folder / FEATURES_FILE
    if features.ndim != 2 or features.dtype != np.float32 or not features.size:
        raise StageError(f"{path}: features are {features.dtype} {list(features.shape)}; expected float32 [N,D]")
    if row_class.shape != features.shape[:1] or row_class.dtype != np.int64:
        expected = f"int64 [{len(features)}]"
        raise StageError(f"{path}: row_class is {row_class.dtype} {list(row_class.shape)}; expected {expected}")
    if len(text.sentences) not in (0, len(features)):
        raise StageError(f"{folder / INDEX_FILE}: {len(text.sentences)} sentences for {len(features)} rows")
    if len(set(text.class_names)) < len(text.class_names):
        raise StageError(f"{folder / INDEX_FILE}: class_names has a name twice; expected names that differ")
    if (np.diff(row_class) < 0).any() or row_class[0] < 0 or row_class[-1] >= len(text.class_names):
        raise StageError(f"{path}: row_class is not sorted within 0 to {len(text.class_names) - 1}")
    for number in np.setdiff1d(np.arange(len(text.class_names)), row_class):
        raise StageError(f"{path}: class {text.class_names[number]!r} has no row")
    norms = np.linalg.norm(features.astype(np.float64), axis=1)
    if (wrong := ~(np.abs(norms - 1) <= UNIT_TOLERANCE)).any():  # NaN included
        row = int(wrong.argmax())
        raise StageError(
            f"{path}: row {row} of class {text.class_names[row_class[row]]!r} has norm {norms[row]:.4g}, not 1"
        )
