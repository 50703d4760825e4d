"""Decompression bombs in tables: small files that expand to gigabytes are rejected in one line, in bounded memory."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from pipeline import split
from pipeline.shared.errors import DataError
from pipeline.sources import open_source
from serving.shared.bounded_parquet import MemoryLimit, read_column
from tests.support.dropping import listing, project
from tests.support.making import data_params, png, write
from tests.support.table_bombs import MIB, many_rows, measured, packed, repeated, same_prefix

pytestmark = pytest.mark.slow
INGEST = """
from pathlib import Path
from pipeline.params import load_params
made = pipeline.ingestion.ingest.ingest(load_params(Path("params.yaml")))
result = [made.added, made.reasons]
"""
SOURCE = """
from pathlib import Path
from pipeline.shared.errors import DataError
from pipeline.params import load_params
try:
    source = pipeline.sources.open_source(load_params(Path("params.yaml")).data)
    result = len(source.read(source.rows[0].reference))
except DataError as error:
    result = str(error)
"""
BOMBS = {
    "label repeated": lambda path: repeated(path, "label", "c" * MIB, 1500, path=["x.png"]),
    "path repeated": lambda path: repeated(path, "path", "c" * MIB, 1500, label=["cat"]),
    "image repeated": lambda path: repeated(path, "image", bytes(MIB), 1500, label=["cat", "dog"]),
    "path prefix": lambda path: same_prefix(path, "path", "c" * MIB, 1500),
    "image packed": lambda path: packed(path, "image", 700 * MIB),
    "image packed, footer lies": lambda path: packed(path, "image", 700 * MIB, lie=True),
    "labels run-length": lambda path: many_rows(path, 10_000_000),
}


def save(params):
    Path("params.yaml").write_text(params.model_dump_json(), encoding="utf-8")  # JSON is YAML


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_in_the_drop_folder_is_refused_in_bounded_memory_and_the_listing_says_why(tmp_path, bomb):
    save(project(tmp_path, min_good_share=0.0, max_table_mib=64))
    size = BOMBS[bomb](Path("data/drop/bomb.parquet")).stat().st_size
    assert size < 100_000
    (added, reasons), grown = measured(INGEST, tmp_path)
    assert added == 0 and set(reasons) == {"table"}
    assert grown < 350, f"{grown} MiB"
    detail = listing()[0]["detail"]
    assert detail.startswith("data/drop/bomb.parquet: ") and "\n" not in detail
    assert "above the limit of 64 MiB; raise ingest.max_table_mib if that is right" in detail


@pytest.mark.parametrize("bomb", ["label repeated", "image repeated", "image packed, footer lies", "labels run-length"])
def test_a_bomb_as_the_source_is_refused_in_bounded_memory(tmp_path, monkeypatch, bomb):
    monkeypatch.chdir(tmp_path)
    BOMBS[bomb](tmp_path / "train.parquet")
    columns = {} if "image" in bomb else {"image": None, "path": "path"}
    save(data_params(tmp_path, "table", table={"max_mib": 64, **columns}))
    error_text, grown = measured(SOURCE, tmp_path)
    assert grown < 350, f"{grown} MiB"
    assert error_text.startswith(f"{tmp_path / 'train.parquet'}: ") and "\n" not in error_text
    assert error_text.endswith("above the limit of 64 MiB; raise data.table.max_mib if that is right")


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_column_reads_as_pyarrow_reads_it_and_its_page_headers_add_up_to_the_footer(tmp_path, compression, version):
    content = {
        "image": [png(seed) for seed in range(50)] * 4,
        "name": [f"photo {seed % 7}" for seed in range(199)] + [None],
        "label": pa.array([seed % 5 for seed in range(200)], pa.int32()),
        "kind": pa.array(["a", "b"] * 100).dictionary_encode(),
        "logits": pa.array([[float(seed)] * 3 for seed in range(200)], pa.list_(pa.float32())),
        "photo": [{"bytes": png(seed), "path": f"{seed}.png"} for seed in range(200)],
    }
    path = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(
        pa.table(content),
        path,
        compression=compression,
        data_page_version=version,
        row_group_size=70,
        data_page_size=4096,
    )
    with path.open("rb") as stream, pyarrow.parquet.ParquetFile(path) as file:
        for name in content:
            expected = file.read(columns=[name]).column(name)
            actual = read_column(file, name, MemoryLimit(64), stream=stream)
            assert actual.to_pylist() == expected.to_pylist(), name
            assert read_column(file, name, MemoryLimit(64), [1]).to_pylist() == expected.to_pylist()[70:140]


def refusal(root, **table):
    with pytest.raises(DataError) as caught:
        split.run(data_params(root, "table", table={"image": None, "path": "path", **table}), root / "out")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_csv_file_with_a_line_of_megabytes_or_thousands_of_columns_or_packed_is_refused(tmp_path):
    write(tmp_path / "line.csv", b"path,label\n" + b"a" * (3 * MIB) + b",cat\n")
    assert refusal(tmp_path, train="line.csv").startswith(f"{tmp_path / 'line.csv'}: not readable as a table: ")
    write(tmp_path / "first.csv", b"path,label" + b"x" * (2 * MIB))
    assert "line 1 has more than 1,048,576 characters" in refusal(tmp_path, train="first.csv")
    write(tmp_path / "wide.csv", b"path,label" + b",x" * 20_000 + b"\n")
    assert "it has 20,002 columns; expected 1 to 1,000" in refusal(tmp_path, train="wide.csv")
    write(tmp_path / "big.csv", b"path,label\n" + b"0.png,cat\n" * 120_000)
    assert "raise data.table.max_mib" in refusal(tmp_path, train="big.csv", max_mib=1)
    write(tmp_path / "labels.csv.gz", gzip.compress(b"path,label\n0.png,cat\n"))
    assert refusal(tmp_path, train="labels.csv.gz").startswith(f"{tmp_path / 'labels.csv.gz'}: not readable as a table")


def test_a_row_group_above_the_limit_is_named_with_the_key_and_read_once_the_limit_is_raised(tmp_path):
    images = [bytes([number]) * MIB for number in range(4)]
    pyarrow.parquet.write_table(
        pa.table({"image": images, "label": [0, 1, 0, 1]}), tmp_path / "train.parquet", compression="none"
    )
    source = open_source(data_params(tmp_path, "table", table={"max_mib": 3}).data)
    for row in source.rows[:2]:
        with pytest.raises(DataError, match=r"column 'image' takes at least 5 MiB .* limit of 3 MiB; raise data.table"):
            source.read(row.reference)
    raised = open_source(data_params(tmp_path, "table", table={"max_mib": 5}).data)
    assert [raised.read(row.reference) for row in raised.rows] == images
