"""Process priority: processes run at lower priority while they start, and at normal priority once they serve."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import picture

from serving.client.sync_client import Client
from serving.server.leftovers import processes_of
from serving.server.triton_server import TritonServer
from serving.shared.priority import (
    LONGEST_PAUSE,
    START_NICENESS,
    can_raise_priority,
    niceness,
    throttled,
    write_stub_launcher,
)
from serving.triton import start

BASE = niceness()
needs_raised_priority = pytest.mark.skipif(
    not can_raise_priority(BASE), reason="needs the right to raise the priority (CAP_SYS_NICE or RLIMIT_NICE)"
)


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A program that prints its niceness and its arguments, at a path with a space."""
    program = tmp_path / "a stub"
    program.write_text('#!/bin/sh\necho $(nice) "$@"\n')
    program.chmod(0o700)
    return program


def run_launcher(launcher: Path, model: Path) -> str:
    return subprocess.run([launcher, model, "one", "two three"], capture_output=True, text=True, check=True).stdout


def test_launcher_lowers_the_priority_of_models_that_raise_it_again(stub: Path, tmp_path: Path) -> None:
    launcher, model = tmp_path / "launcher", tmp_path / "model.py"
    assert write_stub_launcher(launcher, stub, 0, can_raise=lambda _niceness: True) == {"TAILOR_NICENESS": "0"}
    assert run_launcher(launcher, model) == f"{BASE} {model} one two three\n"  # model.py of an older Tailor
    (tmp_path / "start.py").touch()
    assert run_launcher(launcher, model) == f"{BASE + START_NICENESS} {model} one two three\n"


def test_launcher_is_a_link_if_the_priority_cannot_be_raised_again(stub: Path, tmp_path: Path) -> None:
    assert write_stub_launcher(tmp_path / "launcher", stub, 0, can_raise=lambda _niceness: False) == {}
    assert (tmp_path / "launcher").readlink() == stub


def test_launcher_is_a_link_in_a_folder_mounted_noexec(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_arguments: False)
    assert write_stub_launcher(tmp_path / "launcher", stub, 0, can_raise=lambda _niceness: True) == {}
    assert (tmp_path / "launcher").readlink() == stub


def test_launcher_is_a_link_if_the_server_has_lower_priority(stub: Path, tmp_path: Path) -> None:
    assert write_stub_launcher(tmp_path / "launcher", stub, 5, can_raise=lambda _niceness: True) == {}
    assert (tmp_path / "launcher").is_symlink()


def test_an_unprivileged_process_cannot_raise_its_priority() -> None:
    """Runs in an unprivileged process."""
    program = (
        "import os, resource; from serving.shared.priority import can_raise_priority; "
        "resource.setrlimit(resource.RLIMIT_NICE, (0, 0)); os.getuid() or os.setuid(65534); print(can_raise_priority(0))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
    )
    assert ended.stdout == "False\n"
    assert niceness() == os.getpriority(os.PRIO_PROCESS, os.getpid())


@pytest.mark.parametrize(("start_at", "target"), [pytest.param(5, 0, marks=needs_raised_priority), (0, 5)])
def test_apply_priority_sets_the_priority_of_every_thread(start_at: int, target: int) -> None:
    script = (
        f"import os, threading, time; from serving.triton.start import apply_priority; os.nice({start_at})\n"
        "threading.Thread(target=time.sleep, args=(20,), daemon=True).start(); apply_priority()\n"
        "print({os.getpriority(os.PRIO_PROCESS, int(task)) for task in os.listdir('/proc/self/task')})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[3],
        env=os.environ | {start.VARIABLE: str(BASE + target)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == f"{{{BASE + target}}}\n"


def test_throttled_pauses_after_each_item_for_a_bounded_time() -> None:
    pauses: list[float] = []
    times = iter([0.0, 0.01, 1.0, 3.0])
    assert list(throttled("ab", clock=lambda: next(times), sleep=pauses.append)) == ["a", "b"]
    assert pauses == [pytest.approx(0.04), LONGEST_PAUSE]


@pytest.mark.end_to_end
def test_serving_processes_have_the_servers_priority_and_are_idle_between_requests(server: TritonServer) -> None:
    stubs = [process for process in processes_of(server.prefix) if "stub" in process.name()]
    assert len(stubs) == 4
    for stub in stubs:
        for thread in psutil.Process(stub.pid).threads():
            assert os.getpriority(os.PRIO_PROCESS, thread.id) == niceness()
    with Client(server.http_url) as client:
        client.predict([picture(1)])
    before = sum(sum(stub.cpu_times()[:2]) for stub in stubs)
    time.sleep(1)  # ONNX Runtime's threads would spin during the whole sleep
    assert sum(sum(stub.cpu_times()[:2]) for stub in stubs) - before < 0.3
