"""The split tables, as the stages after `split` read them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from pipeline.artifacts import SPLIT
from pipeline.errors import ParamsError, StageError


def read_split(split: str, columns: list[str], folder: Path = SPLIT) -> pa.Table:
    """Columns of one split's table. Raises ParamsError when the split is not made, StageError when its file is damaged."""
    path = folder / f"{split}.parquet"
    try:
        return pyarrow.parquet.read_table(path, columns=columns)
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; run `dvc repro split` first") from None
    except (pa.ArrowException, OSError) as error:
        raise StageError(f"{path}: damaged ({str(error).splitlines()[0]}); run `dvc repro -f split`") from None


def load_classes(folder: Path = SPLIT) -> list[str]:
    """Class names in label order. Raises ParamsError when the split is not made, StageError when the file is damaged."""
    path = folder / "classes.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParamsError(f"{path}: {error.strerror}; run `dvc repro split` first") from None
    except ValueError as error:
        raise StageError(f"{path}: damaged ({error}); run `dvc repro -f split`") from None
