"""A class name in two Unicode forms: composed (NFC, usual on Linux) and decomposed (NFD, copied from macOS)."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from pipeline import split
from pipeline.ingestion.ingest import ingest
from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources import open_source
from serving.client.priors import parse_prior, vector_of
from serving.shared.errors import InputError
from tests.support.data_commands import command
from tests.support.dropping import drop_images, project, rows_of
from tests.support.making import data_params, folder, png, table, write

NFC, NFD = "caf\u00e9", "cafe\u0301"


def classes():
    return json.loads(Path("data/split/classes.json").read_text(encoding="utf-8"))


def test_the_two_forms_differ_as_text_and_are_one_name():
    assert NFC != NFD and unicodedata.normalize("NFC", NFD) == NFC


def test_a_test_folder_in_the_other_form_is_the_same_class(tmp_path):
    folder(tmp_path, {f"train/{NFC}": 4, "train/dog": 4, f"test/{NFD}": 2, "test/dog": 2})
    source = open_source(data_params(tmp_path).data)
    assert source.classes == [NFC, "dog"]
    assert [row.label for row in source.rows if row.split == "test"] == [0, 0, 1, 1]
    assert all(source.read(row.reference) for row in source.rows), "files are read by the name that they have"


def test_two_folders_whose_names_differ_in_form_alone_are_refused(tmp_path):
    folder(tmp_path, {NFC: 4, NFD: 4, "dog": 4})
    with pytest.raises(DataError, match="has 2 folders named 'caf\u00e9' that differ in their Unicode form"):
        open_source(data_params(tmp_path).data)


def test_labels_of_a_table_in_both_forms_are_one_class(tmp_path):
    for seed in range(3):
        write(tmp_path / f"{seed}.png", png(seed))
    content = {"path": ["0.png", "1.png", "2.png"], "label": [NFC, NFD, "dog"]}
    for name in ("train.csv", "train.parquet"):
        table(tmp_path / name, content)
        source = open_source(data_params(tmp_path, "table", table={"train": name, "image": None, "path": "path"}).data)
        assert source.classes == [NFC, "dog"] and [row.label for row in source.rows] == [0, 0, 1]
    table(tmp_path / "numbers.parquet", {"path": content["path"], "label": [0, 1, 2]})
    twice = {"train": "numbers.parquet", "image": None, "path": "path", "class_names": [NFC, NFD, "dog"]}
    with pytest.raises(ParamsError, match="class_names has 'caf\u00e9' twice"):
        open_source(data_params(tmp_path, "table", table=twice).data)


@pytest.mark.parametrize("new_classes", ["refuse", "accept", [NFD]])
def test_a_drop_in_the_other_form_joins_its_class(tmp_path, new_classes):
    params = project(tmp_path, {NFC: 9, "dog": 9}, new_classes=new_classes)
    drop_images(NFD, range(3))
    write(Path("data/drop/labels.csv"), f"path,label\nphotos/9.png,{NFD}\n".encode())
    write(Path("data/drop/photos/9.png"), png(4242))
    report = ingest(params)
    assert (report.added, report.new_classes) == (4, [])
    split.run(params)
    assert classes() == [NFC, "dog"] and [row["label"] for row in rows_of("train")][-4:] == [0] * 4


def test_a_prior_by_name_finds_a_class_in_either_form_and_names_it_once():
    actual = vector_of(parse_prior({NFD: 0.75, "dog": 0.25}), [NFC, "dog"], 2)
    assert np.allclose(actual, [0.75, 0.25])
    assert np.allclose(vector_of(parse_prior({NFC: 0.75, "dog": 0.25}), [NFD, "dog"], 2), [0.75, 0.25])
    with pytest.raises(InputError, match="names a class twice"):
        parse_prior({NFC: 0.5, NFD: 0.25, "dog": 0.25})


@pytest.mark.parametrize("name", ["a\nb", " ", "a\x85b", "\u2028"])
def test_a_name_that_the_label_file_of_the_server_cannot_hold_is_refused_before_anything_is_trained(
    tmp_path, capsys, name
):
    made = data_params(folder(tmp_path / "photos", {name: 6, "dog": 6}))
    with pytest.raises(DataError) as caught:
        split.run(made, tmp_path / "out")
    assert f"class name {name!r} is empty or has a line break; rename the class" in str(caught.value)
    assert command(tmp_path, made, "--near", "off") == 1
    assert f"error: class name {name!r} is empty" in capsys.readouterr().out
