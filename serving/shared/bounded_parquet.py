"""Read columns of a Parquet file within a memory limit, also where the file's footer has wrong sizes.

A file of 2 kB can take gigabytes when it is read: a page of zeros that zstd compressed 30,000 : 1, one dictionary value
that every row repeats (RLE), one prefix that every row repeats (DELTA_BYTE_ARRAY). A correct footer shows the first of
these. The footer may be wrong, so the page headers, by which pyarrow allocates, are read too. The other two are
detected while reading, batch by batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from serving.shared.errors import ServingError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet

MIB = 1024 * 1024
MAX_BATCH = 65_536  # rows decoded at once
PREDICTIONS_MIB = 1024  # 24,000 test images of 8,000 classes take 760 MiB


@dataclass(frozen=True)
class MemoryLimit:
    """The memory limit of one column in MiB, and the params key that sets it ('' if none does).

    row_bytes: memory of one listed row in Python (reference, label, object); it limits the number of rows.
    """

    mib: int
    key: str = ""
    row_bytes: int = 256

    def check(self, label: str, size: int) -> None:
        """Raise TooLargeError if `size` in bytes is above the limit; label: the column, for the message."""
        if size > self.mib * MIB:
            raise TooLargeError(label, size, self)


class TooLargeError(Exception):
    """Reading needs more memory than the limit; the message has the column, its size, the limit and its params key."""

    def __init__(self, label: str, size: int, limit: MemoryLimit) -> None:
        advice = f"; raise {limit.key} if that is right" if limit.key else ""
        super().__init__(
            f"{label} takes at least {-(-size // MIB):,} MiB when it is read, above the limit of {limit.mib:,} MiB{advice}"
        )


def read_column(
    file: pyarrow.parquet.ParquetFile,
    column: str,
    limit: MemoryLimit,
    groups: Sequence[int] | None = None,
    stream: BinaryIO | None = None,
) -> pa.ChunkedArray:
    """Read one column of some row groups (all if None), dictionaries decoded. Peak memory: about twice the limit.

    stream: the same file opened for reading bytes; its page headers are then checked against the limit too. Without it
    only the footer's sizes are checked before reading. Raises TooLargeError, and pyarrow's errors for a damaged file.
    """
    import pyarrow as pa

    footer, label = file.metadata, f"column {column!r}"
    chosen = range(footer.num_row_groups) if groups is None else groups
    leaves = [i for i in range(footer.num_columns) if is_part(footer.schema.column(i).path, column)]
    chunks = [footer.row_group(group).column(i) for group in chosen for i in leaves]
    rows = sum(footer.row_group(group).num_rows for group in chosen)
    values = sum(chunk.num_values for chunk in chunks)  # more than the rows in a column of lists
    declared = sum(chunk.total_uncompressed_size for chunk in chunks)
    limit.check(label, max(declared, _least_bytes(file, column, max(rows, values))))
    pages = [chunk.total_uncompressed_size for chunk in chunks]
    if stream is not None:
        pages = [sum(_page_sizes(stream, chunk, label, limit)) for chunk in chunks]
        limit.check(label, sum(pages))
    if any(chunk.physical_type == "BYTE_ARRAY" for chunk in chunks):
        # A value is at most as long as the pages of its chunk: a batch takes at most a quarter of the limit, or one
        # value.
        batch_rows = max(1, min(MAX_BATCH, limit.mib * MIB // (4 * max([1, *pages]))))
    else:
        batch_rows = max(1, MAX_BATCH * rows // max(1, rows, values))
    parts: list[pa.Array] = []
    size = 0
    for batch in file.iter_batches(batch_rows, row_groups=list(chosen), columns=[column], use_threads=False):
        parts.append(_plain(batch.column(0)))
        size += parts[-1].nbytes
        limit.check(label, size)
    return pa.chunked_array(parts, parts[0].type if parts else _plain_type(file.schema_arrow.field(column).type))


def read_predictions(path: Path, *columns: str) -> tuple[np.ndarray, np.ndarray, list[list[Any]]]:
    """Read labels [N], logits float64 [N,C] and further `columns` of evaluation's predictions.parquet.

    Raises FileNotFoundError, and ServingError with the file if it is damaged or above the memory limit.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet

    limit = MemoryLimit(PREDICTIONS_MIB)
    try:
        with path.open("rb") as stream, pyarrow.parquet.ParquetFile(path) as file:
            labels, logits, *others = (
                read_column(file, name, limit, stream=stream) for name in ("label", "logits", *columns)
            )
        return labels.to_numpy(), np.array(logits.to_pylist(), np.float64), [other.to_pylist() for other in others]
    except FileNotFoundError:
        raise
    except TooLargeError as error:
        raise ServingError(f"{path}: {error}") from None
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise ServingError(
            f"{path}: damaged ({str(error).splitlines()[0][:100]}); run `dvc repro -f evaluate`"
        ) from None


