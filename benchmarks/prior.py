"""Counting labels of a Parquet file, 10^8 rows of 10^6 classes, on one core: `python -m benchmarks.prior [--rows 1e8]`.

Four methods of counting the rows of every class:
- reading alone: the same batches are decoded and dropped; the upper limit of any method.
- count_labels: pipeline.prior, as in the stage `prior`.
- whole column: the column is read at once, then one numpy.bincount; the usual script.
- Arrow value_counts: pyarrow's hash table over the whole column.

Each runs in a separate process, pinned to one core, after one warm-up run; the methods take turns, and all counts must
agree before anything is printed. Time is CPU time of the process, on which other load has little effect; the file is in
the page cache. Peak memory is the growth of the peak resident set (VmHWM) since the imports. Labels are long-tailed
(log-uniform), int32, as `split` writes them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from benchmarks.other_work import OtherWork, load_average, memory_mebibytes, processor
from pipeline.data.class_prior import BATCH_ROWS, count_labels
from pipeline.data.split_tables import read_batches

COUNT_LABELS, LIMIT = "count_labels", "reading alone"
GOAL = 20  # million labels per second on one core


def reading_alone(path: Path, _classes: int) -> np.ndarray | None:
    for _ in read_batches(path, "label", BATCH_ROWS):
        pass


def whole_column(path: Path, classes: int) -> np.ndarray:
    column = pyarrow.parquet.read_table(path, columns=["label"], use_threads=False).column("label")
    return np.bincount(column.to_numpy(), minlength=classes)


def value_counts(path: Path, classes: int) -> np.ndarray:
    table = pyarrow.parquet.read_table(path, columns=["label"], use_threads=False).column("label").value_counts()
    counts = np.zeros(classes, dtype=np.int64)
    counts[table.field("values").to_numpy()] = table.field("counts").to_numpy()
    return counts


METHODS: dict[str, Callable[[Path, int], np.ndarray | None]] = {
    LIMIT: reading_alone,
    COUNT_LABELS: count_labels,
    "whole column": whole_column,
    "Arrow value_counts": value_counts,
}


def write_labels(path: Path, rows: int, classes: int) -> None:
    """Write the file: log-uniform labels in random order, row groups of pyarrow's default size."""
    generator = np.random.default_rng(0)
    schema = pa.schema([("label", pa.int32())])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 5_000_000):
            size = min(5_000_000, rows - start)
            labels = np.exp(generator.random(size) * np.log(classes)).astype(np.int32) - 1
            writer.write_table(pa.table([labels], schema=schema))


def measure_here(name: str, path: Path, classes: int) -> dict[str, float | str]:
    """Return CPU seconds, MiB and a hash of the counts of one method, in this process, on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    before = memory_mebibytes("VmHWM")
    counts = METHODS[name](path, classes)
    begin = time.process_time()
    METHODS[name](path, classes)
    seconds = time.process_time() - begin
    digest = "" if counts is None else hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest()
    return {"seconds": seconds, "mebibytes": memory_mebibytes("VmHWM") - before, "digest": digest}


def main() -> None:
    parser = argparse.ArgumentParser(description="Counting labels of a Parquet file on one core.")
    parser.add_argument("--rows", type=float, default=1e8, help="labels in the file (default: %(default)g)")
    parser.add_argument("--classes", type=float, default=1e6, help="classes (default: %(default)g)")
    parser.add_argument(
        "--repeat", type=int, default=3, help="rounds in which the methods take turns (default: %(default)s)"
    )
    parser.add_argument(
        "--measure", nargs=2, metavar=("METHOD", "FILE"), help="print the figures of one method and exit"
    )
    arguments = parser.parse_args()
    rows, classes, repeat = int(arguments.rows), int(arguments.classes), arguments.repeat
    if arguments.measure:
        name, path = arguments.measure
        print(json.dumps(measure_here(name, Path(path), classes)))
        return
    others = OtherWork()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.parquet"
        write_labels(path, rows, classes)
        options = ["--rows", str(rows), "--classes", str(classes)]
        rounds: dict[str, list[dict]] = {name: [] for name in METHODS}
        for name in [*METHODS] * repeat:
            command = [sys.executable, "-m", "benchmarks.prior", *options, "--measure", name, str(path)]
            rounds[name].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        best = {name: min(figures, key=lambda figure: figure["seconds"]) for name, figures in rounds.items()}
        size = path.stat().st_size
    if len({figures["digest"] for figures in best.values()} - {""}) != 1:
        raise AssertionError("the methods count differently")
    print(
        f"`python -m benchmarks.prior --rows {rows:g} --classes {classes:g} --repeat {repeat}`\n\n"
        f"One core of {processor()}; pyarrow {pa.__version__}, numpy {np.__version__}, Python {platform.python_version()}; "
        f"load average at the end {load_average()}.\n{rows:,} labels of {classes:,} classes, {size / 2**20:.0f} MiB; "
        f"best of {repeat}. Goal of {COUNT_LABELS}: ≥ {GOAL} million labels/s.\n"
    )
    print("| method | CPU seconds | million labels/s | of reading alone | peak MiB |\n|---|--:|--:|--:|--:|")
    for name, figures in best.items():
        ratio = others.ratio(f"{best[LIMIT]['seconds'] / figures['seconds']:.2f}")
        speed = rows / figures["seconds"] / 1e6
        print(f"| {name} | {figures['seconds']:.2f} | {speed:.1f} | {ratio} | {figures['mebibytes']:.0f} |")


if __name__ == "__main__":
    main()
