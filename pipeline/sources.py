"""Data sources: where labelled images come from. Each yields encoded bytes, a label, a stable id and a split hint."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from PIL import Image

from models.preprocess import MAX_BYTES
from pipeline.errors import DataError, ParamsError
from pipeline.params import DataParams, TableParams

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
SPLIT_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class Row:
    """One labelled image. `reference` finds its bytes again in the source; `split` is train, validation or test."""

    reference: str
    label: int
    sample_id: str
    split: str


class Source(Protocol):
    """A set of labelled images."""

    classes: list[str]
    rows: list[Row]

    def read(self, reference: str) -> bytes:
        """Encoded bytes of one image. Raises DataError naming the file."""
        ...

    def place(self, row: Row) -> str:
        """Where a user finds the image, for messages."""
        ...


def open_source(params: DataParams) -> Source:
    """The source that params.yaml names. Raises DataError or ParamsError naming what is missing."""
    root = Path(params.location)
    if params.source == "digits":
        return DigitsSource()
    if not root.is_dir():
        raise ParamsError(
            f"data.location is {params.location!r}, which is not a folder; expected the root of source {params.source}"
        )
    return FolderSource(root) if params.source == "folder" else TableSource(root, params.table)


class DigitsSource:
    """scikit-learn's bundled scans of handwritten digits: 1,797 images of 8x8 pixels, 16 grey levels, ten classes."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        scans = load_digits()
        self.classes = [str(digit) for digit in range(10)]
        self._pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)
        self.rows = [Row(str(i), int(label), f"digits/{i}", "train") for i, label in enumerate(scans.target)]

    def place(self, row: Row) -> str:
        """The scan's number."""
        return row.sample_id

    def read(self, reference: str) -> bytes:
        """The scan as a PNG file."""
        stream = io.BytesIO()
        Image.fromarray(self._pixels[int(reference)]).save(stream, format="PNG")
        return stream.getvalue()


class FolderSource:
    """A folder per class, named for the class; or train/, validation/ (or val/) and test/, each with a folder per class.

    Classes are numbered in the sorted order of their names in train. Raises DataError for a class folder without
    images, for a class that only a held-out split has, and for a file that is not an image by its suffix.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        folders = {entry.name: entry for entry in _folders(root)}
        if {"val", "validation"} <= set(folders):
            raise DataError(f"{root}: has both val/ and validation/; keep one of them")
        parts = {SPLIT_FOLDERS[name]: path for name, path in folders.items() if name in SPLIT_FOLDERS}
        if "train" not in parts:
            parts = {"train": root}
        self.classes = [entry.name for entry in _folders(parts["train"])]
        if len(self.classes) < 2:
            raise DataError(
                f"{parts['train']}: holds {len(self.classes)} class folders; expected at least 2, one per class"
            )
        self.rows = [row for split, folder in parts.items() for row in self._rows(split, folder)]

    def _rows(self, split: str, folder: Path) -> Iterator[Row]:
        number = {name: index for index, name in enumerate(self.classes)}
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                raise DataError(
                    f"{path}: lies beside the class folders; move it into the folder of its class or remove it"
                )
        for class_folder in _folders(folder):
            if class_folder.name not in number:
                raise DataError(
                    f"{class_folder}: is a class of {split} that train does not have; add training images or remove it"
                )
            files = sorted(
                path
                for path in class_folder.rglob("*")
                if (path.is_symlink() or path.is_file()) and not path.name.startswith(".")
            )
            for path in files:
                if path.suffix.lower() not in IMAGE_SUFFIXES:
                    raise DataError(f"{path}: is not a .jpg, .jpeg, .png or .webp file; remove it or convert it")
                reference = path.relative_to(self._root).as_posix()
                yield Row(reference, number[class_folder.name], reference, split)
            if not files and split == "train":
                raise DataError(f"{class_folder}: class without training images; add some or remove the folder")

    def place(self, row: Row) -> str:
        """The file's path."""
        return str(self._root / row.reference)

    def read(self, reference: str) -> bytes:
        """The file's bytes."""
        return read_image_file(self._root / reference)


