"""The supervisor: recovery after faults injected into the server and its inference processes."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import picture

from serving.client.sync_client import Client
from serving.server.leftovers import SHARED_MEMORY, inference_processes, processes_of
from serving.server.running import find_running
from serving.server.supervisor import SupervisionLimits
from serving.shared.errors import ServingError
from serving.transport.retries import Retries
from tests.support.supervised import SHORT_LIMITS, Watched, failures_under_load

pytestmark = pytest.mark.end_to_end

RECOVERY = 10.0  # seconds


@pytest.fixture
def watched(repository: Path, tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(shutil.copytree(repository, tmp_path / "repository"))
    yield watched
    watched.stop()


def insert_at_execute(root: Path, model: str, line: str) -> None:
    """Insert a line of Python at the start of each batch of a version 1 model."""
    path = root / model / "1" / "model.py"
    begin = {"student": "        responses = [None] * len(requests)\n", "classifier": "        parsed = {}\n"}[model]
    assert begin in path.read_text()
    path.write_text(path.read_text().replace(begin, f"        {line}\n{begin}"))


def test_dead_stubs_are_replaced_without_a_restart(watched: Watched) -> None:
    server = watched.server.process_id
    for model in ("classifier", "student"):
        watched.kill_stub(model)
        watched.await_report(f"an inference process of {model} 1 died or is stopped; loading {model} again")
        watched.await_report(f"{model}: ready again")
        assert watched.answers() == 8
    assert watched.server.process_id == server
    watched.await_that(lambda: watched.server.process_counts() == {("student", 1): 2, ("classifier", 1): 2})


@pytest.mark.parametrize("model", ["student", "classifier"])
def test_stopped_inference_process_is_replaced_within_ten_seconds_and_ended(repository: Path, model: str) -> None:
    watched = Watched(repository, SupervisionLimits())
    try:
        with failures_under_load(watched.server) as failed:
            stopped, moment = watched.kill_stub(model, "suspend"), time.monotonic()
            watched.await_report(f"an inference process of {model} 1 died or is stopped; loading {model} again")
            watched.await_report(f"{model}: ready again")
            time.sleep(3)
        assert max(failed, default=moment) - moment < RECOVERY
        assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE
        watched.await_that(lambda: watched.server.process_counts() == {("student", 1): 2, ("classifier", 1): 2})
    finally:
        watched.stop()


def test_one_unhealthy_process_is_replaced_within_ten_seconds_though_it_is_not_stopped(
    repository: Path, tmp_path: Path
) -> None:
    # As with a frozen control group: Triton fails the requests with this message, and the process appears to sleep.
    root, chosen = shutil.copytree(repository, tmp_path / "repository"), tmp_path / "chosen"
    chosen.touch()
    words = "Stub process 'classifier_0_0' is not healthy."
    insert_at_execute(
        root, "classifier", f"import os\n        if str(os.getpid()) in open({str(chosen)!r}).read(): 1 / 0"
    )
    path = root / "classifier" / "1" / "model.py"
    path.write_text(path.read_text().replace("1 / 0", f"raise RuntimeError({words!r})"))
    watched = Watched(root, SupervisionLimits())
    try:
        with failures_under_load(watched.server) as failed:
            unhealthy = next(
                stub for stub, model, _ in inference_processes(watched.server.prefix) if model == "classifier"
            )
            chosen.write_text(str(unhealthy.pid))
            moment = time.monotonic()
            watched.await_report("is not healthy")
            watched.await_report("classifier: ready again")
            time.sleep(3)
        assert failed and max(failed) - moment < RECOVERY
        assert not any("the golden requests are sent once more" in line for line in watched.reports), watched.reports
    finally:
        watched.stop()


def test_stopped_server_is_killed_and_started_again_within_ten_seconds(repository: Path) -> None:
    watched = Watched(repository, SupervisionLimits())
    try:
        time.sleep(SupervisionLimits.served)
        psutil.Process(watched.server.process_id).suspend()
        watched.await_report("is stopped (SIGSTOP); starting it again at once", 5)
        watched.await_report("ready again at", RECOVERY)
        assert watched.answers() == 8
    finally:
        watched.stop()


def test_a_successful_start_resets_the_restart_limit(repository: Path) -> None:
    watched = Watched(repository, replace(SHORT_LIMITS, served=0.5))
    try:
        for death in range(1, 5):  # more than the two failed starts that are allowed
            time.sleep(0.6)
            psutil.Process(watched.server.process_id).kill()
            watched.await_that(lambda death=death: sum("ready again" in line for line in watched.reports) == death)
        assert watched.answers() == 8
        assert [line.rpartition("; ")[2] for line in watched.reports[::2]] == ["starting it again at once"] * 4
    finally:
        watched.stop()


def test_without_a_limit_of_restarts_a_server_is_started_again_after_any_number_of_failures(
    repository: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    watched = Watched(root, replace(SHORT_LIMITS, restarts=None, first_delay=0.01, longest_delay=0.02))
    try:
        away = root.rename(tmp_path / "away")
        psutil.Process(watched.server.process_id).kill()
        watched.await_report("starting it again in 0.02 s (20)")
        away.rename(root)
        watched.await_report("ready again at")
        assert watched.answers() == 8
    finally:
        watched.stop()


def test_hanging_inference_process_is_distinguished_from_an_overloaded_one(repository: Path, tmp_path: Path) -> None:
    # Triton receives this process's heartbeat, and the other instance serves a second request.
    root, waiting = shutil.copytree(repository, tmp_path / "repository"), tmp_path / "waiting"
    waiting.touch()
    hang = f"import os, time; str(os.getpid()) in open({str(waiting)!r}).read() and time.sleep(1000)"
    insert_at_execute(root, "student", hang)
    watched = Watched(root)
    try:
        [hanging, _] = [stub for stub, model, _ in inference_processes(watched.server.prefix) if model == "student"]
        waiting.write_text(str(hanging.pid))
        watched.await_report("although an inference process was idle; loading student and classifier again")
        watched.await_report("student and classifier: ready again")
        assert watched.answers() == 8
        assert not hanging.is_running() or hanging.status() == psutil.STATUS_ZOMBIE
    finally:
        watched.stop()


def test_server_with_more_requests_than_it_can_answer_in_time_is_left_alone(repository: Path, tmp_path: Path) -> None:
    # The classifier runs the network itself: the student's inference processes are idle even on a busy server.
    root = shutil.copytree(repository, tmp_path / "repository")
    work = "from time import process_time as t; end = t() + 0.16; any(iter(lambda: t() > end, True))"
    insert_at_execute(root, "classifier", work)
    watched = Watched(root, replace(SHORT_LIMITS, canary_timeout=3.0))
    try:
        stubs = {stub.pid for stub, _, _ in inference_processes(watched.server.prefix)}
        over = threading.Event()

        def ask() -> None:
            with Client(watched.server.http_url, timeout=120) as client:
                while not over.is_set():
                    client.predict([picture(1)] * 8)  # a whole batch, processed one after another

        with ThreadPoolExecutor(60) as pool:
            asking = [pool.submit(ask) for _ in range(60)]
            try:
                watched.await_that(lambda: sum("no repair is needed" in line for line in watched.reports) == 2, 120)
            finally:
                over.set()
        assert [asked.exception() for asked in asking] == [None] * 60
        assert all("classifier 1 is overloaded: " in line for line in watched.reports[-2:]), watched.reports
        assert not any("loading" in line or "restart" in line for line in watched.reports), watched.reports
        assert {stub.pid for stub, _, _ in inference_processes(watched.server.prefix)} == stubs
    finally:
        watched.stop()


def test_endless_computation_is_distinguished_from_load_and_replaced(repository: Path, tmp_path: Path) -> None:
    root, waiting = shutil.copytree(repository, tmp_path / "repository"), tmp_path / "waiting"
    waiting.touch()
    spin = f"import os; str(os.getpid()) in open({str(waiting)!r}).read() and any(iter(int, 1))"
    insert_at_execute(root, "classifier", spin)
    watched = Watched(root)
    try:
        spinning = [stub for stub, model, _ in inference_processes(watched.server.prefix) if model == "classifier"]

        def lost(seconds: float) -> None:
            time.sleep(seconds)
            once = Retries(attempts=1)  # the new process would answer a retry
            with Client(watched.server.http_url, timeout=60, retries=once) as client, pytest.raises(ServingError):
                client.predict([picture(1)])

        with ThreadPoolExecutor(3) as pool:
            waiting.write_text(" ".join(str(stub.pid) for stub in spinning))
            asked = pool.map(lost, [0.0, 0.3, 0.6])  # separate requests, not one batch
            watched.await_report("; the golden requests are sent once more")
            watched.await_report("; loading student and classifier again")
            waiting.write_text("")
            watched.await_report("student and classifier: ready again")
            list(asked)
        assert not any("overloaded" in line or "idle" in line for line in watched.reports), watched.reports
        assert watched.answers() == 8
    finally:
        watched.stop()


def test_without_its_repository_the_server_answers_on_and_is_repaired_when_the_disk_is_back(watched: Watched) -> None:
    away = watched.root.rename(watched.root.with_name("away"))
    time.sleep(1.5)  # one or two health checks (canaries)
    assert watched.answers() == 8
    assert watched.reports == []
    watched.kill_stub("classifier")  # one of two
    away.rename(watched.root)
    watched.await_report("classifier: ready again")
    assert watched.answers() == 8


def test_stub_is_not_replaced_from_a_graph_that_was_changed(watched: Watched) -> None:
    path = watched.root / "student" / "1" / "model.onnx"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + b"\0")
    server = watched.server.process_id
    watched.kill_stub("classifier")
    watched.await_report("model.onnx: sha256 is")
    assert "the loaded versions continue to serve" in watched.reports[-1]
    assert watched.answers() >= 4  # served by the other instance
    path.write_bytes(sound)
    watched.await_report("classifier: ready again")
    assert watched.answers() == 8
    assert watched.server.process_id == server


@pytest.mark.fault_case("triton-killed-during-load")
def test_the_server_record_exists_during_a_restart(watched: Watched) -> None:
    url = watched.server.grpc_url
    psutil.Process(watched.server.process_id).kill()

    def known_and_back() -> bool:
        assert {server.grpc_url for server in find_running(watched.root)} == {url}
        return any("ready again" in line for line in watched.reports)

    watched.await_that(known_and_back)
    assert watched.answers() == 8
    watched.stop()
    assert find_running(watched.root) == []


def test_supervision_ends_after_the_limit_of_restarts_and_leaves_no_process(watched: Watched) -> None:
    shutil.rmtree(watched.root)
    psutil.Process(watched.server.process_id).kill()
    watched.await_that(lambda: watched.ended is not None)
    assert "holds no student/config.pbtxt" in str(watched.ended)
    assert "stopped after 2 restarts" in str(watched.ended)
    assert [line.rpartition("; ")[2] for line in watched.reports] == [
        "starting it again in 0.2 s (1 of 2)",
        "starting it again in 0.4 s (2 of 2)",
    ]
    assert find_running(watched.root) == []
    assert list(processes_of(watched.server.prefix)) == []
    assert list(SHARED_MEMORY.glob(f"{watched.server.prefix}*")) == []


def test_server_restarts_when_the_disk_has_space_for_its_runtime_folder(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = tmp_path / "room"
    watched = Watched(repository, replace(SHORT_LIMITS, restarts=8))
    try:
        monkeypatch.setattr("tempfile.tempdir", str(room))
        before = watched.server.prefix
        psutil.Process(watched.server.process_id).kill()
        watched.await_report(f"No such file or directory: '{room}/tailor_")
        assert list(SHARED_MEMORY.glob(f"{before}*")) == []
        room.mkdir()
        watched.await_report("ready again at")
        assert watched.answers() == 8
    finally:
        watched.stop()
    assert list(room.iterdir()) == []
