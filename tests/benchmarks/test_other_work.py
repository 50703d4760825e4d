"""benchmarks.other_work: CPU use of other processes is measured, and no ratio is printed on a busy machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.other_work import OtherWork, cores_ticks, own_seconds, quiet_ratio

BUSY = "import time\nend = time.process_time() + {seconds}\nwhile time.process_time() < end: pass"


def run_busy(seconds: float) -> None:
    subprocess.run([sys.executable, "-c", BUSY.format(seconds=seconds)], check=True)


def test_own_work_is_that_of_this_process_and_of_running_and_exited_children() -> None:
    before = own_seconds()
    run_busy(0.4)
    ended = own_seconds() - before
    assert 0.4 <= ended < 1.2
    running = subprocess.Popen([sys.executable, "-c", BUSY.format(seconds=60)])
    try:
        psutil.Process(running.pid).cpu_percent()
        deadline = time.monotonic() + 30
        while psutil.Process(running.pid).cpu_times().user < 0.4 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert own_seconds() - before >= ended + 0.4
    finally:
        running.kill()
        running.wait()


def test_a_process_that_is_not_a_descendant_is_other_work() -> None:
    """A shell that exits immediately starts the process, so that init adopts it."""
    command = f'"{sys.executable}" -c "{BUSY.format(seconds=60).replace(chr(10), "; ", 1)}" >/dev/null 2>&1 & echo $!'
    others = OtherWork()
    started = time.monotonic()
    process = psutil.Process(
        int(subprocess.run(["sh", "-c", command], check=True, capture_output=True, text=True).stdout)
    )
    assert os.getpid() not in [parent.pid for parent in process.parents()]
    try:
        while (used := process.cpu_times().user) < 0.5 and time.monotonic() < started + 30:
            time.sleep(0.02)
        share, passed = others.share(), time.monotonic() - started
    finally:
        process.kill()
    assert used >= 0.5 and share >= 0.8 * used / (psutil.cpu_count() or 1) / passed


def test_the_share_is_between_0_and_1() -> None:
    others = OtherWork()
    run_busy(0.3)
    assert 0 <= others.share() <= 1
    total, idle = cores_ticks()
    assert 0 <= idle <= total


@pytest.mark.parametrize(
    ("others", "text"), [(0.0, "1.25"), (0.1, "1.25"), (0.11, "none: other work took 11% of the cores")]
)
def test_a_ratio_measured_beside_more_than_a_tenth_of_other_work_is_not_printed(others: float, text: str) -> None:
    assert quiet_ratio("1.25", others) == text
