"""Image sources: valid and invalid folders and tables."""

import re
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources import open_source
from pipeline.sources.shards import Shard
from tests.support.making import data_params, encode, folder, picture, png, table, write


def opened(root, source="folder", **changes):
    return open_source(data_params(root, source, **changes).data)


def refused(kind, root, source="folder", **changes):
    with pytest.raises(kind) as caught:
        opened(root, source, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_digits_source_needs_no_file(tmp_path):
    source = opened(tmp_path / "nowhere", "digits")
    assert len(source.rows) == 1797 and source.classes == list("0123456789")
    from sklearn.datasets import load_digits

    from models.preprocess import decode

    assert decode(source.read("5")).size == (8, 8)
    assert [decode(source.read("5")).getpixel((x, 3))[0] for x in range(8)] == pytest.approx(
        load_digits().images[5][3] * 255 / 16, abs=0.5
    )


def test_a_folder_per_class_is_numbered_in_the_order_of_its_names(tmp_path):
    root = folder(tmp_path, {"bee": 2, "ant": 3, "cat/inner": 1, ".hidden": 2})
    source = opened(root)
    assert source.classes == ["ant", "bee", "cat"]
    assert [row.label for row in source.rows] == [0, 0, 0, 1, 1, 2]
    assert source.rows[-1].sample_id == "cat/inner/000.png" and {row.split for row in source.rows} == {"train"}
    assert source.read(source.rows[0].reference) == (root / "ant/000.png").read_bytes()


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_folders_for_train_validation_and_test_are_taken_as_splits(tmp_path, validation):
    source = opened(folder(tmp_path, {"train/a": 3, "train/b": 2, f"{validation}/a": 1, "test/b": 2}))
    actual = [(row.split, source.classes[row.label]) for row in source.rows]
    assert sorted(actual) == sorted(
        [("train", "a")] * 3 + [("train", "b")] * 2 + [("validation", "a")] + [("test", "b")] * 2
    )


def test_a_class_may_be_called_test_where_there_is_no_train_folder(tmp_path):
    assert opened(folder(tmp_path, {"test": 2, "exam": 2})).classes == ["exam", "test"]


@pytest.mark.parametrize(
    ("sizes", "error_text"),
    [
        ({"a": 3, "b": 0}, "b: class without training images; add some or remove the folder"),
        ({"train/a": 3, "train/b": 1, "test/c": 1}, "test/c: is a class of test that train does not have"),
        ({"a": 3}, "holds 1 class folder; expected at least 2, one per class"),
        ({}, "holds 0 class folders; expected at least 2, one per class"),
    ],
)
def test_folders_that_are_not_a_data_set_are_rejected(tmp_path, sizes, error_text):
    assert error_text in refused(DataError, folder(tmp_path, sizes))


@pytest.mark.parametrize("stray", ["notes.txt", "Thumbs.txt", "image", "movie.gif"])
def test_a_stray_file_among_the_images_is_named(tmp_path, stray):
    write(folder(tmp_path, {"a": 2, "b": 2}) / "b" / stray, b"stray")
    message = refused(DataError, tmp_path)
    assert message == f"{tmp_path / 'b' / stray}: is not a .jpg, .jpeg, .png or .webp file; remove it or convert it"


def test_hidden_files_are_skipped_and_suffixes_may_be_upper_case(tmp_path):
    root = folder(tmp_path, {"a": 1, "b": 1})
    write(root / "a" / ".DS_Store", b"x")
    write(root / "a" / "PHOTO.JPEG", encode(picture(9), "JPEG"))
    assert [row.sample_id for row in opened(root).rows] == ["a/000.png", "a/PHOTO.JPEG", "b/000.png"]


@pytest.mark.parametrize("source", ["folder", "table"])
def test_a_location_that_is_not_a_folder_is_rejected(tmp_path, source):
    message = refused(ParamsError, tmp_path / "nowhere", source)
    assert message.startswith(f"data.location is '{tmp_path / 'nowhere'}', which is not a folder")


def columns(labels, **more):
    return {"image": [png(seed) for seed in range(len(labels))], "label": labels, **more}


def test_a_parquet_table_of_encoded_images(tmp_path):
    table(tmp_path / "train.parquet", columns([1, 0, 1], name=["x", "y", "z"]))
    table(tmp_path / "held.parquet", columns([0]))
    source = opened(tmp_path, "table", table={"test": "held.parquet", "class_names": ["no", "yes"]})
    assert source.classes == ["no", "yes"]
    assert [(row.label, row.split) for row in source.rows] == [(1, "train"), (0, "train"), (1, "train"), (0, "test")]
    assert [row.sample_id for row in source.rows] == [f"train.parquet#{i}" for i in range(3)] + ["held.parquet#0"]
    assert source.read(source.rows[2].reference) == png(2)
    named = opened(tmp_path, "table", table={"id": "name"})
    assert [row.sample_id for row in named.rows] == ["x", "y", "z"]


def test_a_csv_table_of_paths_with_text_labels(tmp_path):
    for seed in range(3):
        write(tmp_path / f"images/{seed}.png", png(seed))
    table(tmp_path / "list.csv", {"path": [f"images/{i}.png" for i in range(3)], "kind": ["wolf", "bear", "wolf"]})
    source = opened(tmp_path, "table", table={"train": "list.csv", "image": None, "path": "path", "label": "kind"})
    assert source.classes == ["bear", "wolf"] and [row.label for row in source.rows] == [1, 0, 1]
    assert source.read(source.rows[1].reference) == png(1)
    assert source.rows[1].sample_id == "images/1.png", "an error that names the sample then names the file"


def test_a_row_without_a_path_is_located_by_its_table_row_and_id(tmp_path):
    table(tmp_path / "train.parquet", {"path": ["0.png", None], "label": [0, 1], "name": ["cat-1", "cat-2"]})
    source = opened(tmp_path, "table", table={"image": None, "path": "path", "id": "name"})
    assert source.location(source.rows[0]) == f"{tmp_path}/0.png"
    assert source.location(source.rows[1]) == f"{tmp_path}/train.parquet#1 (cat-2)"


def test_a_parquet_table_of_paths(tmp_path):
    write(tmp_path / "0.png", png(0))
    table(tmp_path / "train.parquet", {"path": ["0.png", "missing.png"], "label": [0, 1]})
    source = opened(tmp_path, "table", table={"image": None, "path": "path"})
    assert source.read(source.rows[0].reference) == png(0)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'missing.png'}: No such file or directory")):
        source.read(source.rows[1].reference)


