"""Interface of data sources: labelled images by reference, with a stable sample id and a split."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image

from models.preprocess import MAX_BYTES
from pipeline.shared.errors import DataError, ParamsError

Item = TypeVar("Item")


class BadImageError(DataError):
    """One image is missing or unreadable, but not the whole source; data.on_bad_image defines the reaction."""


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled image. reference: key with which the source reads its bytes; split: train, validation or test."""

    reference: str
    label: int
    sample_id: str
    split: str


@dataclass(frozen=True)
class Groups:
    """Groups of images that are read together. number: group of each image, int64 [N], from 0; sizes: group bytes."""

    number: np.ndarray
    sizes: np.ndarray


class ImageReader(ABC):
    """Reads the bytes of an image by its reference: the part of a source that training needs, without listing rows."""

    @abstractmethod
    def read(self, reference: str) -> bytes:
        """Encoded bytes of one image. Raises BadImageError with the file, DataError if more than this image is lost."""

    def groups(self, references: pa.ChunkedArray) -> Groups | None:  # noqa: ARG002 - default of all readers
        """Groups of images that are read together; None if each image is read separately."""
        return None


class Source(ImageReader):
    """A set of labelled images. `read` and `stamp` must be thread-safe.

    origin: name of the data set; for packed shards that of the packed data set.
    """

    origin: str
    classes: list[str]
    rows: list[Row]

    def missing(self) -> list[Row]:
        """Rows whose file is missing, found without reading files; empty if that is not possible cheaply."""
        return []

    def why_missing(self, rows: list[Row]) -> str | None:  # noqa: ARG002 - default of all sources
        """Probable cause and remedy if these rows are missing; None if unknown."""
        return None

    def column(self, name: str) -> dict[str, str]:
        """Values of a column as text, by reference, without empty ones. Raises ParamsError: only tables have columns."""
        raise ParamsError(f"data.group names the column {name!r}, but source {self.origin} is no table; use path:REGEX")

    def stamp(self, reference: str) -> str | None:
        """Text that changes when the image's file changes, found without reading it; None if the file is missing."""
        return f"{self.origin}/{reference}"

    def location(self, row: Row) -> str:
        """Location of the image, for messages."""
        return row.sample_id


class FileSource(Source):
    """Base class of sources whose images are files under one root; a reference is the path relative to the root."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def location(self, row: Row) -> str:
        """Path of the file."""
        return str(self._root / row.reference)

    def stamp(self, reference: str) -> str | None:
        """Size and mtime of the file; None if it does not exist."""
        try:
            status = (self._root / reference).stat()
        except OSError:
            return None
        return f"{status.st_size}-{status.st_mtime_ns}"

    def missing(self) -> list[Row]:
        """Rows whose file does not exist."""
        return rows_without_stamp(self)

    def read(self, reference: str) -> bytes:
        """Bytes of the file."""
        return read_image_file(self._root / reference)


def rows_without_stamp(source: Source) -> list[Row]:
    """Rows of a source whose stamp is None because their file does not exist; checked in parallel."""
    with ThreadPoolExecutor() as pool:
        stamps = pool.map(lambda part: [source.stamp(row.reference) for row in part], in_parts(source.rows))
        return [row for row, stamp in zip(source.rows, chain.from_iterable(stamps), strict=True) if stamp is None]


def existing_root(location: str, source: str) -> Path:
    """data.location as a path. Raises ParamsError if it is not a folder."""
    root = Path(location)
    if not root.is_dir():
        raise ParamsError(f"data.location is {location!r}, which is not a folder; expected the root of source {source}")
    return root


def read_image_file(path: Path) -> bytes:
    """Read an image file after a check of its size. Raises BadImageError with the file."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise BadImageError(f"{path}: has {size} bytes, above the limit of {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise BadImageError(f"{path}: {error.strerror}") from None


def in_parts(rows: Sequence[Item], size: int = 256) -> list[Sequence[Item]]:
    """Split a sequence into parts of `size` items for parallel workers."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def as_png(pixels: np.ndarray) -> bytes:
    """Encode pixels uint8 [H,W] or [H,W,3] as PNG, which is lossless; for sources that hold arrays."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def reading_order(references: Sequence[str]) -> list[int]:
    """Indices that sort references in the order of the source: row 10 of a shard follows row 9."""

    def sort_key(index: int) -> tuple[str, int]:
        name, _, row = references[index].rpartition("#")
        return (name, int(row)) if row.isdecimal() else (references[index], 0)

    return sorted(range(len(references)), key=sort_key)
