"""Data for tests of drift: Gaussian classes with exact logits, test predictions, damaged logit logs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from conftest import COUNTS

from models.prior import softmax
from serving.repository.manifest import Manifest

MEANS = 1.5 * np.random.default_rng(0).normal(size=(5, 4))
TRAINING = np.array(COUNTS) / sum(COUNTS)
LIVE = np.array([0.1, 0.1, 0.2, 0.3, 0.3])


def drawn(prior: np.ndarray, samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels of Gaussian classes, and exact logits for the balanced prior."""
    random = np.random.default_rng(1000 + seed)  # a seed other than those of sampling and resampling
    labels = random.choice(5, samples, p=prior)
    points = MEANS[labels] + random.normal(size=(samples, 4))
    return labels, points @ MEANS.T - (MEANS**2).sum(1) / 2


def damage(path: Path, kind: str) -> None:
    """Write an invalid file with a log's name, or a log of another release."""
    whole = path.read_bytes()
    table = pyarrow.parquet.ParquetFile(path).read()
    columns = {name: table[name] for name in table.column_names}
    if kind in ("truncated", "empty", "garbage", "no footer"):
        path.write_bytes(
            {"truncated": whole[:-40], "empty": b"", "garbage": b"PAR1" * 99, "no footer": whole[:400]}[kind]
        )
        return
    if kind == "missing column":
        del columns["time"]
    if kind == "more columns":
        columns["image"] = pa.array([b"x"] * len(table))
    if kind in ("nan", "null"):
        rows = table["logits"].to_pylist()
        rows[7][2] = float("nan") if kind == "nan" else None
        columns["logits"] = pa.array(rows, pa.list_(pa.float32(), 5))
    if kind == "null time":
        columns["time"] = pa.array([None] * len(table), table["time"].type)
    if kind == "another width":
        columns["logits"] = pa.array([[0.0] * 4] * len(table), pa.list_(pa.float32(), 4))
    metadata = dict(table.schema.metadata) | ({b"tailor_logits": b"2"} if kind == "another format" else {})
    metadata |= {b"classes_sha256": b"0"} if kind == "other classes" else {}
    metadata = {} if kind == "foreign" else metadata
    pyarrow.parquet.write_table(pa.table(columns).replace_schema_metadata(metadata), path)


def write_predictions(path: Path, manifest: Manifest, temperature: float = 1.0, images: int = 2000) -> Manifest:
    """Write test predictions in the format of the evaluation, and return the manifest of their release."""
    labels, logits = drawn(np.full(5, 0.2), images, 9)
    logits = logits * temperature
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pa.array(list(logits.astype(np.float32)), pa.list_(pa.float32()))
    pyarrow.parquet.write_table(
        pa.table({"sample_id": list(map(str, labels)), "label": labels, "logits": column}), path
    )
    p = softmax(logits.astype(np.float32).astype(np.float64))
    metrics = {"balanced": {"nll": float(-np.log(p[np.arange(images), labels]).mean())}}
    return manifest.model_copy(update={"metrics": metrics})
