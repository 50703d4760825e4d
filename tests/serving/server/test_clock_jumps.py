"""System clock changes and suspended machines: running models stay served, and later changes take effect."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import Release, picture

from serving.client.sync_client import Client
from serving.promotion.promotion import promote, rollback
from serving.server.local_tree import link_tree
from serving.server.triton_server import TritonServer
from serving.shared.atomic import write_file
from tests.support.serve_process import family, started_serve
from tests.support.supervised import Watched, failures_under_load

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
started = pytest.fixture(started_serve)


def date_files(root: Path, hours: float) -> None:
    """Set the modification times of a repository into the future, as if the clock had been set back since."""
    later = time.time() + 3600 * hours
    for path in root.rglob("*"):
        os.utime(path, (later, later))


@pytest.mark.end_to_end
def test_promotion_takes_effect_also_after_the_clock_was_set_back(root: Path, exports: dict[int, Release]) -> None:
    # Triton compares file times: files written now are older than the loaded ones.
    date_files(root, hours=3)
    with TritonServer(root, http_port=0, grpc_port=0, metrics_port=0) as server, Client(server.http_url) as client:
        for version in (2, 3):
            assert promote(root, exports[version].export_dir, rehearsal=False).servers == (server.grpc_url,)
            assert client.predict([picture(1)])[0].version == version
        assert rollback(root).version == 2
        assert client.predict([picture(1)])[0].version == 2


def test_folders_that_triton_reads_hide_no_change_after_the_clock_was_set_back(root: Path, tmp_path: Path) -> None:
    tree = link_tree(root, tmp_path)
    assert [(tree / model).stat().st_mtime for model in ("student", "classifier")] == [0, 0]


@pytest.mark.end_to_end
def test_dead_process_is_replaced_without_a_restart_after_the_clock_was_set_back(
    repository: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    date_files(root, hours=3)
    watched = Watched(root)
    try:
        server = watched.server.process_id
        watched.kill_stub("classifier")
        watched.await_report("classifier: ready again")
        assert watched.answers() == 8
        assert watched.server.process_id == server
    finally:
        watched.stop()


@pytest.mark.end_to_end
@pytest.mark.skipif(
    not FAKETIME.is_file(), reason="libfaketime is not installed; the jumps of the clock were NOT tried"
)
def test_clock_that_jumps_by_hours_fails_no_request_and_ends_no_process(repository: Path, tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+0")
    environment = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # like the kernel's monotonic clock, which does not jump
    }
    server = TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0, environment=environment)
    watched = Watched(repository, server=server)
    try:
        with failures_under_load(server) as failed:
            for jump in ("-3h", "+3h", "-10d"):
                write_file(clock, jump)
                time.sleep(4)
        assert failed == []
        assert watched.reports == []
    finally:
        watched.stop()


@pytest.mark.end_to_end
def test_machine_that_was_suspended_answers_again_without_a_restart(started: subprocess.Popen[str]) -> None:
    _, http, _ = started.stdout.readline().split()
    processes = [psutil.Process(started.pid), *family(started.pid)]
    for process in processes:
        process.suspend()
    time.sleep(5)
    for process in processes:
        process.resume()
    time.sleep(3)
    with Client(http, timeout=10) as client:
        for seed in range(8):
            assert client.predict([picture(seed)])[0].version == 1
    started.send_signal(signal.SIGTERM)
    _, errors = started.communicate(timeout=30)
    assert (started.returncode, errors) == (0, "")
