"""Files of the logit log: size limit, order, concurrent and killed writers, full and hanging disks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from serving.triton.storage import folder_files, logit_log
from tests.support import logging_process
from tests.support.logging_process import batch, logits_of, opened

ROOT = Path(__file__).parents[3]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_folder_never_exceeds_its_limit_and_the_oldest_files_are_deleted(tmp_path: Path) -> None:
    log, counts = opened(tmp_path, classes=500)
    (tmp_path / "notes.txt").write_text("no log")
    (tmp_path / "logits-00000000-0000000x.parquet").write_text("nor this")
    largest = 0
    for seed in range(40):
        log.offer(*batch(24, 500, seed))
        log.write()
        largest = max(largest, size_of(tmp_path))
    log.close()
    assert largest <= 1 << 20
    batches = logits_of(tmp_path)[:, 0]
    assert 0.6 * (1 << 20) < len(batches) * 2000 < 1.2 * (1 << 20)  # slightly compressed
    # The newest rows remain, without a gap.
    np.testing.assert_array_equal(batches, np.repeat(np.arange(40), 24)[-len(batches) :])
    assert counts.lost == {"queue": 0, "disk": 0}
    assert {path.name for path in tmp_path.iterdir()} >= {"notes.txt", "logits-00000000-0000000x.parquet"}


def test_clock_that_jumps_back_does_not_change_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = opened(tmp_path, classes=500)
    for seed in range(30):
        monkeypatch.setattr(time, "time", lambda seed=seed: 2e9 - 1e6 * seed)
        log.offer(*batch(24, 500, seed))
        log.write()
    log.close()
    batches = logits_of(tmp_path)[:, 0]
    np.testing.assert_array_equal(batches, np.repeat(np.arange(30), 24)[-len(batches) :])


def start_writer(folder: Path, classes: int, batches: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(logging_process.__file__), folder, str(classes), str(batches)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "open\n"
    return process


@pytest.mark.slow
def test_a_killed_writer_leaves_readable_files_and_the_next_removes_leftovers(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for _ in range(3):
        process, before = start_writer(tmp_path, 500, 0), set(tmp_path.iterdir())
        while not {path for path in tmp_path.iterdir() if path.suffix == ".parquet"} - before:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.wait()
        assert size_of(tmp_path) <= 1 << 20
        assert len(logits_of(tmp_path)) > 0  # every file is complete
    (tmp_path / ".logits-00000001-aaaaaaaa.parquet.partial").write_bytes(b"half")
    log, _ = opened(tmp_path)
    log.offer(*batch(1, 5, 0))
    log.close()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_processes_that_share_a_folder_lose_no_rows_and_keep_the_limit(tmp_path: Path) -> None:
    processes = [start_writer(tmp_path, 5, 60) for _ in range(3)]
    largest = 0
    while any(process.poll() is None for process in processes):
        with folder_files.folder_lock(tmp_path):
            largest = max(largest, size_of(tmp_path))
        time.sleep(0.02)
    assert largest <= 1 << 20
    assert [process.stdout.read() for process in processes] == ["480 0 0\n"] * 3
    np.testing.assert_array_equal(np.sort(logits_of(tmp_path)[:, 0]), np.repeat(np.arange(60), 24))


def test_a_hanging_disk_loses_rows_but_blocks_no_request(tmp_path: Path) -> None:
    log, counts = opened(tmp_path, classes=500, write_every=0.01, queue_bytes=100_000)
    # Only the writer thread waits for the lock; a blocked request would not return.
    with folder_files.folder_lock(tmp_path):
        for seed in range(200):
            log.offer(*batch(8, 500, seed))
    log.close()
    assert counts.lost["queue"] > 1000
    assert counts.logged + counts.lost["queue"] == 1600


def test_a_full_disk_loses_rows_and_the_write_is_retried(tmp_path: Path) -> None:
    """Uses a file size limit instead of a small file system, which would need root."""
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from tests.support.logging_process import batch, opened\n"
        "log, counts = opened(Path(sys.argv[1]), classes=500)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "for seed in range(10): log.offer(*batch(8, 500, seed)); log.write()\n"
        "lost = counts.lost['disk']\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "log.close(); print(lost, counts.logged)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lost, logged = map(int, ended.stdout.split())
    assert lost == 64 and logged == 16  # two full files were lost; the third's rows were kept until space was available
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert len(logits_of(tmp_path)) == 16


def test_rows_of_an_old_file_that_cannot_be_written_are_counted_as_lost(tmp_path: Path) -> None:
    log, counts = opened(tmp_path / "log", write_every=60)
    (tmp_path / "log").rename(tmp_path / "moved")
    log.offer(*batch(8, 5, 0))
    log.write()
    assert counts.lost["disk"] == 0  # retried
    log.file_started -= 2 * logit_log.FILE_SECONDS
    log.write()
    (tmp_path / "moved").rename(tmp_path / "log")
    log.close()
    assert (counts.lost["disk"], counts.logged, logit_log.log_files(tmp_path / "log")) == (8, 0, [])


@pytest.mark.slow
def test_writing_does_not_import_pandas(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.support.logging_process import batch, opened\n"
        "log, counts = opened(Path(sys.argv[1])); log.offer(*batch(8, 5, 0)); log.write(); log.close()\n"
        "print(counts.logged, 'pandas' in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, tmp_path]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "8 False\n"


def test_offers_from_many_threads_are_all_logged(tmp_path: Path) -> None:
    log, counts = opened(tmp_path)
    threads = [threading.Thread(target=lambda: [log.offer(*batch(2, 5, s)) for s in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert counts.logged == len(logits_of(tmp_path)) == 800
