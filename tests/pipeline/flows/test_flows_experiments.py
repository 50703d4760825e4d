"""A decided run is saved as a DVC experiment without other changes to the project; a failure is one line of output."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.flows.dvc_experiments import ExperimentError, create_experiment, save_experiment
from pipeline.flows.records import DecisionRecord
from pipeline.params import load_params

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
NO_IDENTITY = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "DVC_NO_ANALYTICS": "1"}
GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@example.invalid")
REFUSED = DecisionRecord("a" * 64, 1, "b" * 64, "refused", None)
PROMOTED = DecisionRecord("c" * 64, 1, "d" * 64, "promoted", 2)
STAGES = {
    "evaluate": {"cmd": "mkdir -p out && cp answers out/metrics.json", "deps": ["answers"], "outs": ["out"]},
    "seeds": {"cmd": "cp answers spread", "deps": ["answers"], "outs": ["spread"]},
}


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout


@pytest.fixture(autouse=True, scope="module")
def no_git_identity():
    """An environment without a git identity."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NO_IDENTITY.items():
            patch.setenv(name, value)
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        yield


def write_project() -> None:
    """Write a project into the current folder, without git."""
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES, "metrics": ["out/metrics.json"]}))
    Path("answers").write_text('{"accuracy": 0.5}')


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder as the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A committed project, with one of its two stages reproduced on newer answers and another seed."""
    made = tmp_path_factory.mktemp("committed") / "project"
    made.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        write_project()
        run("git", "init", "--quiet", ".")
        run("dvc", "init", "--quiet")
        run("dvc", "repro", "--quiet")
        run(*GIT, "add", "-A")
        run(*GIT, "commit", "--quiet", "-m", "a project")
        set_seed(5)
        Path("answers").write_text('{"accuracy": 0.75}')
        run("dvc", "repro", "--quiet", "--single-item", "evaluate")
    return made


@pytest.fixture
def project(committed, folder):
    """A copy of `committed` as the current folder."""
    shutil.copytree(committed, folder, dirs_exist_ok=True)
    return folder


def set_seed(seed: int) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump(params | {"seed": seed}))


def state(folder: Path) -> tuple[object, ...]:
    """Return the state of the project: files, their times, index, branch, stash, DVC's status."""
    files = {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and not {".git", "tmp", "cache"} & set(path.relative_to(folder).parts)
    }
    index = (folder / ".git/index").read_bytes()
    refs = run("git", "for-each-ref", "refs/heads", "refs/stash", "refs/tags")
    return files, index, refs, (folder / ".git/HEAD").read_text(), run("dvc", "status", "--json")


def list_experiments(*options: str) -> dict[str, dict]:
    """Return the experiments that `dvc exp show` lists, by name."""
    listed = json.loads(run("dvc", "exp", "show", "--json", *options))
    return {
        revision["name"]: revision["data"]
        for row in listed
        for experiment in row["experiments"] or []
        for revision in experiment["revs"]
    }


def test_dvc_lists_a_decided_run_with_params_and_metrics_and_the_project_is_unchanged(project):
    Path("notes.txt").write_text("untracked")
    run("git", "add", "answers")  # staged files stay staged
    before, messages = state(project), []
    save_experiment(REFUSED, "few 0.61 is below 0.70", load_params(), messages.append)
    assert state(project) == before
    (line,) = messages
    name = re.fullmatch(
        r"saved as the DVC experiment (retrain-\d{8}-\d{6}-refused); `tailor experiments` lists it", line
    )[1]
    content = list_experiments()[name]
    assert content["metrics"]["out/metrics.json"]["data"] == {"accuracy": 0.75}
    assert content["params"]["params.yaml"]["data"]["seed"] == 5
    assert run("git", "log", "-1", "--format=%s", content["rev"]) == "retrain: refused: few 0.61 is below 0.70\n"
    assert "notes.txt" not in run("git", "ls-tree", "-r", "--name-only", content["rev"])
    # Stages that the run did not reproduce stay out of date in the experiment, unlike with `dvc exp save`.
    assert list(json.loads(run("dvc", "status", "--json"))) == ["seeds"]
    assert run("git", "show", f"{content['rev']}:dvc.lock") == Path("dvc.lock").read_text()


@pytest.mark.usefixtures("project")
def test_each_run_is_saved_and_can_be_applied_and_removed():
    messages = []
    save_experiment(REFUSED, "worse", load_params(), messages.append)
    Path("answers").write_text('{"accuracy": 1.0}')
    run("dvc", "repro", "--quiet", "--single-item", "evaluate")
    save_experiment(PROMOTED, "version 2 instead of 1", load_params(), messages.append)
    refused, promoted = (line.split(";")[0].rpartition(" ")[2] for line in messages)
    assert promoted.endswith("-promoted-2") and set(list_experiments()) == {refused, promoted}
    run("dvc", "exp", "apply", refused)
    assert json.loads(Path("out/metrics.json").read_text()) == {"accuracy": 0.75}
    run(*GIT, "commit", "--quiet", "-am", "a later commit")
    assert list_experiments() == {} and set(list_experiments("--all-commits")) == {refused, promoted}
    run("dvc", "exp", "remove", refused)
    assert set(list_experiments("--all-commits")) == {promoted}
    run("dvc", "exp", "remove", "--all-commits")
    assert list_experiments("--all-commits") == {}


