"""Tables with number-like cells, repeated columns or wrong labels: parsed values, and the exit status."""

import subprocess
import sys

import pytest

from pipeline.shared.errors import DataError
from pipeline.sources import open_source
from tests.support.making import ROOT, data_params, png, table, write


def opened(root, **changes):
    settled = {"train": "t.csv", "image": None, "path": "path", **changes}
    return open_source(data_params(root, "table", table=settled).data)


@pytest.mark.parametrize(
    "labels",
    [["0", "00", "1"], ["000", "001", "002"], ["false", "true"], ["2024", "2025", "2026"], ["1e3", "2e3"], ["-0", "0"]],
)
def test_a_label_of_a_csv_file_is_the_text_that_is_written(tmp_path, labels):
    table(tmp_path / "t.csv", {"path": [f"{i}.png" for i in range(len(labels))], "label": labels})
    source = opened(tmp_path)
    assert source.classes == sorted(labels) and [row.label for row in source.rows] == list(range(len(labels)))


def test_paths_and_ids_of_a_csv_file_keep_their_zeros(tmp_path):
    for name in ("007", "7", "1e3"):
        write(tmp_path / name, png(len(name)))
    table(tmp_path / "t.csv", {"path": ["007", "7", "1e3"], "label": ["a", "b", "a"], "id": ["001", "1", "0x1"]})
    source = opened(tmp_path, id="id")
    assert [row.sample_id for row in source.rows] == ["001", "1", "0x1"]
    assert source.read(source.rows[0].reference) == source.read(source.rows[2].reference) == png(3)


def test_csv_labels_are_integers_only_if_the_params_define_it(tmp_path):
    labels = [str(number) for number in range(11)]
    table(tmp_path / "t.csv", {"path": labels, "label": labels})
    assert opened(tmp_path).classes == sorted(labels), "as text: 10 before 2"
    assert opened(tmp_path, label_type="integer").classes == labels
    named = opened(tmp_path, class_names=[f"class {number}" for number in range(11)])
    assert named.classes[10] == "class 10" and named.rows[10].label == 10
    table(tmp_path / "t.csv", {"path": labels, "label": ["00", *labels[1:]]})
    with pytest.raises(DataError, match=r"has the label '00'; expected integers, or set data.table.label_type: text"):
        opened(tmp_path, label_type="integer")


def test_two_columns_of_one_name_are_named(tmp_path):
    write(tmp_path / "t.csv", b"path,label,label\n0.png,a,x\n1.png,b,x\n")
    with pytest.raises(DataError, match=r"t.csv: has 2 columns 'label'; rename all but one"):
        opened(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_a_stage_that_refuses_a_table_ends_with_status_1_every_time(tmp_path, name):
    columns = {"image": [b"x"] * 8} if name == "t.parquet" else {"path": ["x.png"] * 8}
    table(tmp_path / "data/source" / name, {**columns, "label": [1] * 4 + [2] * 4})
    changes = {"train": name, "label_type": "integer"} | (
        {} if name == "t.parquet" else {"image": None, "path": "path"}
    )
    made = data_params(tmp_path / "data/source", "table", table=changes)
    write(tmp_path / "params.yaml", made.model_dump_json().encode())
    command = [sys.executable, "-m", "pipeline.split"]
    for _ in range(4):
        ended = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False
        )
        assert ended.returncode == 1 and "skips 0" in ended.stderr, ended
