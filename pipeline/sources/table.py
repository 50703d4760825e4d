"""Source `table`: Parquet or CSV files, local or remote, with one row per image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from models.prior import class_key
from pipeline.params import TableParams
from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources.shards import (
    CACHE_BYTES,
    CLASSES_KEY,
    LIMIT,
    ORIGIN_KEY,
    RowGroupCache,
    Shard,
    image_bytes,
    open_shards,
    row_groups,
)
from pipeline.sources.source import BadImageError, Groups, ImageReader, Row, Source, existing_root, rows_without_stamp
from pipeline.sources.storage import Storage, is_address
from serving.shared.bounded_parquet import MemoryLimit
from serving.shared.terminal import counted

WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")  # as Python writes it: `007` is a name


class TableReader(ImageReader):
    """Reads images of Parquet or CSV files by reference; on opening only Parquet footers are read.

    cache_bytes: memory for cached row groups. Raises DataError with a file that is missing, truncated, or has another
    schema than the others.
    """

    def __init__(self, location: str, params: TableParams, cache_bytes: int = CACHE_BYTES) -> None:
        if not is_address(location):
            existing_root(location, "table")
        self._storage, self._params = Storage(location), params
        files = {"train": params.train, "validation": params.validation, "test": params.test}
        columns = [column for column in (params.image, params.path, params.label, params.split, params.id) if column]
        limit = MemoryLimit(params.max_mib, LIMIT.key)
        self._splits = {
            split: open_shards(self._storage, names, columns, limit)
            for split, names in files.items()
            if names is not None
        }
        self._shards = {shard.name: shard for shards in self._splits.values() for shard in shards}
        self._images = RowGroupCache(params.image or params.path or "", cache_bytes)

    def groups(self, references: pa.ChunkedArray) -> Groups | None:
        """Row groups of the image column; None if the table has paths."""
        return row_groups(references, self._shards, self._params.image) if self._params.image else None

    def read(self, reference: str) -> bytes:
        """Bytes of the image column, or of the file that a path names (relative to data.location)."""
        value = self._value(reference)
        return value if isinstance(value, bytes) else self._storage.read(value)

    def _cell(self, reference: str) -> tuple[Shard, str, Any]:
        name, _, index = reference.rpartition("#")
        return self._shards[name], index, image_bytes(self._images.value(self._shards[name], int(index)))

    def _value(self, reference: str) -> bytes | str:
        shard, index, value = self._cell(reference)
        if value is None:
            raise BadImageError(f"{shard.location}: row {index} has no image; remove the row or give it one")
        column = self._params.image or self._params.path
        is_struct = pa.types.is_struct(shard.schema.field(column).type)
        if not isinstance(value, (bytes | str if is_struct else bytes) if self._params.image else str):
            expected = "encoded image bytes" if self._params.image else "a file path"
            raise DataError(f"{shard.location}: column {column!r} holds {type(value).__name__}; expected {expected}")
        return value


class TableSource(TableReader, Source):
    """Parquet or CSV files with a label column and either encoded image bytes or a path column.

    Each split is a file, a glob pattern, a folder of shards or a list of these, under data.location, which may be an
    address such as s3://bucket/photos. Labels are integers 0..C-1 without a gap, or text, numbered in sorted order.
    Raises DataError with file and column.
    """

    def __init__(self, location: str, params: TableParams) -> None:
        super().__init__(location, params)
        self.origin = self._splits["train"][0].metadata_value(ORIGIN_KEY) or "table"
        self._stamps: dict[str, str | None] = {}
        labels = {split: self._labels(shards) for split, shards in self._splits.items()}
        self.classes = self._class_names(labels)
        number = {name: index for index, name in enumerate(sorted(set(labels["train"])))}
        self.rows = [row for split, values in labels.items() for row in self._rows(split, values, number)]

    def _labels(self, shards: list[Shard]) -> list[int] | list[str]:
        labels: list = []
        for shard in shards:
            column = shard.column(self._params.label)
            where = f"{shard.location}: column {self._params.label!r}"
            if column.null_count:
                raise DataError(f"{where} has {counted(column.null_count, 'row')} without a label")
            is_label_type = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
            if not any(check(column.type) for check in is_label_type):
                raise DataError(f"{where} is {column.type}; expected integers or text")
            labels += self._typed(column.to_pylist(), where, shard.name.lower().endswith(".csv"))
        return labels

    def _typed(self, labels: list, where: str, as_csv: bool) -> list[int] | list[str]:
        """Convert labels by data.table.label_type. CSV cells are text, and become integers only if params define it."""
        kind = self._params.label_type
        if kind == "text":
            return [class_key(str(label)) for label in labels]
        if kind == "auto" and not (as_csv and self._params.class_names):
            return [class_key(label) if isinstance(label, str) else label for label in labels]
        if wrong := next((label for label in labels if not WHOLE_NUMBER.fullmatch(str(label))), None):
            raise DataError(f"{where} has the label {wrong!r}; expected integers, or set data.table.label_type: text")
        return [int(label) for label in labels]

    def _class_names(self, labels: dict[str, list]) -> list[str]:
        train_labels = sorted(set(labels["train"]))
        where = f"{self._split_location('train')}: column {self._params.label!r}"
        if len(train_labels) < 2:
            raise DataError(f"{where} has {counted(len(train_labels), 'class')}; expected at least 2")
        for split, values in labels.items():
            if unknown := sorted(set(values) - set(train_labels)):
                raise DataError(
                    f"{self._split_location(split)}: label {unknown[0]!r} has no training samples; "
                    "add training images of that class or remove its rows"
                )
        if isinstance(train_labels[0], int) and train_labels != list(range(len(train_labels))):
            if train_labels[0] < 0:
                raise DataError(f"{where} has the label {train_labels[0]}; integer labels must be 0..C-1 without a gap")
            missing = next(i for i, value in enumerate([*train_labels, None]) if value != i)
            raise DataError(f"{where} skips {missing}; integer labels must be 0..C-1 without a gap")
        stored = self._splits["train"][0].metadata_value(CLASSES_KEY) if isinstance(train_labels[0], int) else None
        names = [class_key(str(name)) for name in self._params.class_names or stored or train_labels]
        if len(names) != len(train_labels):
            owner = "data.table.class_names" if self._params.class_names else self._split_location("train")
            sizes = f"{counted(len(names), 'name')} for {counted(len(train_labels), 'class')}"
            raise ParamsError(f"{owner} has {sizes}; expected one per class")
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise ParamsError(f"data.table.class_names has {repeated!r} twice; expected names that differ")
        return names

    def _rows(self, split: str, labels: list, number: dict) -> Iterator[Row]:
        # A path as sample id makes error messages clearer than a row number.
        column = self._params.id or self._params.path
        first = 0
        for shard in self._splits[split]:
            ids = shard.column(column).to_pylist() if column else None
            for index, label in enumerate(labels[first : first + len(shard)]):
                reference = f"{shard.name}#{index}"
                yield Row(reference, number[label], str(ids[index]) if ids else reference, split)
            first += len(shard)

    def column(self, name: str) -> dict[str, str]:
        """Values of a column as text, by reference, without empty ones. Raises DataError if a file does not have it."""
        names = {"train": self._params.train, "validation": self._params.validation, "test": self._params.test}
        limit = MemoryLimit(self._params.max_mib, LIMIT.key)
        values = {}
        for files in filter(None, names.values()):
            for shard in open_shards(
                self._storage, files, [name], limit
            ):  # again, as of CSV it reads named columns only
                cells = enumerate(shard.column(name).to_pylist())
                values |= {f"{shard.name}#{index}": str(cell) for index, cell in cells if cell not in (None, "")}
        return values

    def _split_location(self, split: str) -> str:
        shards = self._splits[split]
        return (
            shards[0].location
            if len(shards) == 1
            else f"{shards[0].location} and {counted(len(shards) - 1, 'more shard')}"
        )

    def location(self, row: Row) -> str:
        """Path of the image if the table has paths, else path and row of the table, with the row's id if it has one."""
        path = self._path(row.reference)
        location = self._storage.location(path or row.reference)
        return location if path or row.sample_id == row.reference else f"{location} ({row.sample_id})"

    def stamp(self, reference: str) -> str | None:
        """Stamp of the image's file if the table has paths, else of the shard."""
        if self._params.path:
            path = self._path(reference)
            return self._storage.stamp(path) if path else None
        name, _, row = reference.rpartition("#")
        if name not in self._stamps:
            self._stamps[name] = self._storage.stamp(name)
        return f"{self._stamps[name]}#{row}"

    def _path(self, reference: str) -> str | None:
        path = self._cell(reference)[2] if self._params.path else None
        return path if isinstance(path, str) else None

    def missing(self) -> list[Row]:
        """Rows whose file does not exist, in a local table of paths; empty for a bucket, where only a read shows it."""
        if not self._params.path or not self._storage.is_local:
            return []
        return rows_without_stamp(self)

    def why_missing(self, rows: list[Row]) -> str | None:
        """If all images are missing: that paths are relative to data.location; else None."""
        hint = "paths are relative to data.location; set it to the folder that holds them"
        return hint if len(rows) == len(self.rows) else None
