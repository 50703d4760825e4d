"""Starting, guarding and stopping the real server."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from conftest import ADMIN_KEY, Release, picture, write_export
from tritonclient.utils import InferenceServerException

from serving import installation
from serving.client import Client
from serving.errors import InputError, ServingError
from serving.installation import InstallationError, find_installation
from serving.leftovers import new_prefix, runtime_folder, runtime_folders, sweep, sweep_dead_runs
from serving.manifest import ManifestError
from serving.repository import write_repository
from serving.running import find_running
from serving.server import KILL_AFTER, TritonServer
from serving.version_policy import serve_versions
from serving.watchdog import end_servers

ANY_PORT = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")


def address(url: str) -> str:
    return url.partition("://")[2]


def shared_memory(prefix: str) -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"{prefix}*")]


def family(process_id: int) -> list[psutil.Process]:
    return psutil.Process(process_id).children(recursive=True)


def of_run(process_id: int) -> list[str]:
    """The names in shared memory of what a process serves."""
    return [path.name for path in Path("/dev/shm").glob(f"tailor_*_{process_id}_*")]


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != "zombie"]


def triton_of(serving: subprocess.Popen[str]) -> psutil.Process:
    return next(process for process in family(serving.pid) if process.name() == "tritonserver")


@pytest.fixture
def serving(repository: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`tailor serve` in a process of its own."""
    command = [sys.executable, "-m", "serving.commands", "serve", "--repository", str(repository), *ANY_PORT]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [*command, "--quiet", "--log", str(tmp_path / "triton.log")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.mark.end_to_end
def test_serve_is_ready_answers_and_leaves_nothing_behind_on_sigterm(
    serving: subprocess.Popen[str], tmp_path: Path
) -> None:
    ready, http, grpc = serving.stdout.readline().split()
    assert (ready, http[:17], grpc[:17]) == ("ready", "http://127.0.0.1:", "grpc://127.0.0.1:")
    for url in (http, grpc):
        with Client(url) as client:
            assert client.predict([picture(1)], "train")[0].version == 1
    processes = family(serving.pid)
    assert len(processes) >= 5  # the watchdog, the server and three stubs
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
def test_printed_example_runs_in_a_shell_and_answers_as_the_client(serving: subprocess.Popen[str]) -> None:
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
        wanted = client.predict([image], "balanced")[0]
    assert answered["class"] == list(wanted.classes)
    assert answered["probability"] == pytest.approx(wanted.probabilities)


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


def test_several_who_clear_up_after_the_same_run_do_not_trip_over_each_other() -> None:
    prefix = new_prefix()
    folder = runtime_folder(prefix)
    for number in range(2000):
        (folder / str(number)).touch()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(sweep, [prefix] * 4)) == [None] * 4
    assert not folder.exists()


@pytest.mark.end_to_end
def test_next_start_clears_what_serve_and_watchdog_left_when_both_were_killed(
    serving: subprocess.Popen[str], tmp_path: Path
) -> None:
    serving.stdout.readline()
    processes = family(serving.pid)
    next(process for process in processes if "serving.watchdog" in process.cmdline()).kill()
    serving.kill()
    serving.wait()
    assert living(processes)
    assert of_run(serving.pid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))  # where the killed one had its runtime folder
        sweep_dead_runs()
    psutil.wait_procs(processes, timeout=5)
    assert not living(processes)
    assert of_run(serving.pid) == []
    assert [path.name for path in tmp_path.iterdir()] == ["triton.log"]


@pytest.mark.end_to_end
def test_janitor_leaves_a_living_run_alone(server: TritonServer) -> None:
    assert server.prefix not in sweep_dead_runs()
    assert server.stubs() == {("student", 1): 2, ("classifier", 1): 2}
    server.canary()


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


def assert_it_answers_and_ends_clean(serving: subprocess.Popen[str], http: str) -> None:
    with Client(http) as client:
        assert client.predict([picture(1)])[0].version == 1
    serving.send_signal(signal.SIGTERM)
    serving.communicate(timeout=30)
    assert serving.returncode == 0
    assert of_run(serving.pid) == []


@pytest.mark.end_to_end
def test_server_that_is_killed_is_started_again_on_the_same_ports(serving: subprocess.Popen[str]) -> None:
    _, http, _ = serving.stdout.readline().split()
    killed = triton_of(serving)
    killed.kill()
    line = serving.stderr.readline()
    assert "the Triton server ended by itself with status -9; starting it again in 1 s (1 of 8)" in line
    assert f"ready again at {http}" in serving.stderr.readline()
    assert_it_answers_and_ends_clean(serving, http)


