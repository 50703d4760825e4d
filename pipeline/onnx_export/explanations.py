"""File explain.npz of a release: the feature index of training images, and the class matrix of class-activation maps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from models.networks.backbones import NoFeatureMapError
from models.networks.cosine_classifier import ImageClassifier
from models.networks.memory import choose_rows
from models.preprocess import decode
from pipeline.data.dataset import AnyImages
from pipeline.model_io.inference import EVALUATION_BATCH
from pipeline.onnx_export.activation_map import class_rows, is_mean
from pipeline.params import ExplainParams
from pipeline.shared.artifacts import write_file
from pipeline.shared.errors import StageError
from serving.repository.manifest import EXPLAIN_NAME, STUDENT_NAME, Explain, sha256_of

if TYPE_CHECKING:
    import onnxruntime

MAX_BYTES = 256 * 2**20  # of rows and thumbnails; the classifier holds them in memory, once per instance
NO_MAP = "set serving.explain.map: false"


def check_map(model: ImageClassifier) -> None:
    """Raise StageError unless the logits of a model are one matrix product with its feature."""
    if class_rows(model) is None:
        raise StageError(
            "serving.explain.map is true, but the student has no single cosine or linear classifier (a memory, experts, a "
            f"centred or gated head have none); {NO_MAP}"
        )


def write_explanations(
    folder: Path,
    session: onnxruntime.InferenceSession,
    model: ImageClassifier,
    train: AnyImages,
    section: ExplainParams,
) -> Explain | None:
    """Write explain.npz beside student.onnx, or nothing if params want no reasons; returns its key in the manifest.

    session: of the graph in the folder. All classes have the same largest number of images (models.networks.memory). Raises
    StageError if serving.explain.images is below the number of classes, if the file is above MAX_BYTES, or if the feature is
    not the mean of the map.
    """
    if not section.images and not section.map:
        return None
    labels, cells = train.labels, None
    try:
        chosen = (
            choose_rows(labels, model.classes, section.images) if section.images else torch.zeros(0, dtype=torch.long)
        )
    except ValueError as error:
        raise StageError(f"serving.explain.images {error}; 0 is none") from None
    needed = 2 * len(chosen) * model.feature_dim
    if needed > MAX_BYTES:
        most = MAX_BYTES // (2 * model.feature_dim)
        raise StageError(
            f"serving.explain.images is {section.images}; {most} images of this network fill {MAX_BYTES >> 20} MiB"
        )
    parts = []
    for pixels in train.batches(chosen, EVALUATION_BATCH) if len(chosen) else ():
        inputs = {"image": pixels.numpy(), "strength": np.zeros((len(pixels), 1), np.float32)}
        parts.append(session.run(["feature"], inputs)[0].astype(np.float16))
    arrays: dict[str, Any] = {
        "rows": np.concatenate(parts) if parts else np.zeros((0, model.feature_dim), np.float16),
        "row_class": labels[chosen].numpy().astype(np.int32),
        **packed("names", [train.sample_ids[index].encode() for index in chosen.tolist()]),
    }
    if section.thumbnails and len(chosen):
        files = [thumbnail(train.encoded(index), section.thumbnails) for index in chosen.tolist()]
        needed += sum(map(len, files))
        if needed > MAX_BYTES:
            raise StageError(
                f"serving.explain: rows and thumbnails have {needed >> 20} MiB, above {MAX_BYTES >> 20} MiB; lower images"
            )
        arrays |= packed("thumbnails", files)
    if section.map and (found := class_rows(model)):
        arrays |= {"matrix": found[0], "unit": np.array(found[1])}
        cells = _check_mean(session, train)
    return write_arrays(folder, arrays, cells)


def write_arrays(folder: Path, arrays: Mapping[str, Any], cells: tuple[int, int] | None) -> Explain:
    """Write explain.npz with the sha256 of the graph in the folder; returns its key in the manifest. cells: size of a map."""
    stream = io.BytesIO()
    graph = np.array(sha256_of(folder / STUDENT_NAME).encode())
    np.savez(stream, **{**arrays, "graph": graph})
    write_file(folder / EXPLAIN_NAME, stream.getvalue())
    return Explain(
        images=len(arrays["rows"]), bytes=stream.getbuffer().nbytes, thumbnails="thumbnails" in arrays, map=cells
    )


def with_class(source: Path, position: int, name: str, row: np.ndarray, features: np.ndarray) -> dict[str, Any]:
    """The arrays of an explain.npz with one more class at `position`, for `tailor add-class`.

    row: its row of the class matrix, [D]. features: of its images, [n,D]; their names are the class and a number. They have no
    thumbnail.
    """
    with np.load(source, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    if "matrix" in arrays:
        arrays["matrix"] = np.insert(arrays["matrix"], position, row, axis=0)
    if not len(arrays["rows"]):
        return arrays
    labels = arrays["row_class"]
    arrays["rows"] = np.concatenate([arrays["rows"], features.astype(np.float16)])
    arrays["row_class"] = np.append(labels + (labels >= position), [position] * len(features)).astype(np.int32)
    texts = {"names": [f"{name} {number + 1}".encode() for number in range(len(features))]}
    if "thumbnails" in arrays:
        texts["thumbnails"] = [b""] * len(features)
    for key, more in texts.items():
        added = packed(key, more)
        end = len(arrays[key])
        arrays[key] = np.append(arrays[key], added[key])
        arrays[f"{key}_ends"] = np.append(arrays[f"{key}_ends"], added[f"{key}_ends"] + end)
    return arrays


def packed(name: str, texts: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Texts as two arrays without Python objects: all bytes, and the end of each text."""
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return {name: np.frombuffer(b"".join(texts), dtype=np.uint8), f"{name}_ends": ends}


def thumbnail(data: bytes, side: int) -> bytes:
    """A JPEG copy of an encoded image, at most `side` pixels wide and high; decoded again, so that it has no metadata."""
    image = decode(data, resize_to=side)
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def _check_mean(session: onnxruntime.InferenceSession, examples: AnyImages) -> tuple[int, int]:
    """Height and width of the map. Raises StageError unless the feature is the direction of its mean over the positions."""
    pixels = examples.pixels(torch.arange(min(2, len(examples)))).numpy()
    inputs = {"image": pixels, "strength": np.zeros((len(pixels), 1), np.float32)}
    feature, cells = session.run(["feature", "feature_map"], inputs)
    if not is_mean(feature, cells):
        raise StageError(f"serving.explain.map is true, but {NoFeatureMapError.MESSAGE}; {NO_MAP}")
    return cells.shape[2], cells.shape[3]
