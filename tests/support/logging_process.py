"""Process for test_logit_log_files that logs logits at full speed until it is killed, or logs a given number of rows."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet

from serving.triton.storage import folder_files, logit_log


class Counts:
    """Counters in place of Triton's metrics."""

    def __init__(self) -> None:
        self.logged, self.lost = 0, {"queue": 0, "disk": 0}

    def count(self, family: str, number: int = 1, reason: str = "") -> None:
        if family == logit_log.LOGGED:
            self.logged += number
        else:
            assert family == logit_log.LOST
            self.lost[reason] += number


def opened(
    folder: Path,
    classes: int = 5,
    limit: int = 1 << 20,
    share: float = 1.0,
    about: dict | None = None,
    **options: float,
):
    """Open a log; return it with its counters. options: of LogitLog."""
    counts = Counts()
    metadata = about or {"tailor_logits": "1", "version": "1", "student_sha256": "s", "classes_sha256": "c"}
    return logit_log.LogitLog(folder, share, limit, classes, metadata, [], counts, folder_files, **options), counts


def batch(rows: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return noise images and logits; the first column of the logits is the batch number."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(rows, classes))
    logits[:, 0] = seed
    return random.integers(0, 256, (rows, 3, 2, 2), dtype=np.uint8), logits


def logits_of(folder: Path) -> np.ndarray:
    """Return the logged logits of a folder, oldest first."""
    tables = [pyarrow.parquet.ParquetFile(path).read() for path in logit_log.log_files(folder)]
    return np.concatenate([np.array(table["logits"].to_pylist(), dtype=np.float32) for table in tables])


if __name__ == "__main__":
    folder, classes, batches = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    log, counts = opened(folder, classes, write_every=0.05)
    print("open", flush=True)
    for seed in range(batches) if batches else iter(int, 1):
        log.offer(*batch(8, classes, seed))
        time.sleep(0.005)
    log.close()
    print(counts.logged, counts.lost["queue"], counts.lost["disk"], flush=True)