@pytest.mark.end_to_end
def test_serve_outlives_a_shortage_of_descriptors_when_its_server_dies(serving: subprocess.Popen[str]) -> None:
    _, http, _ = serving.stdout.readline().split()
    few, before = 3, resource.prlimit(serving.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(serving.pid, resource.RLIMIT_NOFILE, (few, before[1]))
    triton_of(serving).kill()
    assert "status -9; starting it again in 1 s (1 of 8)" in serving.stderr.readline()
    assert re.search("Too many open files.*; starting it again in 2 s", serving.stderr.readline())
    resource.prlimit(serving.pid, resource.RLIMIT_NOFILE, before)
    assert f"ready again at {http}" in serving.stderr.readline()
    assert_it_answers_and_ends_clean(serving, http)


def started(repository: Path) -> tuple[TritonServer, list[psutil.Process]]:
    """A server in this process, and all that it started: there may be another."""
    before = family(os.getpid())
    server = TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0).start()
    return server, [process for process in family(os.getpid()) if process not in before]


class CutShort(BaseException):
    """What a signal's handler raises, as that of `tailor serve` does."""


@pytest.fixture
def interrupted_after() -> Iterator[Callable[[float], None]]:
    """Has this thread interrupted once, in so many seconds, wherever it then is."""

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
    assert any("serving.watchdog" in process.cmdline() for process in processes)
    psutil.Process(server.process_id).suspend()
    interrupted_after(1.0)
    with pytest.raises(CutShort):
        server.stop(comes_back=True)
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
        server.stop(at_once=True, comes_back=True)
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
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # as a full disk does, it refuses what is written
    try:
        assert server.stop(comes_back=True) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not living(processes)
    assert {path for path in runtime_folders("tailor_") if f"_{os.getpid()}_" in path.name} <= set(folders)
    with server:
        server.canary()


