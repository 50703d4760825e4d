"""Write Parquet and CSV files of a few kilobytes that expand to gigabytes, and measure the memory of reading them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

MIB = 1024 * 1024
# Runs code in a separate process; prints its result and the growth of the process's peak memory in MiB.
MEASURED = """
import json, os, sys
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024
import pyarrow.parquet, pipeline.ingestion.ingest, pipeline.sources, pipeline.params, serving.drift.logged_logits
before = peak()
exec(sys.argv[1])
print(json.dumps([result, peak() - before]))
"""


def measured(code: str, folder: Path) -> tuple[object, int]:
    """Run Python code in a subprocess; return its variable `result` and the growth of its peak memory in MiB."""
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, code], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    result, grown = json.loads(ended.stdout.splitlines()[-1])
    return result, grown


def repeated(file: Path, column: str, value: bytes | str, rows: int, **others: list[object]) -> Path:
    """Write one dictionary value and `rows` rows that refer to it."""
    values = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value]))
    columns = {column: values, **{name: pa.array(content * (rows // len(content))) for name, content in others.items()}}
    return _write(file, columns, store_schema=False)


def same_prefix(path: Path, column: str, value: str, rows: int) -> Path:
    """Write a value whose repetitions are stored as the length of a shared prefix (DELTA_BYTE_ARRAY)."""
    return _write(
        path,
        {column: pa.array([value] * rows), "label": pa.array([0] * rows)},
        use_dictionary=False,
        column_encoding={column: "DELTA_BYTE_ARRAY", "label": "PLAIN"},
    )


def packed(path: Path, column: str, size: int, lie: bool = False) -> Path:
    """Write a value of zeros and one of a single byte, packed by zstd. lie: the footer has a false size of one byte."""
    _write(path, {column: pa.array([bytes(size), b"x"]), "label": pa.array([0, 1])}, use_dictionary=False)
    if lie:
        group = pyarrow.parquet.read_metadata(path).row_group(0)
        data = path.read_bytes()
        start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        footer = data[start:]
        for true in {group.column(0).total_uncompressed_size, group.total_byte_size}:
            size_field = _varint(2 * true)
            footer = footer.replace(size_field, bytes([0x82, *[0x80] * (len(size_field) - 2), 0]))
        path.write_bytes(data[:start] + footer)
        assert pyarrow.parquet.read_metadata(path).row_group(0).column(0).total_uncompressed_size == 1
    return path


def many_rows(path: Path, rows: int) -> Path:
    """Write labels that run-length encoding stores in a few bytes."""
    zeros = pa.array(np.zeros(rows, np.int8))
    return _write(path, {"label": zeros.cast(pa.int64()), "path": zeros.cast(pa.string()).dictionary_encode()})


def _write(path: Path, columns: dict[str, pa.Array], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path, compression="zstd", write_statistics=False, **options)
    return path


def _varint(number: int) -> bytes:
    made = []
    while number > 127:
        made.append(number & 127 | 128)
        number >>= 7
    return bytes([*made, number])
