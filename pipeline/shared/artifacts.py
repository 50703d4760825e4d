"""Files that one stage writes and another reads: their paths, and how they are written."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from serving.shared.atomic import place_file as place_file
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
TEACHER = Path("artifacts/teacher")
STUDENT = Path("artifacts/student")
EVALUATION = Path("artifacts/evaluation")
DECISION = Path("artifacts/decision.json")
EXPORT = Path("artifacts/export")
REPOSITORY = Path("artifacts/repository")
FAILURES = Path("artifacts/failures")
TENSORBOARD = Path("artifacts/tensorboard")
SEEDS = Path("artifacts/seeds")


def unfinished(output: Path) -> Path:
    """Where the run that makes `output` keeps its state until it has finished."""
    return output.with_name(f".{output.name}.unfinished")


def write_json(path: Path, content: Any) -> None:
    """`write_file` of indented JSON; refuses NaN and infinity, which are not JSON."""
    write_file(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def as_csv(rows: Iterable[Any], columns: Sequence[str] | None = None) -> str:
    """Rows as CSV, which DVC can plot, its cells safe in a spreadsheet; None is an empty cell.

    Rows are mappings with the same keys, at least one; or, with `columns`, tuples of cells, of which there may be none.
    """
    stream = io.StringIO()
    named = [dict(zip(columns, row, strict=True)) if columns else row for row in rows]
    writer = csv.DictWriter(stream, fieldnames=columns or list(named[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in named)
    return stream.getvalue()


def sha256_of_json(content: Any) -> str:
    """sha256 of a value's canonical JSON, for comparing parameters."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
