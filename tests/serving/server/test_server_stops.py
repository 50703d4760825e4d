"""Stopping the real server, also with interruptions, and the cleanup after it."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import psutil
import pytest

from serving.server.leftovers import new_prefix, runtime_folder, runtime_folders, sweep, sweep_dead_runs
from serving.server.running import find_running
from serving.server.triton_server import TritonServer
from serving.server.watchdog import end_servers
from tests.support.serve_process import family, living, shared_memory


def started(repository: Path) -> tuple[TritonServer, list[psutil.Process]]:
    """Start a server in this process; yields it with its processes (another server may be running)."""
    before = family(os.getpid())
    server = TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0).start()
    return server, [process for process in family(os.getpid()) if process not in before]


class CutShort(BaseException):
    """Raised by a signal handler, like that of `tailor serve`."""


@pytest.fixture
def interrupted_after() -> Iterator[Callable[[float], None]]:
    """Interrupt this thread once after the given seconds, at any point."""

    def cut_short(_number: int, _frame: FrameType | None) -> None:
        raise CutShort

    before = signal.signal(signal.SIGALRM, cut_short)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.end_to_end
def test_signal_while_a_hung_server_is_ended_for_a_restart_leaves_nothing(
    repository: Path, interrupted_after: Callable[[float], None]
) -> None:
    server, processes = started(repository)
    prefix = server.prefix
    assert any("serving.server.watchdog" in process.cmdline() for process in processes)
    psutil.Process(server.process_id).suspend()
    interrupted_after(1.0)
    with pytest.raises(CutShort):
        server.stop(restart_pending=True)
    server.stop()
    assert not living(processes)
    assert not {running.prefix for running in find_running(repository)} & {prefix, server.prefix}
    for left in (prefix, server.prefix):
        assert shared_memory(left) == []
        assert runtime_folders(left) == []


@pytest.mark.end_to_end
@pytest.mark.parametrize("seconds", [1e-6, 0.01, 0.12])
def test_signal_at_any_moment_of_a_stop_is_made_good_by_the_next(
    repository: Path, interrupted_after: Callable[[float], None], seconds: float
) -> None:
    server, processes = started(repository)
    prefix = server.prefix
    with contextlib.suppress(CutShort):
        interrupted_after(seconds)
        server.stop(at_once=True, restart_pending=True)
    server.stop()
    assert not living(processes)
    for left in (prefix, server.prefix):
        assert shared_memory(left) == []
        assert runtime_folders(left) == []


@pytest.mark.end_to_end
def test_server_is_stopped_for_a_restart_although_no_note_of_it_can_be_written(repository: Path) -> None:
    folders = runtime_folders("tailor_")
    server, processes = started(repository)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # writes fail, as on a full disk
    try:
        assert server.stop(restart_pending=True) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not living(processes)
    assert {path for path in runtime_folders("tailor_") if f"_{os.getpid()}_" in path.name} <= set(folders)
    with server:
        server.canary()


def test_watchdog_survives_a_process_that_exits_during_its_search(tmp_path: Path) -> None:
    (tmp_path / "tritonserver").symlink_to(shutil.which("sleep"))
    gone, left = (subprocess.Popen([tmp_path / "tritonserver", "60"]) for _ in range(2))
    with gone, left:
        known = [psutil.Process(process.pid) for process in (gone, left)]
        gone.kill()
        gone.wait()
        end_servers(known)
        assert left.wait(10) == -signal.SIGTERM


def test_concurrent_sweeps_of_one_run_do_not_fail() -> None:
    prefix = new_prefix()
    folder = runtime_folder(prefix)
    for number in range(2000):
        (folder / str(number)).touch()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(sweep, [prefix] * 4)) == [None] * 4
    assert not folder.exists()


@pytest.mark.end_to_end
def test_janitor_leaves_a_living_run_alone(server: TritonServer) -> None:
    assert server.prefix not in sweep_dead_runs()
    assert server.process_counts() == {("student", 1): 2, ("classifier", 1): 2}
    server.canary()