def test_an_experiment_of_a_project_in_a_subfolder_contains_its_untracked_lock_file(folder, monkeypatch):
    run("git", "init", "--quiet", ".")
    (folder / "part").mkdir()
    monkeypatch.chdir(folder / "part")
    write_project()
    run("dvc", "init", "--quiet", "--subdir")
    run(*GIT, "add", "-A", ":/")
    run(*GIT, "commit", "--quiet", "-m", "a project")
    run("dvc", "repro", "--quiet")
    create_experiment("retrain-1", "retrain: promoted")
    assert list_experiments()["retrain-1"]["metrics"]["out/metrics.json"]["data"] == {"accuracy": 0.5}


@pytest.mark.usefixtures("folder")
@pytest.mark.fault_case("no-git")
def test_without_a_git_repository_the_run_continues_and_the_message_has_the_remedy():
    write_project()
    messages = []
    save_experiment(REFUSED, "worse", load_params(), messages.append)
    run("git", "init", "--quiet", ".")
    save_experiment(REFUSED, "worse", load_params(), messages.append)
    assert messages == [
        "not saved as a DVC experiment: this folder is in no git repository; `git init`, then commit it",
        "not saved as a DVC experiment: git has no commit yet; `git commit` dvc.yaml, dvc.lock and params.yaml",
    ]


@pytest.mark.usefixtures("project")
def test_params_changed_during_the_run_are_not_saved_as_the_runs_params():
    first_params, messages = load_params(), []
    set_seed(6)
    save_experiment(REFUSED, "worse", first_params, messages.append)
    assert messages[0].startswith("not saved as a DVC experiment: params.yaml was changed during the run")
    assert list_experiments() == {}


def test_an_error_of_git_is_reported_with_gits_message(project, monkeypatch):
    with pytest.raises(ExperimentError, match=r"^git update-ref failed: fatal: .*bad name.*; see `git status`$"):
        create_experiment("no name", "a message")
    config = Path(".git/config")
    config.write_text(f"{config.read_text()}\n[core")
    with pytest.raises(ExperimentError, match=r"^git rev-parse failed: fatal: bad config line"):
        create_experiment("retrain-1", "a message")
    monkeypatch.setenv("PATH", str(project))
    with pytest.raises(ExperimentError, match=r"^git is not installed"):
        create_experiment("retrain-1", "a message")


@pytest.fixture
def slow_git(project):
    """Configure a git filter that hangs when git reads the answers; return the file that the filter creates."""
    Path(".git/info/attributes").write_text("answers filter=slow\n")
    run("git", "config", "filter.slow.clean", "echo $$ > .git/hangs; sleep 600")
    Path("answers").write_text('{"accuracy": 0.99}')
    return project / ".git/hangs"


@pytest.mark.fault_case("killed-during-experiment-record")
def test_a_hanging_git_is_ended_in_time_with_its_child_processes(project, slow_git):
    with pytest.raises(ExperimentError, match=r"^git add did not end in time; run it by hand$"):
        create_experiment("retrain-1", "a message", timeout=2.0)
    assert_exits(int(slow_git.read_text()))
    assert not (project / ".git/refs/exps").exists()


@pytest.mark.fault_case("killed-during-experiment-record")
def test_a_run_killed_while_it_is_saved_leaves_the_project_unchanged(project, slow_git):
    files = {path: path.read_bytes() for path in project.iterdir() if path.is_file()}
    index = (project / ".git/index").read_bytes()
    program = (
        "from pipeline.flows.dvc_experiments import create_experiment; create_experiment('retrain-1', 'a message')"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (slow_git.exists() and slow_git.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    assert_exits(int(slow_git.read_text()))
    assert {path: path.read_bytes() for path in project.iterdir() if path.is_file()} == files
    assert (project / ".git/index").read_bytes() == index and not list((project / ".git").glob("*.lock"))
    run("git", "config", "--remove-section", "filter.slow")
    create_experiment("retrain-1", "a message")
    assert set(list_experiments()) == {"retrain-1"}


def assert_exits(process_id: int) -> None:
    deadline = time.monotonic() + 20
    while Path(f"/proc/{process_id}/stat").exists():
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
        if state in "ZX":
            return
        assert time.monotonic() < deadline, f"process {process_id} still runs"
        time.sleep(0.02)
