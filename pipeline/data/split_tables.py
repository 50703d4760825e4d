"""Reading of the split tables that stage `split` writes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from models.prior import class_key
from pipeline.shared.artifacts import SPLIT
from pipeline.shared.errors import ParamsError, StageError

GROUP = "group"  # column of the group of each image; only with data.group
Filter = list[tuple[str, str, Any]]


class ArrowStrings(Sequence[str]):
    """A text column as a sequence, without a Python object for each string."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int) -> str:
        return self._column[index].as_py()


def read_split(split: str, columns: list[str], folder: Path = SPLIT, only: Filter | None = None) -> pa.Table:
    """Read columns of a split's table: all rows, or those that a pyarrow filter selects.

    Raises ParamsError when the split does not exist, StageError when its file is damaged.
    """
    path = folder / f"{split}.parquet"
    with _explained(path):
        # read_table leaves threads that abort a program which exits immediately, as after an error (status 134).
        table = pyarrow.parquet.ParquetFile(path).read(columns, use_threads=False)
        return table if only is None else table.filter(pyarrow.parquet.filters_to_expression(only))


def read_groups(split: str, folder: Path = SPLIT) -> list[str] | None:
    """Group of each image of a split; None if the split was made without data.group. Raises as `read_split` does."""
    path = folder / f"{split}.parquet"
    with _explained(path):
        has_groups = GROUP in pyarrow.parquet.read_schema(path).names
    return read_split(split, [GROUP], folder).column(GROUP).to_pylist() if has_groups else None


def count_rows(split: str, folder: Path = SPLIT) -> int:
    """Number of images of a split, from the metadata of its table. Raises as `read_split` does."""
    path = folder / f"{split}.parquet"
    with _explained(path):
        return pyarrow.parquet.read_metadata(path).num_rows


def read_batches(path: Path, column: str, rows: int) -> Iterator[pa.Array]:
    """Yield one column of a split's table in batches of at most `rows` rows. Raises as `read_split` does."""
    with _explained(path), pyarrow.parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise StageError(f"{path}: has no column {column!r}; run `dvc repro -f split`")
        for batch in file.iter_batches(rows, columns=[column], use_threads=False):
            yield batch.column(0)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; run `dvc repro split` first") from None
    except (pa.ArrowException, OSError) as error:
        raise StageError(f"{path}: damaged ({str(error).splitlines()[0]}); run `dvc repro -f split`") from None


def load_classes(folder: Path = SPLIT) -> list[str]:
    """Read class names in label order. Raises ParamsError when the split does not exist, StageError when it is damaged."""
    path = folder / "classes.json"
    try:
        return [class_key(name) for name in json.loads(path.read_text(encoding="utf-8"))]
    except OSError as error:
        raise ParamsError(f"{path}: {error.strerror}; run `dvc repro split` first") from None
    except ValueError as error:
        raise StageError(f"{path}: damaged ({error}); run `dvc repro -f split`") from None


def data_sha256(split: Path) -> str:
    """sha256 of all images' split, id, label and content hash: equal for equal data, independent of the file format.

    For task segmentation also of the content hash of the label map.
    """
    digest = hashlib.sha256()
    for name in ("train", "validation", "test"):
        table = read_split(name, ["sample_id", "label", "sha256", "label_map_sha256"], split)
        digest.update(json.dumps([name, *table.to_pydict().values()]).encode())
    return digest.hexdigest()