@pytest.mark.parametrize(
    ("labels", "changes", "kind", "error_text"),
    [
        (
            [0, 1, 3],
            {},
            DataError,
            "train.parquet: column 'label' skips 2; integer labels must be 0..C-1 without a gap",
        ),
        ([1, 2, 3], {}, DataError, "train.parquet: column 'label' skips 0;"),
        ([0, 0, 0], {}, DataError, "train.parquet: column 'label' has 1 class; expected at least 2"),
        ([0, None, 1], {}, DataError, "train.parquet: column 'label' has 1 row without a label"),
        (["a", None, "b"], {}, DataError, "train.parquet: column 'label' has 1 row without a label"),
        ([0.0, 1.0, 2.0], {}, DataError, "train.parquet: column 'label' is double; expected integers or text"),
        ([0, 1, 1], {"label": "klass"}, DataError, "train.parquet: has no column 'klass'; it has image, label"),
        ([0, 1, 1], {"image": "img"}, DataError, "train.parquet: has no column 'img'; it has image, label"),
        ([0, 1, 1], {"id": "name"}, DataError, "train.parquet: has no column 'name'; it has image, label"),
        ([0, 1, 1], {"class_names": ["a"]}, ParamsError, "data.table.class_names has 1 name for 2 classes"),
        (
            [0, 1, 1],
            {"train": "none.parquet"},
            DataError,
            "none.parquet: no such file; set data.location or data.table",
        ),
    ],
)
def test_tables_that_are_not_a_data_set_are_rejected(tmp_path, labels, changes, kind, error_text):
    table(tmp_path / "train.parquet", columns(labels))
    with pytest.raises(kind) as caught:
        source = opened(tmp_path, "table", table=changes)
        source.read(source.rows[0].reference)
    assert error_text in str(caught.value) and "\n" not in str(caught.value)


