"""A small project in a separate folder with a finished split, and drop folders of new images for it."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet

from pipeline import split
from pipeline.params import Params
from tests.support.making import data_params, folder, parse_params, png, write

SIZES = {"cat": 12, "dog": 10, "eel": 9}
FIRST_NEW = 1000  # seeds of images that are not in the source


def project(root: Path, sizes: dict[str, int] = SIZES, **ingest: Any) -> Params:
    """Create a project at `root` with a folder source and its split, and change into it; settle_seconds is 0."""
    os.chdir(root)
    folder(root / "source", sizes)
    made = data_params(Path("source")).model_dump(mode="json")
    made["ingest"] = {**made["ingest"], "settle_seconds": 0, **ingest}
    params = parse_params(made, Path("params.yaml"))
    split.run(params)
    return params


def rows_of(name: str) -> list[dict[str, Any]]:
    """Return the rows of a split's table."""
    return pyarrow.parquet.read_table(f"data/split/{name}.parquet").to_pylist()


def held_out(name: str = "test") -> tuple[str, bytes]:
    """Return class and bytes of one image of a split."""
    row = rows_of(name)[0]
    return row["reference"].split("/")[0], (Path("source") / row["reference"]).read_bytes()


def drop_images(label: str, seeds: range, root: Path = Path("data/drop")) -> list[Path]:
    """Write new images into a class folder of the drop folder."""
    return [write(root / label / f"{seed}.png", png(FIRST_NEW + seed)) for seed in seeds]


def shards() -> list[dict[str, Any]]:
    """Return the rows of all shards without the images, sorted by name."""
    rows = [row for path in sorted(Path("data/ingested").glob("*.parquet")) for row in _rows(path)]
    return sorted(rows, key=lambda row: row["name"])


def _rows(path: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(path, columns=["label", "name", "sha256"]).to_pylist()


def files(root: str) -> dict[str, bytes]:
    """Return the content of every file under a folder, by path."""
    return {str(path): path.read_bytes() for path in sorted(Path(root).rglob("*")) if path.is_file()}


def listing() -> list[dict[str, str]]:
    """Return the rows of the only quarantine."""
    (path,) = Path("data/quarantine").glob("*/rows.csv")
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
