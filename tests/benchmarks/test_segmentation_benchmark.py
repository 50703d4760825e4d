"""benchmarks.segmentation: smoke test of the whole comparison at a small size; no accuracy is asserted."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import segmentation
from pipeline.params import SegmentationAugmentParams


def encoded(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "png")
    return file.getvalue()


@pytest.fixture
def pack(tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation, "HEIGHT", 24)
    monkeypatch.setattr(segmentation, "WIDTH", 32)
    monkeypatch.setattr(segmentation, "AUGMENT", SegmentationAugmentParams(scale=[32, 24], crop=[16, 16]))
    monkeypatch.setattr(segmentation, "QUEUE", {"queue_total": 110, "queue_minimum": 5, "queries": 16, "keys": 16})
    generator = np.random.default_rng(0)
    labels = np.kron(generator.integers(0, 11, (20, 3, 4)), np.ones((12, 12))).astype(np.uint8)
    labels[:, 0] = 255
    rows = {
        "image": [encoded(generator.integers(0, 256, (36, 48, 3), dtype=np.uint8)) for _ in labels],
        "label_map": [encoded(entry) for entry in labels],
        "split": ["train"] * 16 + ["test"] * 4,
    }
    path = tmp_path / "pack.parquet"
    pq.write_table(pa.table(rows), path)
    return path


@pytest.mark.slow
def test_every_row_is_trained_served_at_every_strength_and_not_repeated(pack, tmp_path, capsys):
    arguments = [
        "--data",
        str(pack),
        "--work",
        str(tmp_path / "work"),
        "--seeds",
        "0",
        "--steps",
        "2",
        "--threads",
        "1",
    ]
    assert segmentation.main([*arguments, "--output", str(tmp_path / "report.md")]) == 0
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(report.count(f"| {row.name} |") == 3 for row in segmentation.ROWS)
    stored = json.loads((tmp_path / "work/L_cls_0.2-2-0.json").read_text(encoding="utf-8"))
    assert list(stored["areas"]) == [f"{strength:g}" for strength in segmentation.STRENGTHS]
    # The first of 36 rows is ignored, and is in no area.
    assert {sum(areas[2]) for areas in stored["areas"].values()} == {4 * 35 * 48}
    capsys.readouterr()
    assert segmentation.main(arguments) == 0
    assert capsys.readouterr().out.startswith("`python -m benchmarks.segmentation")
