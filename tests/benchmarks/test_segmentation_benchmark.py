"""benchmarks.segmentation: smoke test of the whole comparison at a small size; no accuracy is asserted."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from benchmarks import segmentation
from tests.support.project import ROOT

SMALL = {
    "segmentation": {
        "canvas": [24, 32], "queries": 16, "keys": 16, "augment": {"scale": [32, 24], "ratio": [1.0, 1.0], "crop": [16, 16]},
    },
    "student": {"queue_total": 110, "queue_minimum": 5},
}  # fmt: skip


def encoded(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "png")
    return file.getvalue()


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    labels = np.kron(generator.integers(0, 11, (22, 3, 4)), np.ones((12, 12))).astype(np.uint8)
    labels[:, 0] = 255
    rows = {
        "image": [encoded(generator.integers(0, 256, (36, 48, 3), dtype=np.uint8)) for _ in labels],
        "label_map": [encoded(entry) for entry in labels],
        "split": ["train"] * 16 + ["val"] * 2 + ["test"] * 4,
        "name": [f"{number:02d}" for number in range(len(labels))],
    }
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table(rows), folder / "camvid-240.parquet")
    return folder


@pytest.mark.slow
def test_every_row_is_trained_served_at_every_strength_and_not_repeated(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(SMALL))
    arguments = [
        "--data",
        str(data),
        "--work",
        str(tmp_path / "work"),
        "--recipe",
        str(segmentation.RECIPE),
        str(small),
    ]
    arguments += ["--seeds", "0", "--epochs", "1", "--threads", "1"]
    assert segmentation.main([*arguments, "--output", str(tmp_path / "report.md")]) == 0
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(report.count(f"| {name} |") == 4 for name in segmentation.ROWS)
    [stored] = (tmp_path / "work").glob("*/runs/0/L_cls-0.2.json")
    areas = json.loads(stored.read_text(encoding="utf-8"))["areas"]
    # The first of 36 rows is ignored, and is in no area.
    assert len(areas) == len(segmentation.STRENGTHS) and {sum(labelled) for _, _, labelled in areas} == {4 * 35 * 48}
    linear = json.loads(stored.with_name("cross-entropy").joinpath("config.json").read_text(encoding="utf-8"))
    assert linear["segmentation"]["classifier"] == "linear" and linear["adjustment"] == 0
    capsys.readouterr()
    assert segmentation.main(arguments) == 0
    assert capsys.readouterr().out.startswith("`python -m benchmarks.segmentation")


def test_a_row_is_printed_as_it_was_trained():
    # Class 0 is found only at the strength at which the network acts as trained with alpha 0.2.
    found, missed = [[5, 5], [5, 5], [5, 5]], [[0, 5], [0, 10], [5, 5]]
    areas = [found if round(1 - strength, 6) == 0.2 else missed for strength in segmentation.STRENGTHS]
    run = {"areas": areas, "cpu_seconds": 60.0}
    [*_, row] = segmentation.table({"L_cls 0.2": [run]}, ["many", "few"]).splitlines()
    assert row.startswith("| L_cls 0.2 | 100.00 | 100.00 | 100.00 |")
    [*_, row] = segmentation.table({"L_cls 0": [run]}, ["many", "few"]).splitlines()
    assert row.startswith("| L_cls 0 | 25.00 | 50.00 | 50.00 |")


def test_differences_are_paired_by_seed_with_rows_as_they_were_trained():
    """Of one class: accuracy 0.5, 0.6, 0.7 of cross-entropy and 0.2 more of L_GML; L_cls is not in the run."""

    def run(right):
        return {"areas": [[[right], [10], [10]]] * len(segmentation.STRENGTHS), "cpu_seconds": 1.0}

    results = {"cross-entropy": [run(n) for n in (5, 6, 7)], "L_cls + L_GML 0.2": [run(n) for n in (7, 8, 9)]}
    [*_, base, row] = segmentation.differences(results).splitlines()
    assert base == "| cross-entropy |  |  |  |  |"
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[1:] == ["+20.00 (+20.00 to +20.00)", "", ""]
    miou = [right / (20 - right) for right in (5, 6, 7, 8, 9)]
    mean = sum(miou[n + 2] - miou[n] for n in range(3)) / 3
    assert cells[0].startswith(f"{100 * mean:+.2f} (")