@pytest.mark.end_to_end
@pytest.mark.parametrize("seconds", [0.2, 1.3, 1.8], ids=["before the start", "in its beginning", "later"])
def test_serve_that_is_told_to_end_during_a_restart_leaves_nothing(
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
def test_request_in_flight_gets_the_grace_period_and_no_more_on_sigterm(
    repository: Path, tmp_path: Path, work: int, grace: int, answered: bool
) -> None:
    root, slow = shutil.copytree(repository, tmp_path / "repository"), tmp_path / "slow"
    path, begin = root / "classifier" / "1" / "model.py", "        asked = {}\n"
    assert begin in path.read_text()
    wait = f"import os; os.path.exists({str(slow)!r}) and (print('asked', flush=True), time.sleep({work}))"
    path.write_text(path.read_text().replace(begin, f"        {wait}\n{begin}"))
    command = [sys.executable, "-m", "serving.commands", "serve", "--repository", str(root), *ANY_PORT]
    with (
        subprocess.Popen([*command, "--grace", str(grace)], stdout=-1, stderr=-1, text=True) as serving,
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
        told = time.monotonic()
        serving.send_signal(signal.SIGTERM)
        serving.communicate(timeout=60)
        took = time.monotonic() - told
        error = asking.exception()
    assert serving.returncode == 0
    assert of_run(serving.pid) == []
    assert took < grace + KILL_AFTER + 5
    if answered:
        assert (error, asking.result()) == (None, 1)
    else:
        assert isinstance(error, ServingError)


def test_watchdog_is_not_ended_by_a_process_that_goes_while_it_looks(tmp_path: Path) -> None:
    (tmp_path / "tritonserver").symlink_to(shutil.which("sleep"))
    gone, left = (subprocess.Popen([tmp_path / "tritonserver", "60"]) for _ in range(2))
    with gone, left:
        known = [psutil.Process(process.pid) for process in (gone, left)]
        gone.kill()
        gone.wait()
        end_servers(known)
        assert left.wait(10) == -signal.SIGTERM


@pytest.mark.end_to_end
def test_log_is_forwarded_to_standard_error(repository: Path) -> None:
    command = [sys.executable, "-m", "serving.commands", "serve", "--repository", str(repository), *ANY_PORT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("ready")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert "Started HTTPService" in errors
    assert process.returncode == 0


@pytest.mark.end_to_end
def test_two_releases_are_both_served_each_by_its_own_student(release: Release, tmp_path: Path) -> None:
    newer = Release(tmp_path / "export", write_export(tmp_path / "export", version=2))
    root = write_repository(release.export_dir, tmp_path / "repository")
    write_repository(newer.export_dir, tmp_path / "newer")
    for name in ("student", "classifier"):
        shutil.move(tmp_path / "newer" / name / "2", root / name / "2")
        serve_versions(root, name, (1, 2))
    with (
        TritonServer(root, http_port=0, grpc_port=0, metrics_port=0) as server,
        Client(server.http_url) as client,
    ):
        assert [found.version for found in server.releases] == [1, 2]
        for version, known in ((1, release), (2, newer)):
            answer = client.predict([picture(3)], "balanced", version=version)[0]
            expected = known.probabilities([picture(3)], 0.0)[0]
            assert answer.version == version
            assert answer.probabilities[0] == pytest.approx(expected.max(), rel=1e-4)
        assert client.predict([picture(3)])[0].version == 2


@pytest.mark.end_to_end
def test_loading_models_needs_the_admin_key(server: TritonServer) -> None:
    http = tritonclient.http.InferenceServerClient(address(server.http_url))
    grpc = tritonclient.grpc.InferenceServerClient(address(server.grpc_url))
    try:
        for client in (http, grpc):
            for forbidden in (
                lambda client=client: client.load_model("student"),
                lambda client=client: client.unload_model("student"),
                lambda client=client: client.get_inference_statistics(),
                lambda client=client: client.update_log_settings(settings={"log_verbose_level": 1}),
            ):
                with pytest.raises(InferenceServerException):
                    forbidden()
        granted = grpc.get_model_repository_index(headers={"triton-grpc-protocol-tailor-admin-key": ADMIN_KEY})
        assert {model.name for model in granted.models} == {"student", "classifier"}
    finally:
        http.close()
        grpc.close()
    assert ADMIN_KEY not in server.log.read_text()


@pytest.mark.end_to_end
def test_serving_changes_nothing_in_the_repository(server: TritonServer) -> None:
    version = server.repository / "classifier" / "1"
    assert {path.name for path in version.iterdir() if path.is_dir()} == set()
    assert not (version / "__pycache__").read_bytes()


@pytest.mark.end_to_end
def test_status_tells_server_models_and_versions(server: TritonServer) -> None:
    for url in (server.http_url, server.grpc_url):
        with Client(url) as client:
            status = client.status()
        assert status.server_version == "2.51.0"
        assert [(model.name, model.versions) for model in status.models] == [("student", (1,)), ("classifier", (1,))]
        assert status.answers
        assert status.problem is None


@pytest.mark.end_to_end
def test_broken_model_makes_the_start_fail_with_the_log_and_nothing_left(repository: Path, tmp_path: Path) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    (root / "classifier" / "1" / "model.py").write_text("import nowhere_to_be_found\n")
    server = TritonServer(root, http_port=0, grpc_port=0, metrics_port=0, log=tmp_path / "log")
    with pytest.raises(ServingError, match="ended with status 1 while it started") as caught:
        server.start()
    assert "nowhere_to_be_found" in (tmp_path / "log").read_text()
    assert str(caught.value).count("\n") > 1
    assert server.process_id is None
    assert shared_memory(server.prefix) == []


def test_tampered_graph_is_refused_before_anything_starts(repository: Path, tmp_path: Path) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    path = root / "student" / "1" / "model.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    server = TritonServer(root, http_port=0, grpc_port=0, metrics_port=0)
    with pytest.raises(ManifestError, match=r"model\.onnx: sha256 is"):
        server.start()
    assert server.process_id is None


@pytest.mark.parametrize("option", ["http_port", "grpc_port", "metrics_port"])
def test_port_in_use_is_named_with_its_option(repository: Path, option: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0} | {option: port}
        flag = "--" + option.replace("_", "-")
        with pytest.raises(ServingError, match=f"{flag} {port}: the port is in use on 127.0.0.1"):
            TritonServer(repository, **ports).start()


def test_weak_admin_key_is_refused(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILOR_ADMIN_KEY", "a,b")
    with pytest.raises(InputError, match="TAILOR_ADMIN_KEY is not usable"):
        TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0).start()


def test_log_that_cannot_be_written_is_named(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    server = TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0, log=tmp_path / "file" / "log")
    with pytest.raises(InputError, match="give a log file that can be written"):
        server.start()


def test_environment_of_the_stubs_is_this_interpreters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILOR_ADMIN_KEY", ADMIN_KEY)
    environment = find_installation().environment
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"
    assert "TAILOR_ADMIN_KEY" not in environment


def test_python_without_stubs_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.sys, "version_info", (3, 13, 0))
    with pytest.raises(InstallationError, match=r"needs Python 3\.11 or 3\.12, this is 3\.13"):
        find_installation()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytriton" else find(name))
    with pytest.raises(InstallationError, match=r"nvidia-pytriton.* is missing; pip install 'tailor\[serve\]'"):
        find_installation()


def test_numpy_2_is_refused_because_it_breaks_the_stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "2.3.1")
    with pytest.raises(
        InstallationError, match=r"numpy 2\.3\.1 breaks this Triton's Python stubs; pip install 'numpy<2'"
    ):
        find_installation()


def test_missing_libpython_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    said = f"stub: error while loading shared libraries: libpython3.{sys.version_info[1]}.so.1.0: cannot open"
    ended = subprocess.CompletedProcess([], 127, "", said)
    monkeypatch.setattr(installation.subprocess, "run", lambda *_arguments, **_options: ended)
    with pytest.raises(
        InstallationError, match=r"libpython3\.\d+\.so\.1\.0 is missing; install it \(Debian: apt install"
    ):
        find_installation()