def read_note(path: Path, key: str) -> Any:
    """Read the JSON value that evaluation stored in the schema of predictions.parquet under `key`; None without one.

    Raises ServingError with the file if the value is no JSON, and FileNotFoundError.
    """
    import pyarrow as pa
    import pyarrow.parquet

    try:
        content = (pyarrow.parquet.read_schema(path).metadata or {}).get(key.encode())
        return None if content is None else json.loads(content)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        raise ServingError(f"{path}: damaged ({str(error)[:100]}); run `dvc repro -f evaluate`") from None


def is_part(path: str, column: str) -> bool:
    """Whether a leaf of the schema is the column, or a part of it if it is a struct or list."""
    return path == column or path.startswith(f"{column}.")


def _least_bytes(file: pyarrow.parquet.ParquetFile, column: str, values: int) -> int:
    """The least bytes for this number of values of a column's type: its fixed width, or an offset of 4 bytes each."""
    data_type = _plain_type(file.schema_arrow.field(column).type)
    while hasattr(data_type, "value_type"):
        data_type = data_type.value_type
    try:
        width = int(data_type.bit_width)
    except ValueError:
        width = 32
    return max(0, values) * width // 8


def _plain(column: pa.Array) -> pa.Array:
    return column.cast(_plain_type(column.type)) if _plain_type(column.type) is not column.type else column


def _plain_type(data_type: Any) -> Any:
    import pyarrow as pa

    return data_type.value_type if pa.types.is_dictionary(data_type) else data_type


def _page_sizes(stream: BinaryIO, chunk: Any, label: str, limit: MemoryLimit) -> Iterator[int]:
    """Uncompressed bytes of each page of a column chunk, from the page headers. Raises ValueError for a damaged one."""
    start, size = chunk.data_page_offset, chunk.total_compressed_size
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    limit.check(label, size)
    stream.seek(start)
    data, offset = stream.read(size), 0
    while offset < len(data):
        try:
            fields, offset = _page_header(data, offset)
        except (IndexError, RecursionError):
            raise ValueError(f"{label}: damaged page header") from None
        if min(fields[2], fields[3]) < 0:
            raise ValueError(f"{label}: damaged page header")
        yield fields[2]
        offset += fields[3]


def _page_header(data: bytes, offset: int) -> tuple[dict[int, int], int]:
    """Parse a page header (fields 2: uncompressed bytes, 3: compressed bytes) or a struct in it; and the offset behind.

    Thrift's compact protocol: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
    """
    fields, number = {2: -1, 3: -1}, 0
    while data[offset]:
        kind, step, offset = data[offset] & 15, data[offset] >> 4, offset + 1
        if not step:
            number, offset = _zigzag(data, offset)
        else:
            number += step
        if kind == 5:
            fields[number], offset = _zigzag(data, offset)
        else:
            offset = _skip(data, offset, kind)
    return fields, offset + 1


def _skip(data: bytes, offset: int, kind: int) -> int:
    """The offset behind a value. kind: 1, 2 boolean, 3 byte, 4 to 6 integer, 7 double, 8 binary, 9, 10 list, 12 struct."""
    if kind in (1, 2, 3, 7):
        return offset + {3: 1, 7: 8}.get(kind, 0)
    if kind in (4, 5, 6):
        return _varint(data, offset)[1]
    if kind == 8:
        size, offset = _varint(data, offset)
        return offset + size
    if kind in (9, 10):
        size, element, offset = data[offset] >> 4, data[offset] & 15, offset + 1
        if size == 15:
            size, offset = _varint(data, offset)
        if size > len(data):  # an element takes at least one byte
            raise IndexError
        for _ in range(size):
            offset = _skip(data, offset, 3 if element in (1, 2) else element)  # a boolean in a list takes a byte
        return offset
    if kind != 12:
        raise IndexError
    return _page_header(data, offset)[1]


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[offset] & 127) << shift
        shift, offset = shift + 7, offset + 1
        if not data[offset - 1] & 128:
            return value, offset
        if shift > 63:
            raise IndexError


def _zigzag(data: bytes, offset: int) -> tuple[int, int]:
    value, offset = _varint(data, offset)
    return (value >> 1) ^ -(value & 1), offset
