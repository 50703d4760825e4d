"""Shards of a table (Parquet or CSV files): read whole columns, and images by row group with a cache."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from pipeline.shared.errors import DataError
from pipeline.sources.source import Groups
from pipeline.sources.storage import Storage
from serving.shared.bounded_parquet import MAX_BATCH, MIB, MemoryLimit, TooLargeError, is_part, read_column
from serving.shared.terminal import counted

LIMIT = MemoryLimit(1024, "data.table.max_mib")
MAX_LINE, MAX_CSV_COLUMNS = MIB, 1000  # of a CSV file
CELL_BYTES = 64  # memory of a Python string without its characters
CACHE_BYTES = 256 * 1024 * 1024  # of cached images, over all shards
# Parquet metadata that `data pack` writes, as JSON: class names in label order, and the source that was packed.
CLASSES_KEY, ORIGIN_KEY = b"tailor.classes", b"tailor.origin"


class TableTooLargeError(DataError):
    """A column of a table would take more memory than the limit; a retry would fail with the same error."""


class Shard:
    """A Parquet file, of which only the footer is read on opening, or a CSV file, of which `columns` are read as text.

    limit: memory limit for one column. Raises DataError with the file if it is missing, not a table, truncated or too
    large.
    """

    def __init__(self, storage: Storage, name: str, columns: Sequence[str] = (), limit: MemoryLimit = LIMIT) -> None:
        self._storage, self.name, self.location, self._limit = storage, name, storage.location(name), limit
        self._table: pa.Table | None = None
        with self._readable(), storage.open(name) as stream:
            if name.lower().endswith(".csv"):
                self._limit.check("the file", storage.size(name) or 0)
                self.names, self._table = _read_csv(stream, columns, limit)
                self.schema, groups = self._table.schema, [self._table.num_rows]
                self._metadata: dict[bytes, bytes] = {}
            else:
                self._footer = pyarrow.parquet.read_metadata(stream)
                self.schema = self._footer.schema.to_arrow_schema()
                self.names = self.schema.names
                # Keys written after the rows are in the file's metadata, not in the schema's.
                self._metadata = (self.schema.metadata or {}) | (self._footer.metadata or {})
                groups = [self._footer.row_group(i).num_rows for i in range(self._footer.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def metadata_value(self, key: bytes) -> Any:
        """JSON value that `data pack` or `ingest` wrote to the file's metadata under `key`; None if there is none."""
        text = self._metadata.get(key)
        return json.loads(text) if text else None

    def column(self, column: str) -> pa.ChunkedArray:
        """Read a whole column. Raises DataError if the column does not exist or the file has too many rows."""
        self.check_column(column)
        with self._readable():
            self._limit.check(f"the list of {counted(len(self), 'row')}", len(self) * self._limit.row_bytes)
        return self._read(column, None)

    def check_column(self, column: str) -> None:
        """Raise DataError unless there is exactly one column of that name."""
        if column not in self.names:
            raise DataError(f"{self.location}: has no column {column!r}; it has {', '.join(self.names)[:1000]}")
        if self.names.count(column) > 1:
            raise DataError(f"{self.location}: has {self.names.count(column)} columns {column!r}; rename all but one")

    def groups_of(self, rows: np.ndarray) -> np.ndarray:
        """Index of the row group of each row, int64."""
        return np.searchsorted(self._starts, rows, side="right") - 1

    def group_of(self, row: int) -> tuple[int, int]:
        """Index of the row group of a row, and the row's index in the group."""
        group = int(self.groups_of(np.array(row)))
        return group, row - int(self._starts[group])

    def read_group(self, group: int, column: str) -> pa.ChunkedArray:
        """Read one column of one row group. Raises TableTooLargeError above the limit."""
        self.check_column(column)
        return self._read(column, [group])

    def group_bytes(self, column: str) -> list[int]:
        """Bytes in memory of a column, by row group."""
        if self._table is not None:
            return [self._table.column(column).nbytes]
        schema, groups = self._footer.schema, map(self._footer.row_group, range(self._footer.num_row_groups))
        indices = [i for i in range(len(schema)) if is_part(schema.column(i).path, column)]
        return [sum(group.column(index).total_uncompressed_size for index in indices) for group in groups]

    def _read(self, column: str, groups: list[int] | None) -> pa.ChunkedArray:
        if self._table is not None:
            return self._table.column(column)
        # Opened for each read, so that threads share no handle and many shards need no open files.
        with self._readable(), self._storage.open(self.name) as stream:
            file = pyarrow.parquet.ParquetFile(stream, metadata=self._footer)
            # Page headers are checked only in local files: a bucket is trusted, and each header would be a request.
            return read_column(file, column, self._limit, groups, stream if self._storage.is_local else None)

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except TooLargeError as error:
            raise TableTooLargeError(f"{self.location}: {error}") from None
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{self.location}: not readable as a table: {reason}") from None


