"""What every data source offers: labelled images by reference, with a stable id and a split hint."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image

from models.preprocess import MAX_BYTES
from pipeline.shared.errors import DataError

Item = TypeVar("Item")


class BadImageError(DataError):
    """One image is missing or unreadable while the source as a whole is not: what data.on_bad_image is about."""


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled image. `reference` finds its bytes again in the source; `split` is train, validation or test."""

    reference: str
    label: int
    sample_id: str
    split: str


@dataclass(frozen=True)
class Groups:
    """The group of each of N images, int64 [N], numbered from 0, and the bytes of each group: images read at one go."""

    number: np.ndarray
    sizes: np.ndarray


class Reader(Protocol):
    """What finds the bytes of an image again by its reference: all that training needs of a source, with nothing listed."""

    def read(self, reference: str) -> bytes:
        """As of a Source."""
        ...

    def groups(self, references: pa.ChunkedArray) -> Groups | None:
        """As of a Source."""
        ...


class Source(Protocol):
    """A set of labelled images. `read` and `stamp` may be called from many threads.

    origin: the name of the data set; a pack of shards remembers what was packed.
    """

    origin: str
    classes: list[str]
    rows: list[Row]

    def read(self, reference: str) -> bytes:
        """Encoded bytes of one image. Raises BadImageError naming the file, DataError where more than this image is lost."""
        ...

    def groups(self, references: pa.ChunkedArray) -> Groups | None:
        """What is read at one go where that is more than an image; None where each image is read alone."""
        ...

    def missing(self) -> list[Row]:
        """Rows whose file is not there, found without reading; none where that cannot be known so cheaply."""
        ...

    def why_missing(self, rows: list[Row]) -> str | None:
        """The likely cause and the way out where these rows are missing; None where there is no pattern in it."""
        ...

    def stamp(self, reference: str) -> str | None:
        """A text that changes when the image's file does, without reading it; None where the file is missing."""
        ...

    def place(self, row: Row) -> str:
        """Where a user finds the image, for messages."""
        ...


class WithoutFiles:
    """What the sources share whose images are no files of their own."""

    def groups(self, references: pa.ChunkedArray) -> Groups | None:  # noqa: ARG002
        """None: images lie in memory, one by one."""
        return None

    def missing(self) -> list[Row]:
        """None: nothing can be missing."""
        return []

    def why_missing(self, rows: list[Row]) -> str | None:  # noqa: ARG002
        """No cause: nothing can be missing."""
        return None


class FilesUnderRoot:
    """What the sources share whose images are files under one root, a reference being the path from there."""

    rows: list[Row]

    def __init__(self, root: Path) -> None:
        self._root = root

    def groups(self, references: pa.ChunkedArray) -> Groups | None:  # noqa: ARG002
        """None: each image is a file."""
        return None

    def place(self, row: Row) -> str:
        """The file's path."""
        return str(self._root / row.reference)

    def stamp(self, reference: str) -> str | None:
        """Size and time of change of the file; None where there is none."""
        try:
            found = (self._root / reference).stat()
        except OSError:
            return None
        return f"{found.st_size}-{found.st_mtime_ns}"

    def missing(self) -> list[Row]:
        """Rows whose file is not there."""
        with ThreadPoolExecutor() as pool:
            there = pool.map(lambda part: [self.stamp(row.reference) for row in part], in_parts(self.rows))
            return [row for row, stamp in zip(self.rows, chain.from_iterable(there), strict=True) if stamp is None]

    def read(self, reference: str) -> bytes:
        """The file's bytes."""
        return read_image_file(self._root / reference)


def read_image_file(path: Path) -> bytes:
    """A file's bytes, its size bounded before reading. Raises BadImageError naming the file."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise BadImageError(f"{path}: has {size} bytes, above the limit of {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise BadImageError(f"{path}: {error.strerror}") from None


def in_parts(rows: Sequence[Item], size: int = 256) -> list[Sequence[Item]]:
    """A sequence cut into parts for parallel workers: few enough to queue, small enough to share out."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def as_png(pixels: np.ndarray) -> bytes:
    """A PNG file of pixels uint8 [H,W] or [H,W,3]: how sources that hold arrays hand on an image without loss."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def reading_order(references: Sequence[str]) -> list[int]:
    """Positions of the references, sorted as their images lie in the source: row 10 of a shard after its row 9."""

    def place(position: int) -> tuple[str, int, str]:
        name, _, number = references[position].rpartition("#")
        return (name, int(number), "") if number.isdecimal() else (references[position], 0, "")

    return sorted(range(len(references)), key=place)
