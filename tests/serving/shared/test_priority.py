"""Process priority: processes run at lower priority while they start, and at normal priority once they serve."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import picture

from serving.client.sync_client import Client
from serving.server.leftovers import processes_of
from serving.server.triton_server import TritonServer
from serving.shared import priority
from serving.shared.priority import STARTING, can_raise_priority, niceness, throttled, write_stub_launcher
from serving.triton import start

may_rise = pytest.mark.skipif(
    not can_raise_priority(niceness()) or niceness() > 0,
    reason="takes a niceness of 0 and the right to come back to it",
)


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A program that prints its niceness and its arguments, at a path with a space."""
    program = tmp_path / "a stub"
    program.write_text('#!/bin/sh\necho $(nice) "$@"\n')
    program.chmod(0o700)
    return program


def run_started(starter: Path, model: Path) -> str:
    return subprocess.run([starter, model, "one", "two three"], capture_output=True, text=True, check=True).stdout


@may_rise
def test_stub_starts_at_a_lower_priority_where_its_model_will_rise(stub: Path, tmp_path: Path) -> None:
    starter, model = tmp_path / "starter", tmp_path / "model.py"
    assert write_stub_launcher(starter, stub, 0) == {"TAILOR_NICENESS": "0"}
    assert run_started(starter, model) == f"0 {model} one two three\n"  # model.py of an older Tailor
    (tmp_path / "start.py").touch()
    assert run_started(starter, model) == f"{STARTING} {model} one two three\n"


def test_stub_starts_as_it_is_where_it_could_not_rise(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(priority, "can_raise_priority", lambda _wanted: False)
    assert write_stub_launcher(tmp_path / "starter", stub, 0) == {}
    assert (tmp_path / "starter").readlink() == stub


def test_stub_starts_as_it_is_where_no_program_may_run(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_arguments: False)
    assert write_stub_launcher(tmp_path / "starter", stub, 0) == {}
    assert (tmp_path / "starter").readlink() == stub


def test_server_that_stands_back_itself_starts_its_stubs_as_they_are(stub: Path, tmp_path: Path) -> None:
    assert write_stub_launcher(tmp_path / "starter", stub, 5) == {}
    assert (tmp_path / "starter").is_symlink()


def test_who_may_not_rise_is_told_so_by_the_kernel() -> None:
    """Runs in an unprivileged process."""
    question = (
        "import os, resource; from serving.shared.priority import can_raise_priority; "
        "resource.setrlimit(resource.RLIMIT_NICE, (0, 0)); os.getuid() or os.setuid(65534); print(can_raise_priority(0))"
    )
    asked = subprocess.run(
        [sys.executable, "-c", question], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
    )
    assert asked.stdout == "False\n"
    assert niceness() == os.getpriority(os.PRIO_PROCESS, os.getpid())


@may_rise
def test_every_thread_of_a_ready_stub_rises() -> None:
    script = (
        "import os, threading, time; from serving.triton.start import apply_priority; os.nice(5)\n"
        "threading.Thread(target=time.sleep, args=(20,), daemon=True).start(); apply_priority()\n"
        "print({os.getpriority(os.PRIO_PROCESS, int(task)) for task in os.listdir('/proc/self/task')})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[3],
        env=os.environ | {start.VARIABLE: "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == "{0}\n"


def test_rest_follows_each_item_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    clock = iter([0.0, 0.01, 1.0, 3.0])
    # Only in that module: other threads read the clock too.
    monkeypatch.setattr(priority, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=rests.append))
    assert list(throttled("ab")) == ["a", "b"]
    assert rests == [pytest.approx(0.04), priority.LONGEST_REST]


@pytest.mark.end_to_end
def test_stubs_that_serve_have_the_servers_priority_and_rest_between_requests(server: TritonServer) -> None:
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
