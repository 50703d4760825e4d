"""Inspection of every image of a source: hash, size and usability; in parallel, with a progress bar, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from models.preprocess import ImageError, decode
from pipeline.shared.errors import DataError
from pipeline.shared.progress import progress_bar
from pipeline.sources import UNLABELLED, BadImageError, LabelMapSource, Row, Source, decode_label_map, in_parts
from serving.shared.terminal import counted

SHOWN = 5  # images named in a message


@dataclass(frozen=True, slots=True)
class InspectionResult:
    """Result for one image: sha256 and number of its bytes, width and height in pixels after rotation, and its problem.

    problem: one line that names the image; None if it can be used. perceptual_hash: hexadecimal text, if
    requested. An unreadable image has an empty sha256; `missing` if its file does not exist. pixels: number of pixels of
    each class in its label map, and label_map_sha256: hash of that file; both empty for classification.
    """

    sha256: str = ""
    size: int = 0
    width: int = 0
    height: int = 0
    perceptual_hash: str = ""
    problem: str | None = None
    missing: bool = False
    pixels: list[int] = field(default_factory=list)
    label_map_sha256: str = ""


def inspect_image(source: Source, row: Row, hash_fn: Callable[[Image.Image], str] | None = None) -> InspectionResult:
    """Read and decode one image. Raises DataError if the fault affects more than this image, such as a damaged shard."""
    try:
        data = source.read(row.reference)
    except BadImageError as error:
        return InspectionResult(problem=str(error), missing=source.stamp(row.reference) is None)
    digest = hashlib.sha256(data).hexdigest()
    try:
        image = decode_checked(data)
    except ImageError as error:
        return InspectionResult(
            digest, len(data), problem=f"{source.location(row)}: {error}; replace the image or remove it"
        )
    result = InspectionResult(digest, len(data), *image.size, hash_fn(image) if hash_fn else "")
    return _with_label_map(result, source, row) if isinstance(source, LabelMapSource) else result


def _with_label_map(result: InspectionResult, source: LabelMapSource, row: Row) -> InspectionResult:
    """The result for an image with the pixel counts of its label map, or with the problem of the label map."""
    try:
        data = source.read_label_map(row.reference)
        labels = decode_label_map(data, (result.width, result.height), source.label_maps)
    except BadImageError as error:
        return replace(result, problem=str(error))
    except ImageError as error:
        return replace(
            result, problem=f"{source.location(row)}: its label map {error}; replace the label map or remove the image"
        )
    counts = np.bincount(labels.ravel(), minlength=UNLABELLED + 1)[: len(source.classes)]
    return replace(result, pixels=counts.tolist(), label_map_sha256=hashlib.sha256(data).hexdigest())


def decode_checked(data: bytes) -> Image.Image:
    """Decode an image. Raises ImageError if that fails, and for an image of a single pixel."""
    image = decode(data)
    if image.size == (1, 1):
        raise ImageError("pixels", "is a single pixel: a placeholder, not a picture")
    return image


class Journal:
    """Results of inspected images as JSON lines, so that an interrupted check resumes where it stopped.

    A result is used only if the image's stamp (size and modification time of its file) is unchanged. A journal of
    another source (`about`) is discarded.
    """

    def __init__(self, path: Path, about: str) -> None:
        self._path = path
        self._results: dict[str, tuple[str, InspectionResult]] = {}
        if not self._load(about):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"about": about}) + "\n", encoding="utf-8")

    def _load(self, about: str) -> bool:
        if not self._path.is_file():
            return False
        with self._path.open("r+", encoding="utf-8") as stream:
            if stream.readline() != json.dumps({"about": about}) + "\n":
                return False
            while True:
                line_start = stream.tell()
                line = stream.readline()
                if not line.endswith("\n"):  # end of file, or a partial line of a killed run
                    stream.seek(line_start)
                    stream.truncate()
                    return True
                reference, stamp, *values = json.loads(line)
                self._results[reference] = stamp, InspectionResult(*values)

    def result(self, reference: str, stamp: str | None) -> InspectionResult | None:
        """The result of an image, if its file is unchanged."""
        journal_stamp, result = self._results.get(reference, (None, None))
        return result if stamp is not None and journal_stamp == stamp else None

    def add(self, results: Sequence[tuple[str, str | None, InspectionResult]]) -> None:
        """Append results of images."""
        lines = "".join(
            json.dumps([reference, stamp, *astuple(value)]) + "\n" for reference, stamp, value in results if stamp
        )
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(lines)


def inspect_images(
    source: Source,
    name: str,
    hash_fn: Callable[[Image.Image], str] | None = None,
    journal: Journal | None = None,
    jobs: int | None = None,
) -> dict[str, InspectionResult]:
    """Inspect every image of the source, in its order, in parallel; returns the results by reference.

    jobs: number of threads (default: one per core and 4 more). name: of the command, for the progress bar. Raises
    DataError if a fault affects more than single images.
    """

    def inspect(part: Sequence[Row]) -> list[tuple[str, str | None, InspectionResult, bool]]:
        inspected = []
        for row in part:
            stamp = source.stamp(row.reference) if journal else None
            stored = journal.result(row.reference, stamp) if journal else None
            inspected.append((row.reference, stamp, stored or inspect_image(source, row, hash_fn), stored is None))
        return inspected

    results: dict[str, InspectionResult] = {}
    pool = ThreadPoolExecutor(jobs or (os.cpu_count() or 1) + 4)
    try:
        with progress_bar(unit="images") as bar:
            task = bar.add_task(f"{name}: reading images", total=len(source.rows), rate="")
            for inspected in pool.map(inspect, in_parts(source.rows, 64)):
                if journal:
                    journal.add([(reference, stamp, value) for reference, stamp, value, new in inspected if new])
                results.update((reference, value) for reference, _, value, _ in inspected)
                bar.advance(task, len(inspected))
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def check_missing(source: Source) -> None:
    """Raise DataError when files of the source are missing: the number, the first five, and what to do."""
    rows = source.missing()
    if not rows:
        return
    first = ", ".join(source.location(row) for row in rows[:SHOWN])
    cause = source.why_missing(rows)
    raise DataError(
        f"{len(rows):,} of {counted(len(source.rows), 'image', 'are')} missing, the first {min(SHOWN, len(rows))}: {first}; "
        + (f"{cause}, " if cause else "restore them or remove them from the list, ")
        + "or set data.on_bad_image: skip; `tailor data check` lists them all"
    )


def check_usable(problems: list[str], total: int) -> None:
    """Raise DataError when images cannot be used: the problem of a single one, or the number and the first five."""
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        raise DataError(
            f"{len(problems):,} of {counted(total, 'image')} cannot be used: {'; '.join(problems[:SHOWN])}"
            + ("; and more" if len(problems) > SHOWN else "")
            + "; or set data.on_bad_image: skip"
        )