class TableSource:
    """Parquet or CSV files with a label column and either encoded image bytes or a path column.

    Labels are integers 0..C-1 without a gap, or text, numbered in sorted order. Raises DataError naming file and column.
    """

    def __init__(self, root: Path, params: TableParams) -> None:
        self._root, self._params = root, params
        self._lock, self._read = threading.Lock(), dict[str, pa.ChunkedArray]()
        files = {"train": params.train, "validation": params.validation, "test": params.test}
        self._files = {split: name for split, name in files.items() if name is not None}
        labels = {split: self._labels(name) for split, name in self._files.items()}
        self.classes = self._class_names(labels)
        number = {name: index for index, name in enumerate(sorted(set(labels["train"])))}
        self.rows = [row for split, values in labels.items() for row in self._rows(split, values, number)]

    def _labels(self, name: str) -> list[int] | list[str]:
        column = self._column(name, self._params.label)
        if column.null_count:
            raise DataError(
                f"{self._root / name}: column {self._params.label!r} has {column.null_count} rows without a label"
            )
        if not (
            pa.types.is_integer(column.type) or pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        ):
            raise DataError(
                f"{self._root / name}: column {self._params.label!r} is {column.type}; expected integers or text"
            )
        return column.to_pylist()

    def _class_names(self, labels: dict[str, list]) -> list[str]:
        known = sorted(set(labels["train"]))
        where = f"{self._root / self._files['train']}: column {self._params.label!r}"
        if len(known) < 2:
            raise DataError(f"{where} has {len(known)} classes; expected at least 2")
        for split, values in labels.items():
            if unknown := sorted(set(values) - set(known)):
                raise DataError(
                    f"{self._root / self._files[split]}: label {unknown[0]!r} has no training samples; "
                    "add training images of that class or remove its rows"
                )
        if isinstance(known[0], int) and known != list(range(len(known))):
            if known[0] < 0:
                raise DataError(f"{where} has the label {known[0]}; integer labels must be 0..C-1 without a gap")
            missing = next(i for i, value in enumerate([*known, None]) if value != i)
            raise DataError(f"{where} skips {missing}; integer labels must be 0..C-1 without a gap")
        names = self._params.class_names or [str(value) for value in known]
        if len(names) != len(known):
            raise ParamsError(
                f"data.table.class_names has {len(names)} names for {len(known)} classes; expected one per class"
            )
        return names

    def _rows(self, split: str, labels: list, number: dict) -> Iterator[Row]:
        name = self._files[split]
        # A path says more than a row number when an error names the sample.
        column = self._params.id or self._params.path
        ids = self._column(name, column).to_pylist() if column else None
        for index, label in enumerate(labels):
            sample_id = str(ids[index]) if ids else f"{name}#{index}"
            yield Row(f"{name}#{index}", number[label], sample_id, split)

    def _column(self, name: str, column: str) -> pa.ChunkedArray:
        path = self._root / name
        try:
            if path.suffix == ".csv":
                # An empty cell is a missing value, as in Parquet, and not a label "".
                empty = pyarrow.csv.ConvertOptions(null_values=[""], strings_can_be_null=True)
                table = pyarrow.csv.read_csv(path, convert_options=empty)
            else:
                table = pyarrow.parquet.read_table(path, columns=None if not column else self._present(path, column))
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; set data.location and data.table to where it is") from None
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not readable as a table: {error}") from None
        if column not in table.column_names:
            raise DataError(f"{path}: has no column {column!r}; it has {', '.join(table.column_names)}")
        return table.column(column)

    @staticmethod
    def _present(path: Path, column: str) -> list[str] | None:
        # A missing column is read as "all", so that the message can list what there is.
        return [column] if column in pyarrow.parquet.read_schema(path).names else None

    def _images(self, name: str) -> pa.ChunkedArray:
        with self._lock:  # the readers are threads, and a file is read once
            if name not in self._read:
                self._read[name] = self._column(name, self._params.image or self._params.path or "")
            return self._read[name]

    def place(self, row: Row) -> str:
        """The image's path where the table has one, else the table's path and row; with the row's id if it has one."""
        if self._params.path:
            return str(self._root / row.sample_id)
        place = f"{self._root}/{row.reference}"
        return place if row.sample_id == row.reference else f"{place} ({row.sample_id})"

    def read(self, reference: str) -> bytes:
        """Bytes of the image column, or of the file that the path column names (relative to data.location)."""
        name, _, index = reference.rpartition("#")
        value = self._images(name)[int(index)].as_py()
        if value is None:
            raise DataError(f"{self._root / name}: row {index} has no image; remove the row or give it one")
        if not isinstance(value, bytes | str):
            column = self._params.image or self._params.path
            found = f"column {column!r} holds {type(value).__name__}"
            raise DataError(f"{self._root / name}: {found}; expected encoded image bytes or a file path")
        return value if isinstance(value, bytes) else read_image_file(self._root / value)


def read_image_file(path: Path) -> bytes:
    """A file's bytes, its size bounded before reading. Raises DataError naming the file."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{path}: has {size} bytes, above the limit of {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
