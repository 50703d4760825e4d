"""`tailor serve` as a process: readiness, requests, signals, kills, missing resources."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from conftest import picture

from serving.client.sync_client import Client
from serving.commands import main
from serving.server.leftovers import sweep_dead_runs
from serving.server.triton_server import KILL_AFTER
from serving.shared.errors import ServingError
from tests.support.serve_process import ANY_PORT, family, living, of_run, started_serve, triton_of

serving = pytest.fixture(started_serve)


def assert_it_answers_and_ends_clean(serving: subprocess.Popen[str], http: str) -> None:
    with Client(http) as client:
        assert client.predict([picture(1)])[0].version == 1
    serving.send_signal(signal.SIGTERM)
    serving.communicate(timeout=30)
    assert serving.returncode == 0
    assert of_run(serving.pid) == []


@pytest.mark.end_to_end
def test_serve_responds_and_leaves_no_process_or_file_after_sigterm(
    serving: subprocess.Popen[str], tmp_path: Path
) -> None:
    ready, http, grpc = serving.stdout.readline().split()
    assert (ready, http[:17], grpc[:17]) == ("ready", "http://127.0.0.1:", "grpc://127.0.0.1:")
    for url in (http, grpc):
        with Client(url) as client:
            assert client.predict([picture(1)], "train")[0].version == 1
    processes = family(serving.pid)
    assert len(processes) >= 5  # the watchdog, the server and three inference processes
    assert of_run(serving.pid)
    serving.send_signal(signal.SIGTERM)
    output, errors = serving.communicate(timeout=30)
    assert serving.returncode == 0
    assert output.splitlines()[-1] == "stopped"
    assert errors == ""
    assert not living(processes)
    assert of_run(serving.pid) == []
    assert [path.name for path in tmp_path.iterdir()] == ["triton.log"]
    assert "Started HTTPService" in (tmp_path / "triton.log").read_text()


@pytest.mark.end_to_end
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed; the printed example was NOT run")
def test_the_printed_example_runs_in_a_shell_and_returns_the_client_s_prediction(
    serving: subprocess.Popen[str],
) -> None:
    _, http, _ = serving.stdout.readline().split()
    assert serving.stdout.readline().startswith("metrics http://127.0.0.1:")
    lines = [serving.stdout.readline()]
    while lines[-1] and not lines[-1].endswith("/v2/models/classifier/infer\n"):
        lines.append(serving.stdout.readline())
    example = "".join(lines[next(number for number, line in enumerate(lines) if line.startswith("image=")) :])
    image = Path(example.partition("\n")[0].removeprefix("image=")).read_bytes()
    ran = subprocess.run(["sh", "-c", example], capture_output=True, text=True, timeout=30, check=True)
    answered = {output["name"]: output["data"] for output in json.loads(ran.stdout)["outputs"]}
    with Client(http) as client:
        expected = client.predict([image], "balanced")[0]
    assert answered["class"] == list(expected.classes)
    assert answered["probability"] == pytest.approx(expected.probabilities)


@pytest.mark.end_to_end
@pytest.mark.parametrize("hung", [False, True], ids=["all healthy", "a stub hangs"])
def test_killed_serve_leaves_no_process_and_no_shared_memory(
    serving: subprocess.Popen[str], tmp_path: Path, hung: bool
) -> None:
    serving.stdout.readline()
    processes = family(serving.pid)
    if hung:
        next(process for process in processes if "stub" in process.name()).suspend()
    serving.kill()
    gone, alive = psutil.wait_procs(processes, timeout=30)
    assert not living(alive)
    assert len(gone) >= 5
    assert of_run(serving.pid) == []
    assert [path.name for path in tmp_path.iterdir()] == ["triton.log"]


@pytest.mark.end_to_end
def test_the_next_start_removes_the_leftovers_of_a_killed_serve_and_watchdog(
    serving: subprocess.Popen[str], tmp_path: Path
) -> None:
    serving.stdout.readline()
    processes = family(serving.pid)
    next(process for process in processes if "serving.server.watchdog" in process.cmdline()).kill()
    serving.kill()
    serving.wait()
    assert living(processes)
    assert of_run(serving.pid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))  # the killed server's runtime folder is there
        sweep_dead_runs()
    psutil.wait_procs(processes, timeout=5)
    assert not living(processes)
    assert of_run(serving.pid) == []
    assert [path.name for path in tmp_path.iterdir()] == ["triton.log"]


@pytest.mark.end_to_end
def test_ctrl_c_while_starting_ends_with_status_0(serving: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 20
    while not family(serving.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    serving.send_signal(signal.SIGINT)
    output, errors = serving.communicate(timeout=30)
    assert (serving.returncode, errors) == (0, "")
    assert output.endswith("stopped\n")
    assert of_run(serving.pid) == []


@pytest.mark.end_to_end
def test_a_killed_server_is_restarted_on_the_same_ports(serving: subprocess.Popen[str]) -> None:
    _, http, _ = serving.stdout.readline().split()
    killed = triton_of(serving)
    killed.kill()
    line = serving.stderr.readline()
    assert "the Triton server ended by itself with status -9; starting it again in 1 s (1 of 8)" in line
    assert f"ready again at {http}" in serving.stderr.readline()
    assert_it_answers_and_ends_clean(serving, http)


@pytest.mark.end_to_end
def test_serve_survives_a_shortage_of_descriptors_when_its_server_exits(serving: subprocess.Popen[str]) -> None:
    _, http, _ = serving.stdout.readline().split()
    few, before = 3, resource.prlimit(serving.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(serving.pid, resource.RLIMIT_NOFILE, (few, before[1]))
    triton_of(serving).kill()
    assert "status -9; starting it again in 1 s (1 of 8)" in serving.stderr.readline()
    assert re.search("Too many open files.*; starting it again in 2 s", serving.stderr.readline())
    resource.prlimit(serving.pid, resource.RLIMIT_NOFILE, before)
    assert f"ready again at {http}" in serving.stderr.readline()
    assert_it_answers_and_ends_clean(serving, http)


@pytest.mark.end_to_end
def test_too_small_a_limit_of_open_files_is_one_line_before_triton_starts(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serving.commands", "serve", "--repository", str(repository), *ANY_PORT]
    command += ["--log", str(tmp_path / "triton.log")]
    small = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *command]  # with 64, Triton crashes while it starts
    ended = subprocess.run(small, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    [line] = ended.stderr.splitlines()
    assert "open files (ulimit -n) is 64; Triton needs at least 512" in line
    assert not (tmp_path / "triton.log").exists()


@pytest.mark.end_to_end
def test_serve_prints_less_than_a_screen_and_names_its_log_which_a_clean_stop_removes(
    repository: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "serving.commands", "serve", "--repository", str(repository), *ANY_PORT]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) as serving:
        assert serving.stdout.readline().startswith("ready ")
        lines = [serving.stdout.readline() for _ in range(3)]
        path = Path(lines[2].removeprefix("log ").strip())
        assert path.parent == tmp_path and "Started HTTPService" in path.read_text()
        serving.send_signal(signal.SIGTERM)
        output, errors = serving.communicate(timeout=30)
    assert (serving.returncode, errors) == (0, "") and len(output.splitlines()) < 40
    assert list(tmp_path.iterdir()) == []


@pytest.mark.end_to_end
def test_a_failed_start_prints_the_end_of_the_log_and_its_path(repository: Path, tmp_path: Path) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    (root / "classifier" / "1" / "model.py").write_text("raise RuntimeError('no classifier today')\n")
    command = [sys.executable, "-m", "serving.commands", "serve", "--repository", str(root), *ANY_PORT]
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    first, *rest = ended.stderr.splitlines()
    (path,) = (tmp_path / "temporary").iterdir()
    assert (ended.returncode, first) == (1, f"tailor: the whole log of the server is in {path}")
    assert "no classifier today" in path.read_text()
    assert rest[0].startswith("tailor: the Triton server ") and len(rest) < 20


@pytest.mark.parametrize("restarts", ["-1", "many", "1_0", ""])
def test_an_invalid_number_of_restarts_is_a_usage_error(capsys: pytest.CaptureFixture[str], restarts: str) -> None:
    assert main(["serve", f"--restarts={restarts}"]) == 2
    assert f"--restarts is {restarts!r}; expected 0, 1, 2, ... or unlimited" in capsys.readouterr().err


@pytest.mark.end_to_end
def test_unlimited_restarts_are_counted_without_a_limit(repository: Path, tmp_path: Path) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    command = [sys.executable, "-m", "serving.commands", "serve", "--repository", str(root), *ANY_PORT]
    with subprocess.Popen([*command, "--quiet", "--restarts", "unlimited"], stdout=-1, stderr=-1, text=True) as serving:
        serving.stdout.readline()
        triton_of(serving).kill()
        assert "starting it again in 1 s (1)\n" in serving.stderr.readline()
        serving.send_signal(signal.SIGTERM)
        serving.communicate(timeout=30)
    assert serving.returncode == 0


@pytest.mark.end_to_end
@pytest.mark.parametrize("seconds", [0.2, 1.3, 1.8], ids=["before the start", "in its beginning", "later"])
def test_serve_stopped_during_a_restart_leaves_no_process(
    serving: subprocess.Popen[str], tmp_path: Path, seconds: float
) -> None:
    serving.stdout.readline()
    triton_of(serving).kill()
    assert "starting it again in 1 s" in serving.stderr.readline()
    time.sleep(seconds)
    processes = family(serving.pid)
    serving.send_signal(signal.SIGTERM)
    output, _ = serving.communicate(timeout=30)
    assert (serving.returncode, output.splitlines()[-1]) == (0, "stopped")
    assert not living(processes)
    assert of_run(serving.pid) == []
    assert [path.name for path in tmp_path.iterdir()] == ["triton.log"]


@pytest.mark.end_to_end
@pytest.mark.parametrize(("work", "grace", "answered"), [(3, 20, True), (60, 1, False)], ids=["in time", "too long"])
def test_a_request_in_flight_has_the_grace_period_after_sigterm(
    repository: Path, tmp_path: Path, work: int, grace: int, answered: bool
) -> None:
    root, slow = shutil.copytree(repository, tmp_path / "repository"), tmp_path / "slow"
    path, begin = root / "classifier" / "1" / "model.py", "        parsed = {}\n"
    assert begin in path.read_text()
    wait = f"import os; os.path.exists({str(slow)!r}) and (print('asked', flush=True), time.sleep({work}))"
    path.write_text(path.read_text().replace(begin, f"        {wait}\n{begin}"))
    command = [sys.executable, "-m", "serving.commands", "serve", "--repository", str(root), *ANY_PORT]
    with (
        subprocess.Popen([*command, "--grace", str(grace), "--verbose"], stdout=-1, stderr=-1, text=True) as serving,
        ThreadPoolExecutor(1) as pool,
    ):

        def ask() -> int:
            with Client(http, timeout=50) as client:
                return client.predict([picture(1)])[0].version

        _, http, _ = serving.stdout.readline().split()
        slow.touch()
        asking = pool.submit(ask)
        while serving.stderr.readline() != "asked\n":
            assert serving.poll() is None
        signalled = time.monotonic()
        serving.send_signal(signal.SIGTERM)
        serving.communicate(timeout=60)
        took = time.monotonic() - signalled
        error = asking.exception()
    assert serving.returncode == 0
    assert of_run(serving.pid) == []
    assert took < grace + KILL_AFTER + 5
    if answered:
        assert (error, asking.result()) == (None, 1)
    else:
        assert isinstance(error, ServingError)
