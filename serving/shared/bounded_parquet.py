"""Columns of a Parquet file read within a memory limit, whatever the file's footer declares.

A file of 2 kB can take gigabytes when it is read: a page of zeros that zstd packed 30,000 : 1, one dictionary value that
every row repeats (RLE), one prefix that every row repeats (DELTA_BYTE_ARRAY). The footer shows the first of these, unless
it lies; the page headers, which pyarrow allocates by, are therefore read as well. The other two are found while reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet

MIB = 1024 * 1024
MAX_BATCH = 65_536  # rows decoded at once


@dataclass(frozen=True)
class MemoryLimit:
    """The most memory that one column may take when it is read, and the params key that sets it ('' where none does).

    row_bytes: what one listed row takes in Python (its reference, its label, its object), which bounds the rows.
    """

    mib: int
    key: str = ""
    row_bytes: int = 256

    def check(self, what: str, size: int) -> None:
        """Raise TooLargeError when `size` bytes are above the limit; what: the column, for the message."""
        if size > self.mib * MIB:
            raise TooLargeError(what, size, self)


class TooLargeError(Exception):
    """Reading would take more memory than the limit; the message names what, its size, the limit and how to raise it."""

    def __init__(self, what: str, size: int, limit: MemoryLimit) -> None:
        advice = f"; raise {limit.key} if that is right" if limit.key else ""
        super().__init__(
            f"{what} takes at least {-(-size // MIB):,} MiB when it is read, above the limit of {limit.mib:,} MiB{advice}"
        )


def read_column(
    file: pyarrow.parquet.ParquetFile,
    column: str,
    limit: MemoryLimit,
    groups: Sequence[int] | None = None,
    stream: BinaryIO | None = None,
) -> pa.ChunkedArray:
    """One column of some row groups (all if None), dictionaries decoded. Peak memory: about twice the limit.

    stream: the file opened for reading bytes, whose page headers are then compared with the footer; without it the footer
    is believed. Raises TooLargeError, and pyarrow's errors for a damaged file.
    """
    import pyarrow as pa

    footer, what = file.metadata, f"column {column!r}"
    chosen = range(footer.num_row_groups) if groups is None else groups
    place = [i for i in range(footer.num_columns) if is_part(footer.schema.column(i).path, column)]
    chunks = [footer.row_group(group).column(i) for group in chosen for i in place]
    rows = sum(footer.row_group(group).num_rows for group in chosen)
    values = sum(chunk.num_values for chunk in chunks)  # more than the rows in a column of lists
    declared = sum(chunk.total_uncompressed_size for chunk in chunks)
    limit.check(what, max(declared, _least_bytes(file, column, max(rows, values))))
    pages = [chunk.total_uncompressed_size for chunk in chunks]
    if stream is not None:
        pages = [sum(_page_sizes(stream, chunk, what, limit)) for chunk in chunks]
        limit.check(what, sum(pages))
    if any(chunk.physical_type == "BYTE_ARRAY" for chunk in chunks):
        # No value is longer than the pages of its chunk: no batch takes more than a quarter of the limit, or one value.
        batch_rows = max(1, min(MAX_BATCH, limit.mib * MIB // (4 * max([1, *pages]))))
    else:
        batch_rows = max(1, MAX_BATCH * rows // max(1, rows, values))
    parts: list[pa.Array] = []
    size = 0
    for batch in file.iter_batches(batch_rows, row_groups=list(chosen), columns=[column], use_threads=False):
        parts.append(_plain(batch.column(0)))
        size += parts[-1].nbytes
        limit.check(what, size)
    return pa.chunked_array(parts, parts[0].type if parts else _plain_type(file.schema_arrow.field(column).type))


def is_part(path: str, column: str) -> bool:
    """Whether a leaf of the schema is a column or lies in one that is a struct or list."""
    return path == column or path.startswith(f"{column}.")


def _least_bytes(file: pyarrow.parquet.ParquetFile, column: str, values: int) -> int:
    """What so many values of a column's type take at least: its fixed width, or an offset of 4 bytes."""
    kind = _plain_type(file.schema_arrow.field(column).type)
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    try:
        width = int(kind.bit_width)
    except ValueError:
        width = 32
    return max(0, values) * width // 8


def _plain(column: pa.Array) -> pa.Array:
    return column.cast(_plain_type(column.type)) if _plain_type(column.type) is not column.type else column


def _plain_type(kind: Any) -> Any:
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _page_sizes(stream: BinaryIO, chunk: Any, what: str, limit: MemoryLimit) -> Iterator[int]:
    """Uncompressed bytes of each page of a column chunk, as its header has them. Raises ValueError for a damaged header."""
    start, size = chunk.data_page_offset, chunk.total_compressed_size
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    limit.check(what, size)
    stream.seek(start)
    data, at = stream.read(size), 0
    while at < len(data):
        try:
            fields, at = _page_header(data, at)
        except (IndexError, RecursionError):
            raise ValueError(f"{what}: damaged page header") from None
        if min(fields[2], fields[3]) < 0:
            raise ValueError(f"{what}: damaged page header")
        yield fields[2]
        at += fields[3]


def _page_header(data: bytes, at: int) -> tuple[dict[int, int], int]:
    """The integers of a page header (2: uncompressed bytes, 3: compressed bytes) and where its page begins.

    Thrift's compact protocol: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
    """
    fields, number = {2: -1, 3: -1}, 0
    while data[at]:
        kind, step, at = data[at] & 15, data[at] >> 4, at + 1
        if not step:
            number, at = _zigzag(data, at)
        else:
            number += step
        if kind == 5:
            fields[number], at = _zigzag(data, at)
        else:
            at = _skip(data, at, kind)
    return fields, at + 1


def _skip(data: bytes, at: int, kind: int) -> int:
    """The position behind a value: 1 and 2 booleans, 3 byte, 4 to 6 integers, 7 double, 8 binary, 9 and 10 lists, 12 struct."""
    if kind in (1, 2):
        return at
    if kind in (3, 7):
        return at + (1 if kind == 3 else 8)
    if kind in (4, 5, 6):
        return _varint(data, at)[1]
    if kind == 8:
        size, at = _varint(data, at)
        return at + size
    if kind in (9, 10):
        size, element, at = data[at] >> 4, data[at] & 15, at + 1
        if size == 15:
            size, at = _varint(data, at)
        for _ in range(size):
            at = at + 1 if element in (1, 2) else _skip(data, at, element)
        return at
    if kind != 12:
        raise IndexError
    while data[at]:
        inner, step, at = data[at] & 15, data[at] >> 4, at + 1
        at = _skip(data, at if step else _varint(data, at)[1], inner)
    return at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if not data[at - 1] & 128:
            return value, at
        if shift > 63:
            raise IndexError


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