def test_a_held_out_label_without_training_samples_is_named(tmp_path):
    table(tmp_path / "train.parquet", columns([0, 1]))
    table(tmp_path / "test.parquet", columns([0, 2]))
    message = refused(DataError, tmp_path, "table", table={"test": "test.parquet"})
    assert message.startswith(f"{tmp_path / 'test.parquet'}: label 2 has no training samples")


@pytest.mark.parametrize("labels", [["a", "", "b"], ["0", "", "1"]])
def test_an_empty_label_in_a_csv_file_is_a_missing_one(tmp_path, labels):
    table(tmp_path / "train.csv", {"path": ["0.png", "1.png", "2.png"], "label": labels})
    changes = {"train": "train.csv", "image": None, "path": "path"}
    assert "column 'label' has 1 row without a label" in refused(DataError, tmp_path, "table", table=changes)


def test_a_class_may_be_called_null_or_na(tmp_path):
    table(tmp_path / "train.csv", {"path": ["0.png", "1.png", "2.png"], "label": ["NA", "null", "nan"]})
    assert opened(tmp_path, "table", table={"train": "train.csv", "image": None, "path": "path"}).classes == [
        "NA",
        "nan",
        "null",
    ]


@pytest.mark.parametrize("name", ["train.parquet", "train.csv"])
@pytest.mark.parametrize("data", [b"", b"PAR1 but not really", b'path,label\n"a,1\n2,3,4\n'])
def test_a_table_that_cannot_be_read_is_named(tmp_path, name, data):
    write(tmp_path / name, data)
    message = " ".join(refused_any(tmp_path, name).split())
    assert message.startswith(f"{tmp_path / name}: ")


def refused_any(root, name):
    with pytest.raises(DataError) as caught:
        opened(root, "table", table={"train": name})
    return str(caught.value)


def test_a_table_that_is_a_folder_is_rejected(tmp_path):
    (tmp_path / "train.parquet").mkdir()
    assert refused_any(tmp_path, "train.parquet").startswith(f"{tmp_path / 'train.parquet'}: ")


@pytest.mark.parametrize(
    ("images", "error_text"),
    [
        ([None, None], "train.parquet: row 0 has no image"),
        ([{"data": b"x"}, {"data": b"y"}], "train.parquet: column 'image' holds dict; expected encoded image bytes"),
        ([1, 2], "train.parquet: column 'image' holds int; expected encoded image bytes"),
    ],
)
def test_an_image_column_without_images_is_rejected(tmp_path, images, error_text):
    kind = pa.binary() if images[0] is None else None
    table(tmp_path / "train.parquet", {"image": pa.array(images, type=kind), "label": [0, 1]})
    source = opened(tmp_path, "table")
    with pytest.raises(DataError, match=re.escape(error_text)):
        source.read(source.rows[0].reference)


def test_an_image_beside_the_class_folders_is_rejected_and_not_skipped(tmp_path):
    folder(tmp_path, {"a": 2, "b": 2})
    write(tmp_path / "stray.png", png(99))
    assert "stray.png: lies beside the class folders" in refused(DataError, tmp_path)


def test_two_names_for_the_validation_folder_are_refused(tmp_path):
    folder(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 1, "validation/b": 1})
    assert "both val/ and validation/" in refused(DataError, tmp_path)


def test_a_row_group_is_read_once_by_many_threads(tmp_path, monkeypatch):
    table(tmp_path / "train.parquet", {"image": [png(i) for i in range(8)], "label": [i % 2 for i in range(8)]})
    source = opened(tmp_path, "table")
    reads, original = [], Shard.read_group
    monkeypatch.setattr(Shard, "read_group", lambda *names: (reads.append(names), original(*names))[1])
    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(source.read, [row.reference for row in source.rows]))
    assert actual == [png(i) for i in range(8)] and len(reads) == 1
