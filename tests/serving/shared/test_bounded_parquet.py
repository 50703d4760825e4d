"""Reading evaluation's predictions, and Parquet files with damaged page headers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from serving.shared import bounded_parquet
from serving.shared.bounded_parquet import MemoryLimit, read_column, read_predictions
from serving.shared.errors import ServingError


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    logits = pa.array([[0.5, 1.0], [2.0, -1.0]], pa.list_(pa.float32()))
    table = pa.table({"sample_id": ["a", "b"], "label": [1, 0], "logits": logits})
    pyarrow.parquet.write_table(table, tmp_path / "predictions.parquet")
    return tmp_path / "predictions.parquet"


def test_predictions_are_labels_logits_and_the_requested_columns(predictions: Path) -> None:
    labels, logits, others = read_predictions(predictions, "sample_id")
    assert (labels.tolist(), logits.tolist(), others) == ([1, 0], [[0.5, 1.0], [2.0, -1.0]], [["a", "b"]])
    assert logits.dtype == np.float64
    assert read_predictions(predictions)[2] == []


def test_predictions_that_cannot_be_read_are_errors_in_one_line(
    predictions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError):
        read_predictions(predictions.with_name("nowhere.parquet"))
    damaged = r"predictions\.parquet: damaged \(.+\); run `dvc repro -f evaluate`$"
    with pytest.raises(ServingError, match=damaged):
        read_predictions(predictions, "no such column")
    with monkeypatch.context() as patch:
        patch.setattr(bounded_parquet, "PREDICTIONS_MIB", 0)
        with pytest.raises(ServingError, match=r"predictions\.parquet: column 'label' takes at least 1 MiB when it is"):
            read_predictions(predictions)
    pyarrow.parquet.write_table(pa.table({"label": [1, 0], "logits": [[0.5, 1.0], [2.0]]}), predictions)
    with pytest.raises(ServingError, match=damaged):  # rows of two lengths
        read_predictions(predictions)
    predictions.write_bytes(predictions.read_bytes()[:-9])
    with pytest.raises(ServingError, match=damaged):
        read_predictions(predictions)


def test_a_page_header_with_an_endless_list_is_damaged(predictions: Path) -> None:
    chunk = pyarrow.parquet.read_metadata(predictions).row_group(0).column(1)
    start = chunk.dictionary_page_offset
    # Field 1: a list of 2^56 bytes, which needs no byte of the file to be skipped one by one.
    header = bytes([0x19, 0xF3, *[0x80] * 8, 0x01])
    data = predictions.read_bytes()
    predictions.write_bytes(data[:start] + header + data[start + len(header) :])
    with (
        predictions.open("rb") as stream,
        pyarrow.parquet.ParquetFile(predictions) as file,
        pytest.raises(ValueError, match="column 'label': damaged page header"),
    ):
        read_column(file, "label", MemoryLimit(1), stream=stream)
