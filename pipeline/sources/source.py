"""What every data source offers: labelled images by reference, with a stable id and a split hint."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from models.preprocess import MAX_BYTES
from pipeline.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled image. `reference` finds its bytes again in the source; `split` is train, validation or test."""

    reference: str
    label: int
    sample_id: str
    split: str


class Source(Protocol):
    """A set of labelled images. `read` and `stamp` may be called from many threads."""

    classes: list[str]
    rows: list[Row]

    def read(self, reference: str) -> bytes:
        """Encoded bytes of one image. Raises DataError naming the file."""
        ...

    def stamp(self, reference: str) -> str | None:
        """A text that changes when the image's file does, without reading it; None where the file is missing."""
        ...

    def place(self, row: Row) -> str:
        """Where a user finds the image, for messages."""
        ...


def read_image_file(path: Path) -> bytes:
    """A file's bytes, its size bounded before reading. Raises DataError naming the file."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{path}: has {size} bytes, above the limit of {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def stamp_of_file(path: Path) -> str | None:
    """Size and time of change of a file; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return f"{found.st_size}-{found.st_mtime_ns}"


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