def _read_csv(stream: BinaryIO, columns: Sequence[str], limit: MemoryLimit) -> tuple[list[str], pa.Table]:
    """Read the column names of a CSV file, and some columns as text; an empty cell is a missing value, not label "".

    Uses Python's csv module: pyarrow's reader leaves threads that abort a program that exits at once (status 134).
    Raises ValueError for a line or header that is too long, and for a row with another number of cells.
    """
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows = csv.reader(_short_lines(text), strict=True)
    try:
        names = next(rows, [])
        if not names or len(names) > MAX_CSV_COLUMNS:
            raise ValueError(f"it has {len(names):,} columns; expected 1 to {MAX_CSV_COLUMNS:,}")
        index_of = {name: names.index(name) for name in columns if names.count(name) == 1}
        cells: dict[str, list[str | None]] = {name: [] for name in index_of}
        size = count = 0
        while part := list(islice(filter(None, rows), MAX_BATCH)):
            if (wrong := next((i for i, row in enumerate(part) if len(row) != len(names)), None)) is not None:
                cells_of_row = counted(len(part[wrong]), "cell")
                raise ValueError(f"row {count + wrong:,} has {cells_of_row}; expected {len(names)}")
            for name, index in index_of.items():
                column = [row[index] for row in part]
                cells[name] += [cell or None for cell in column]
                size += sum(map(len, column)) + CELL_BYTES * len(column)
            count += len(part)
            limit.check("the file", size)
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num:,}: {error}") from None
    return names, pa.table({name: pa.array(column, pa.string()) for name, column in cells.items()})


def _short_lines(text: TextIO) -> Iterator[str]:
    """Lines of a file. Raises ValueError for a line longer than MAX_LINE characters."""
    for number, line in enumerate(iter(partial(text.readline, MAX_LINE + 1), ""), 1):
        if len(line) > MAX_LINE:
            raise ValueError(f"line {number:,} has more than {MAX_LINE:,} characters")
        yield line


class RowGroupCache:
    """Cache of a column's row groups: each is read once and evicted when the cache is full. Thread-safe."""

    def __init__(self, column: str, cache_bytes: int = CACHE_BYTES) -> None:
        self._column, self._cache_bytes = column, cache_bytes
        self._groups: OrderedDict[tuple[str, int], Future[pa.ChunkedArray]] = OrderedDict()
        self._lock = threading.Lock()

    def value(self, shard: Shard, row: int) -> Any:
        """Value of a row, as a Python type."""
        group, index = shard.group_of(row)
        key = shard.name, group
        with self._lock:
            is_new = key not in self._groups
            future = self._groups.setdefault(key, Future())
            self._groups.move_to_end(key)
        if is_new:
            try:
                future.set_result(shard.read_group(group, self._column))
            except BaseException as error:
                future.set_exception(error)
                # A too large group stays cached, else each of its rows would be read up to the limit again.
                if not isinstance(error, TableTooLargeError):
                    with self._lock:
                        self._groups.pop(key, None)
                raise
            self._evict(key)
        return future.result()[index].as_py()

    def _evict(self, newest: tuple[str, int]) -> None:
        with self._lock:
            done = [
                (key, future.result().nbytes)
                for key, future in self._groups.items()
                if future.done() and not future.exception()
            ]
            total = sum(size for _, size in done)
            for key, size in done:
                if total <= self._cache_bytes:
                    break
                if key != newest:
                    del self._groups[key]
                    total -= size


def open_shards(
    storage: Storage, names: str | list[str], columns: list[str], limit: MemoryLimit = LIMIT
) -> list[Shard]:
    """Open the files of a params value. Raises DataError unless all have these columns with equal types."""
    shards = [Shard(storage, name, columns, limit) for name in storage.expand(names)]
    first = shards[0]
    for column in columns:
        for shard in shards:
            shard.check_column(column)
            kind, expected = shard.schema.field(column).type, first.schema.field(column).type
            if kind != expected:
                raise DataError(
                    f"{shard.location}: column {column!r} is {kind}, but {expected} in {first.name}; "
                    "write all shards with one schema"
                )
    return shards


def image_bytes(value: Any) -> Any:
    """Bytes of an image cell: the cell itself, or of a struct {bytes, path} as in Hugging Face's data sets.

    Such a struct has no bytes if the images were not embedded; then the result is its path.
    """
    if not isinstance(value, dict) or "bytes" not in value:
        return value
    return value.get("path") if value["bytes"] is None else value["bytes"]


def row_groups(references: pa.ChunkedArray, shards: Mapping[str, Shard], column: str) -> Groups:
    """Row group of each reference `<shard>#<row>`, and the bytes of a column in each group of the referenced shards."""
    if not len(references):  # a split without images; combine_chunks fails for a chunked array without chunks
        return Groups(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    parsed = pc.extract_regex(references, r"^(?P<shard>.*)#(?P<row>\d+)$")
    names = pc.struct_field(parsed, "shard").combine_chunks().dictionary_encode()
    rows = pc.struct_field(parsed, "row").cast(pa.int64()).to_numpy()
    shard, number = names.indices.to_numpy(), np.zeros(len(rows), dtype=np.int64)
    sizes: list[int] = []
    by_shard = np.split(np.argsort(shard, kind="stable"), np.cumsum(np.bincount(shard))[:-1])
    for name, indices in zip(names.dictionary.to_pylist(), by_shard, strict=True):
        number[indices] = len(sizes) + shards[name].groups_of(rows[indices])
        sizes += shards[name].group_bytes(column)
    return Groups(number, np.array(sizes, dtype=np.int64))
