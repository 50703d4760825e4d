"""DVC stages run by the flow: in order, within the time limit, and stopped when the requesting process exits."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.flows.dvc_stages import StageFailed, changed_stages, reproduce, stage_names
from pipeline.shared.errors import StageError
from pipeline.shared.owned_process import end_owned_process, start_owned_process

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
FOREVER = "echo $$ > pid; sleep 600 & sleep 600"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of two stages in the current folder; `set` defines the command of the second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in (["git", "init", "--quiet", "."], ["dvc", "init", "--quiet"]):
        subprocess.run(command, check=True, env=os.environ | {"PATH": binaries})

    def set_command(command):
        stages = {
            "split": {"cmd": "echo 1 > one", "outs": ["one"]},
            "export": {"cmd": command, "deps": ["one"], "outs": ["two"]},
        }
        Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))

    set_command("cp one two")
    return set_command


def become_subreaper(on: bool) -> None:
    """Set whether this process adopts orphans of its descendants: prctl(2), PR_SET_CHILD_SUBREAPER."""
    assert ctypes.CDLL(None, use_errno=True).prctl(36, int(on), 0, 0, 0) == 0


def await_file(path: str | Path) -> str:
    deadline = time.monotonic() + 60
    while not Path(path).exists() or not Path(path).read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return Path(path).read_text().strip()


def exits(process_id: int, reaped: bool = False) -> bool:
    """Return whether the process exits in time; reaps it, since a zombie keeps its id."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE and not reaped:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_the_stages_of_a_release_are_in_topological_order_without_seeds(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert stage_names() == [
        "split",
        "prior",
        "embed",
        "embed_text",
        "teacher",
        "student",
        "classifier",
        "evaluate",
        "export",
    ]


@pytest.mark.usefixtures("project")
def test_a_project_without_an_export_stage_is_refused():
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"split": {"cmd": "true"}}}))
    with pytest.raises(StageError, match=r"dvc\.yaml: no stage 'export'"):
        stage_names()


@pytest.mark.usefixtures("project")
def test_a_stage_runs_only_if_it_has_changed():
    assert changed_stages(["split", "export"]) == ["split", "export"]
    lines = []
    assert reproduce("split", lines.append) is True
    assert "Running stage 'split':" in lines and not any("git add" in line for line in lines)
    assert reproduce("split", lines.append) is False
    assert changed_stages(["split", "export"]) == ["export"]


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("echo 'export: tau is 0; expected more' >&2; exit 2", 2, "stage export failed: tau is 0; expected more"),
        ("exit 1", 1, "stage export failed: failed to reproduce 'export'"),
    ],
)
def test_the_error_of_a_failed_stage_has_its_last_line_and_exit_status(project, command, status, message):
    reproduce("split", lambda _line: None)
    project(command)
    with pytest.raises(StageFailed) as caught:
        reproduce("export", lambda _line: None)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert caught.value.status == status


@pytest.mark.fault_case("stage-hangs")
def test_a_stage_that_times_out_is_ended_with_its_child_processes(project):
    reproduce("split", lambda _line: None)
    project(FOREVER)
    with pytest.raises(StageFailed, match=r"stage export did not end within 8 s; set retrain\.stage_hours higher"):
        reproduce("export", lambda _line: None, timeout=8.0)
    assert exits(int(await_file("pid")))


def test_a_stage_ends_when_the_process_that_started_it_is_killed(project):
    reproduce("split", lambda _line: None)
    project(FOREVER)
    program = "from pipeline.flows.dvc_stages import reproduce; reproduce('export', print)"
    owner = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)})
    shell = int(await_file("pid"))
    children, dvc = psutil.Process(shell).children(), psutil.Process(shell).ppid()
    owner.kill()
    owner.wait()
    assert exits(shell) and all(exits(child.pid) for child in children) and exits(dvc, reaped=True)
    # Its locks are released.
    project("cp one two")
    assert reproduce("export", lambda _line: None) is True


def test_an_owned_process_leaves_no_zombie_where_orphans_are_not_reaped(tmp_path):
    # As in a container whose init does not reap: this process adopts the orphans and does not reap them.
    stubborn = "trap '' TERM; echo $$ > pid; while :; do sleep 0.1; done"
    owner = (
        "import time; from pipeline.shared.owned_process import start_owned_process\n"
        f"start_owned_process(['sh', '-c', {stubborn!r}]); time.sleep(600)"
    )
    become_subreaper(True)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", owner], env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path
        )
        command = int(await_file(tmp_path / "pid"))
        wrapper = psutil.Process(command).ppid()
        process.kill()
        process.wait()
        assert exits(wrapper) and not psutil.pid_exists(command)
        os.waitpid(wrapper, 0)
    finally:
        become_subreaper(False)


def test_an_owned_process_returns_the_commands_exit_status_and_ignores_signals():
    for command, status in (("exit 3", 3), ("kill -9 $$", 137)):
        process = start_owned_process(["sh", "-c", command])
        assert process.wait(30) == status
    process = start_owned_process(["sh", "-c", "echo up; sleep 600"])
    assert process.stdout.readline() == "up\n"
    process.terminate()
    time.sleep(0.2)
    assert process.poll() is None
    assert end_owned_process(process) == 128 + 15


@pytest.mark.parametrize("end", ["kill -9 $$", "exit 0"])
@pytest.mark.fault_case("dvc-killed")
def test_child_processes_of_a_command_end_with_it(end, tmp_path):
    # As when the OOM killer kills only DVC: a retry must not train in parallel with the running stage.
    pid_file = tmp_path / "pid"
    process = start_owned_process(["sh", "-c", f"sleep 600 & echo $! > {pid_file}; {end}"])
    assert process.wait(30) == (137 if "kill" in end else 0)
    assert exits(int(pid_file.read_text()))
    assert end_owned_process(process) == process.returncode


def test_a_file_whose_name_dvc_cannot_encode_is_named(project, tmp_path):
    project("cat data/* > two")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / os.fsdecode(b"caf\xe9.png")).touch()
    stages = yaml.safe_load(Path("dvc.yaml").read_text())
    stages["stages"]["export"]["deps"] = ["data"]
    Path("dvc.yaml").write_text(yaml.safe_dump(stages))
    with pytest.raises(StageError, match=r"/data/caf\udce9\.png: its name is not UTF-8; rename it"):
        changed_stages(["export"])
