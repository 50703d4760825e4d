"""Compute the features of the sentences of all classes, or take features of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from models.prior import class_key
from pipeline.params import TextParams
from pipeline.shared.errors import DataError, ParamsError, raise_problems
from pipeline.text.encoder import checked_file
from pipeline.text.encoders import open_encoder
from pipeline.text.sentences import class_sentences
from pipeline.text.stored import TextFeatures
from serving.shared.terminal import counted

SAME = 1 - 1e-6  # cosine of the mean features of two classes from which they count as equal
CHUNK = 1024  # classes that are compared with all classes at once


def text_features(text: TextParams, classes: Sequence[str]) -> tuple[TextFeatures, list[str]]:
    """Compute unit features of all classes, in their order; returns them and remarks, a line each.

    Raises as `class_sentences`, `open_encoder` and `own_features` do, DataError if two classes have equal features.
    """
    if text.encoder == "features":
        rows, sha256 = own_features(text, classes)
        sentences, remarks = (), list[str]()
        record = {"encoder": "features", "model": Path(text.file).name, "sha256": sha256, "templates": []}
        features = np.concatenate(rows)
    else:
        of_class = class_sentences(text, classes)
        rows, remarks = of_class.sentences, of_class.remarks
        encoder = open_encoder(text)
        sentences = tuple(sentence for own in rows for sentence in own)
        features, cut = encoder.encode(sentences, text.batch_size)
        if cut:
            remarks.append(f"{counted(cut, 'sentence', 'are')} cut to {encoder.limit} tokens, of {len(sentences):,}")
        record = {**encoder.record, "templates": text.templates, "cut": cut, "unused": of_class.unused}
    row_class = np.repeat(np.arange(len(classes)), [len(own) for own in rows])
    norms = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    if (wrong := ~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0)).any():
        row = int(wrong.argmax())
        raise DataError(
            f"text.file: {text.file}: a feature of class {classes[row_class[row]]!r} is zero or not finite: {norms[row, 0]}"
        )
    features = (features / norms).astype(np.float32)
    _check_distinct(text, features, row_class, classes)
    return TextFeatures(features, row_class, tuple(classes), sentences, record), remarks


def own_features(text: TextParams, classes: Sequence[str]) -> tuple[list[np.ndarray], str]:
    """Read the user's file: a tensor [n,D] or [D] for each class name. Returns the rows of each class and the sha256.

    Raises ParamsError if the file cannot be read, DataError for a class without rows or with two tensors, a tensor of no
    class, and widths or shapes that differ.
    """
    path, sha256 = checked_file(text.file, text.sha256, text.download)
    try:
        stored = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, TypeError, KeyError) as error:  # a type that numpy does not have: bfloat16
        raise ParamsError(
            f"text.file: {path}: cannot be read as safetensors of float16, float32 or float64: {error}"
        ) from None
    tensors, result, problems = dict[str, np.ndarray](), list[np.ndarray](), []
    for given, rows in sorted(stored.items()):
        if (name := class_key(given)) in tensors:
            same = " and ".join(ascii(other) for other in sorted(stored) if class_key(other) == name)
            raise DataError(
                f"{path}: tensors {same} are of the same class {name!r} (Unicode NFC); expected one of them"
            )
        tensors[name] = rows
    for name in classes:
        width = result[0].shape[1] if result else None
        if (rows := tensors.get(name)) is None:
            problems.append((path, f"class {name!r} has no tensor; add one [n,{width or 'D'}] of this name"))
            continue
        rows = rows[None] if rows.ndim == 1 else rows
        if rows.ndim != 2 or rows.dtype.kind != "f" or not rows.size:
            problems.append((path, f"class {name!r} is {rows.dtype} {list(rows.shape)}; expected floating point [n,D]"))
        elif width not in (None, rows.shape[1]):
            problems.append((path, f"class {name!r} has width {rows.shape[1]}, but class {classes[0]!r} {width}"))
        else:
            result.append(rows.astype(np.float64))
    problems += [
        (path, f"tensor {name!r} is of no class; remove it, or rename it to a class without one")
        for name in sorted(tensors.keys() - set(classes))
    ]
    raise_problems(path, problems)
    return result, sha256


def _check_distinct(text: TextParams, features: np.ndarray, row_class: np.ndarray, classes: Sequence[str]) -> None:
    """Raise DataError if the mean features of two classes are equal: an image would have the same score for both."""
    means = np.stack([features[row_class == number].mean(0) for number in range(len(classes))])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    for start in range(0, len(classes), CHUNK):
        cosines = means[start : start + CHUNK] @ means.T
        first, second = np.nonzero(cosines > SAME)
        for one, other in zip(first + start, second, strict=True):
            if one < other:
                cause = (
                    ": the same words, or words that the encoder does not know; set text.names or text.descriptions to "
                    "texts that differ"
                )
                if text.encoder == "features":
                    cause = f" in {text.file}; give each class its own rows"
                raise DataError(f"text: classes {classes[one]!r} and {classes[other]!r} have equal features{cause}")
