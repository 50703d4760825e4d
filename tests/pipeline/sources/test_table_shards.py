"""Source `table` with many shards, local and remote: the same rows in any layout; rejected foreign shards."""

import json
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest

from pipeline import split
from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources import BadImageError, open_source, reading_order
from pipeline.sources.shards import CLASSES_KEY, RowGroupCache, Shard
from pipeline.sources.storage import Storage, redact_url
from tests.support.making import data_params, png, write

IMAGES = [png(seed) for seed in range(24)]
LABELS = [seed % 3 for seed in range(24)]


def shards(root, count=3, rows=IMAGES, labels=LABELS, row_group_size=3):
    """Write Parquet files under root/train, in order; root is a folder or a URL."""
    files, base = fsspec.url_to_fs(str(root))
    files.makedirs(f"{base}/train", exist_ok=True)
    size = len(rows) // count
    for number in range(count):
        part = slice(number * size, (number + 1) * size)
        table = pa.table({"image": rows[part], "label": pa.array(labels[part], pa.int16())})
        with files.open(f"{base}/train/{number:05d}.parquet", "wb") as stream:
            pyarrow.parquet.write_table(table, stream, row_group_size=row_group_size)
    return root


def opened(root, **table):
    return open_source(data_params(root, "table", table=table).data)


@pytest.fixture
def memory():
    yield "memory://bucket/photos"
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("kind", ["path", "file", "memory"])
@pytest.mark.parametrize(
    "names",
    ["train", "train/*.parquet", "train/0000[0-2].parquet", [f"train/{i:05d}.parquet" for i in range(3)]],
    ids=["folder", "glob", "brackets", "list"],
)
def test_shards_read_alike_from_a_folder_a_file_address_and_a_bucket(tmp_path, memory, kind, names):
    root = shards({"path": tmp_path, "file": f"file://{tmp_path}", "memory": memory}[kind])
    source = opened(root, train=names)
    assert [source.read(row.reference) for row in source.rows] == IMAGES
    assert [row.label for row in source.rows] == LABELS
    assert [row.reference for row in source.rows[7:9]] == ["train/00000.parquet#7", "train/00001.parquet#0"]


def test_the_split_of_a_bucket_is_that_of_the_folder(tmp_path, memory):
    for root, out in ((shards(tmp_path / "photos"), "local"), (shards(memory), "remote")):
        split.run(data_params(root, "table", table={"train": "train"}), tmp_path / out)
    for name in ("train.parquet", "validation.parquet", "test.parquet"):
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "remote" / name).read_bytes()


def test_paths_of_a_table_in_a_bucket_are_read_from_the_bucket(memory):
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/photos/a/1.png", IMAGES[1])
    files.pipe("/bucket/photos/list.csv", b"path,label\na/1.png,cat\na/2.png,dog\n")
    source = opened(memory, train="list.csv", image=None, path="path")
    assert source.read(source.rows[0].reference) == IMAGES[1] and source.stamp(source.rows[0].reference)
    assert source.stamp(source.rows[1].reference) is None
    with pytest.raises(DataError, match=r"memory://bucket/photos/a/2.png: No such file or directory"):
        source.read(source.rows[1].reference)


def test_row_groups_are_read_once_and_evicted_above_the_cache_size(tmp_path, monkeypatch):
    shard = Shard(Storage(str(shards(tmp_path, 1))), "train/00000.parquet")
    reads, original = [], Shard.read_group
    monkeypatch.setattr(
        Shard, "read_group", lambda self, group, column: (reads.append(group), original(self, group, column))[1]
    )
    plenty = RowGroupCache("image")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda row: plenty.value(shard, row), range(24))) == IMAGES
    assert sorted(reads) == list(range(8))
    reads.clear()
    scarce = RowGroupCache("image", cache_bytes=1)
    assert [scarce.value(shard, row) for row in range(24)] == IMAGES and reads == list(range(8))
    assert scarce.value(shard, 0) == IMAGES[0] and reads[-1] == 0 and len(reads) == 9


def test_reading_order_follows_rows_by_number_and_files_by_name():
    references = ["b#10", "b#9", "a/x#1.png", "a#0", "b#100"]
    assert [references[i] for i in reading_order(references)] == ["a#0", "a/x#1.png", "b#9", "b#10", "b#100"]


def test_class_names_in_a_shards_metadata_are_used_unless_params_set_others(tmp_path):
    table = pa.table({"image": IMAGES[:3], "label": [0, 1, 2]})
    carried = table.replace_schema_metadata({CLASSES_KEY: json.dumps(["ant", "bee", "cat"])})
    pyarrow.parquet.write_table(carried, tmp_path / "train.parquet")
    assert opened(tmp_path).classes == ["ant", "bee", "cat"]
    assert opened(tmp_path, class_names=["a", "b", "c"]).classes == ["a", "b", "c"]
    wrong = table.replace_schema_metadata({CLASSES_KEY: json.dumps(["ant"])})
    pyarrow.parquet.write_table(wrong, tmp_path / "train.parquet")
    with pytest.raises(ParamsError, match=r"train.parquet has 1 name for 3 classes"):
        opened(tmp_path)


