"""Paths of the files that stages exchange, and functions to write JSON and CSV files atomically."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from serving.shared.atomic import move_file as move_file
from serving.shared.atomic import sha256_of as sha256_of
from serving.shared.atomic import whole_folder as whole_folder
from serving.shared.atomic import write_file as write_file
from serving.shared.terminal import csv_cell

PARAMS_FILE = Path("params.yaml")
INGESTED = Path("data/ingested")
QUARANTINE = Path("data/quarantine")
INGEST_STATE = Path("data/.ingest")
SPLIT = Path("data/split")
PRIOR = Path("artifacts/prior.json")
EMBEDDINGS = Path("artifacts/embeddings")
EMBEDDINGS_INDEX = EMBEDDINGS / "index.json"
TEXT = Path("artifacts/text")
TEACHER = Path("artifacts/teacher")
STUDENT = Path("artifacts/student")
CLASSIFIER = Path("artifacts/classifier")
EVALUATION = Path("artifacts/evaluation")
ANSWERS = EVALUATION / "answers.json"  # fitted on validation images: the calibration of the served answers
DECISION = Path("artifacts/decision.json")
EXPORT = Path("artifacts/export")
REPOSITORY = Path("artifacts/repository")
FAILURES = Path("artifacts/failures")
TENSORBOARD = Path("artifacts/tensorboard")
SEEDS = Path("artifacts/seeds")


def unfinished(output: Path) -> Path:
    """Path of the state of an unfinished run that writes `output`."""
    return output.with_name(f".{output.name}.unfinished")


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON with `write_file`. Raises ValueError for NaN and infinity, which are not JSON."""
    write_file(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def as_csv(rows: Iterable[Any], columns: Sequence[str] | None = None) -> str:
    """Format rows as CSV, with cells escaped for spreadsheets; None is an empty cell. DVC can plot the file.

    rows: mappings with equal keys, at least one; with `columns`, tuples of cells, possibly none.
    """
    stream = io.StringIO()
    named = [dict(zip(columns, row, strict=True)) if columns else row for row in rows]
    writer = csv.DictWriter(stream, fieldnames=columns or list(named[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in named)
    return stream.getvalue()


def sha256_of_json(content: Any) -> str:
    """sha256 of a value's canonical JSON, to compare params and other values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
