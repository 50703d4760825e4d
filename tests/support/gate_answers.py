"""Generated predictions of runs for tests of the gate and the comparison."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from models.prior import shot_group
from pipeline.data.class_prior import Prior
from pipeline.evaluation.predictions import Contender, Predictions
from pipeline.params import GateParams

COUNTS = [300, 200, 60, 30, 12, 8]


C = len(COUNTS)


FAST = GateParams(resamples=300)


def prior_of(classes=None):
    p = np.array(COUNTS) / sum(COUNTS)
    names = classes or [f"class {c}" for c in range(C)]
    return Prior(names, COUNTS, p.tolist(), np.log(p).tolist(), [shot_group(n) for n in COUNTS])


LABELS = np.repeat(np.arange(C), 60)


def answering(accuracy, seed):
    """Return logits that are correct for a share of each class. accuracy: one number, or one per class."""
    random = np.random.default_rng(seed)
    right = random.random(len(LABELS)) < np.broadcast_to(accuracy, C)[LABELS]
    predicted = np.where(right, LABELS, (LABELS + 1 + random.integers(0, C - 1, len(LABELS))) % C)
    return np.eye(C)[predicted] * random.uniform(1, 4, (len(LABELS), 1))


def answers_of(logits):
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return Predictions([str(i) for i in range(len(LABELS))], LABELS, p, prior_of())


def contender(folder, logits, ids=None, labels=LABELS, classes=None, **more):
    """Write the two files of a contender, with shuffled rows."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(1).permutation(len(labels))
    ids = np.array(ids if ids is not None else [f"s{i}" for i in range(len(labels))])[order]
    rows = pa.array(list(logits[order].astype(np.float32)), type=pa.list_(pa.float32()))
    pyarrow.parquet.write_table(
        pa.table({"sample_id": ids, "label": np.asarray(labels)[order], "logits": rows}), folder / "predictions.parquet"
    )
    (folder / "prior.json").write_text(json.dumps(asdict(prior_of(classes))))
    return Contender(folder / "predictions.parquet", folder / "prior.json", **more)