@pytest.mark.parametrize("kind", ["path", "memory"])
@pytest.mark.parametrize("keep", [0, 8, 200, -5])
def test_a_shard_cut_off_at_its_end_is_named(tmp_path, memory, kind, keep):
    root = shards(tmp_path if kind == "path" else memory)
    files, base = fsspec.url_to_fs(str(root))
    data = files.cat_file(f"{base}/train/00001.parquet")
    files.pipe_file(f"{base}/train/00001.parquet", data[:keep])
    with pytest.raises(DataError) as caught:
        opened(root, train="train")
    assert str(caught.value).startswith(f"{root}/train/00001.parquet: not readable as a table: ")
    assert "\n" not in str(caught.value)


def test_a_shard_damaged_in_the_middle_is_named_when_its_rows_are_read(tmp_path):
    path = shards(tmp_path) / "train/00001.parquet"
    data = bytearray(path.read_bytes())
    data[600:2600] = bytes(2000)
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        split.run(data_params(tmp_path, "table", table={"train": "train"}), tmp_path / "out")
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "error_text"),
    [
        ({"image": IMAGES[:3], "label": ["a", "b", "c"]}, "column 'label' is string, but int16 in train/00000.parquet"),
        (
            {"image": ["a", "b", "c"], "label": pa.array([0, 1, 2], pa.int16())},
            "column 'image' is string, but binary in",
        ),
        ({"img": IMAGES[:3], "label": pa.array([0, 1, 2], pa.int16())}, "has no column 'image'; it has img, label"),
    ],
)
def test_a_shard_whose_schema_changed_is_named_with_the_one_it_differs_from(tmp_path, columns, error_text):
    shards(tmp_path)
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "train/00001.parquet")
    with pytest.raises(DataError) as caught:
        opened(tmp_path, train="train")
    assert str(caught.value).startswith(f"{tmp_path}/train/00001.parquet: {error_text}")


def test_a_folder_or_pattern_without_shards_is_named(tmp_path, memory):
    write(tmp_path / "empty/readme.txt", b"")
    for root, name in ((tmp_path, "empty"), (tmp_path, "none-*.parquet"), (memory, "none-*.parquet")):
        with pytest.raises(DataError) as caught:
            opened(root, train=name)
        assert str(caught.value) == f"{root}/{name}: holds no .parquet file; set data.table to the shards"
    with pytest.raises(DataError, match=r"memory://bucket/photos/train.parquet: no such file; set data.location"):
        opened(memory)


def test_an_address_of_an_unknown_protocol_is_rejected():
    with pytest.raises(ParamsError, match=r"^data.location is 's4://bucket': Protocol not known: s4"):
        opened("s4://bucket")


def test_missing_credentials_of_a_bucket_are_reported_with_what_to_set(monkeypatch, tmp_path):
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError) as caught:
        opened("s3://bucket/photos")
    message = str(caught.value)
    assert message.startswith("s3://bucket/photos/train.parquet: ") and "\n" not in message
    assert "give this machine credentials that may read it" in message


def test_redact_url_removes_user_password_and_signature():
    assert redact_url("sftp://me:hunter2@host/x.parquet") == "sftp://…@host/x.parquet"  # pragma: allowlist secret
    assert redact_url("https://host/x.parquet?X-Amz-Signature=abc&b=c") == "https://host/x.parquet?…"
    assert redact_url("s3://bucket/shard-?.parquet") == "s3://bucket/shard-?.parquet"
    assert redact_url("/local/odd@name?a=b") == "/local/odd@name?a=b"


def test_image_columns_that_are_structs_of_bytes_and_path_are_read_as_plain_ones(tmp_path):
    for name, images in {"plain": IMAGES, "struct": [{"bytes": data, "path": "x.png"} for data in IMAGES]}.items():
        pyarrow.parquet.write_table(pa.table({"image": images, "label": LABELS}), tmp_path / f"{name}.parquet")
    plain, struct = (opened(tmp_path, train=f"{name}.parquet") for name in ("plain", "struct"))
    assert [struct.read(row.reference) for row in struct.rows] == IMAGES
    split.run(data_params(tmp_path, "table", table={"train": "struct.parquet"}), tmp_path / "out")
    references = pa.chunked_array([[row.reference for row in struct.rows]])
    assert (
        struct.base.groups(references).sizes[0]
        >= plain.base.groups(pa.chunked_array([[row.reference for row in plain.rows]])).sizes[0]
    )
    missing = pa.table({"image": [{"bytes": None, "path": "x"}, {"bytes": b"x", "path": None}], "label": [0, 1]})
    pyarrow.parquet.write_table(missing, tmp_path / "missing.parquet")
    source = opened(tmp_path, train="missing.parquet")
    with pytest.raises(DataError, match="/x: No such file"):
        source.read(source.rows[0].reference)


def test_a_struct_without_bytes_is_read_from_its_path(tmp_path):
    write(tmp_path / "photos/0.png", IMAGES[0])
    images = [
        {"bytes": None, "path": "photos/0.png"},
        {"bytes": IMAGES[1], "path": None},
        {"bytes": None, "path": None},
    ]
    pyarrow.parquet.write_table(pa.table({"image": images, "label": [0, 1, 1]}), tmp_path / "t.parquet")
    source = opened(tmp_path, train="t.parquet")
    assert [source.read(row.reference) for row in source.rows[:2]] == IMAGES[:2]
    with pytest.raises(BadImageError, match="row 2 has no image"):
        source.read(source.rows[2].reference)
