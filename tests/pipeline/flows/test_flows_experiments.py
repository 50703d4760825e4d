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

from pipeline.flows.dvc_experiments import ExperimentError, keep_run, save
from pipeline.flows.records import Decided
from pipeline.params import load_params

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
NOBODY = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "DVC_NO_ANALYTICS": "1"}
GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@example.invalid")
REFUSED = Decided("a" * 64, 1, "b" * 64, "refused", None)
PROMOTED = Decided("c" * 64, 1, "d" * 64, "promoted", 2)
STAGES = {
    "evaluate": {"cmd": "mkdir -p out && cp answers out/metrics.json", "deps": ["answers"], "outs": ["out"]},
    "seeds": {"cmd": "cp answers spread", "deps": ["answers"], "outs": ["spread"]},
}


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout


@pytest.fixture(autouse=True, scope="module")
def nobody():
    """An environment without a git identity."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NOBODY.items():
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


def shown(*options: str) -> dict[str, dict]:
    """Return the experiments that `dvc exp show` lists, by name."""
    listed = json.loads(run("dvc", "exp", "show", "--json", *options))
    return {
        revision["name"]: revision["data"]
        for row in listed
        for experiment in row["experiments"] or []
        for revision in experiment["revs"]
    }


def test_a_decided_run_is_listed_with_its_params_and_metrics_and_the_project_stays_as_it_is(project):
    Path("notes.txt").write_text("of somebody's own")
    run("git", "add", "answers")  # staged files stay staged
    before, said = state(project), []
    keep_run(REFUSED, "few 0.61 is below 0.70", load_params(), said.append)
    assert state(project) == before
    (line,) = said
    name = re.fullmatch(
        r"kept as the DVC experiment (retrain-\d{8}-\d{6}-refused); `tailor experiments` lists it", line
    )[1]
    content = shown()[name]
    assert content["metrics"]["out/metrics.json"]["data"] == {"accuracy": 0.75}
    assert content["params"]["params.yaml"]["data"]["seed"] == 5
    assert run("git", "log", "-1", "--format=%s", content["rev"]) == "retrain: refused: few 0.61 is below 0.70\n"
    assert "notes.txt" not in run("git", "ls-tree", "-r", "--name-only", content["rev"])
    # Stages that the run did not reproduce stay out of date in the experiment, unlike with `dvc exp save`.
    assert list(json.loads(run("dvc", "status", "--json"))) == ["seeds"]
    assert run("git", "show", f"{content['rev']}:dvc.lock") == Path("dvc.lock").read_text()


@pytest.mark.usefixtures("project")
def test_each_run_is_kept_its_files_come_back_and_it_can_be_removed():
    said = []
    keep_run(REFUSED, "worse", load_params(), said.append)
    Path("answers").write_text('{"accuracy": 1.0}')
    run("dvc", "repro", "--quiet", "--single-item", "evaluate")
    keep_run(PROMOTED, "version 2 instead of 1", load_params(), said.append)
    refused, promoted = (line.split(";")[0].rpartition(" ")[2] for line in said)
    assert promoted.endswith("-promoted-2") and set(shown()) == {refused, promoted}
    run("dvc", "exp", "apply", refused)
    assert json.loads(Path("out/metrics.json").read_text()) == {"accuracy": 0.75}
    run(*GIT, "commit", "--quiet", "-am", "the project moves on")
    assert shown() == {} and set(shown("--all-commits")) == {refused, promoted}
    run("dvc", "exp", "remove", refused)
    assert set(shown("--all-commits")) == {promoted}
    run("dvc", "exp", "remove", "--all-commits")
    assert shown("--all-commits") == {}


def test_a_project_in_a_folder_of_a_repository_whose_lock_git_does_not_track_yet_is_kept_with_it(folder, monkeypatch):
    run("git", "init", "--quiet", ".")
    (folder / "part").mkdir()
    monkeypatch.chdir(folder / "part")
    write_project()
    run("dvc", "init", "--quiet", "--subdir")
    run(*GIT, "add", "-A", ":/")
    run(*GIT, "commit", "--quiet", "-m", "a project")
    run("dvc", "repro", "--quiet")
    save("retrain-1", "retrain: promoted")
    assert shown()["retrain-1"]["metrics"]["out/metrics.json"]["data"] == {"accuracy": 0.5}


@pytest.mark.usefixtures("folder")
@pytest.mark.fault_case("no-git")
def test_a_project_that_git_does_not_know_goes_on_and_is_told_what_to_do():
    write_project()
    said = []
    keep_run(REFUSED, "worse", load_params(), said.append)
    run("git", "init", "--quiet", ".")
    keep_run(REFUSED, "worse", load_params(), said.append)
    assert said == [
        "not kept as a DVC experiment: this folder is in no git repository; `git init`, then commit it",
        "not kept as a DVC experiment: git has no commit yet; `git commit` dvc.yaml, dvc.lock and params.yaml",
    ]


@pytest.mark.usefixtures("project")
def test_params_that_changed_while_the_run_went_on_are_not_taken_for_its_own():
    began_with, said = load_params(), []
    set_seed(6)
    keep_run(REFUSED, "worse", began_with, said.append)
    assert said[0].startswith("not kept as a DVC experiment: params.yaml was changed while the run went on")
    assert shown() == {}


def test_a_git_that_fails_is_told_in_its_own_words(project, monkeypatch):
    with pytest.raises(ExperimentError, match=r"^git update-ref failed: fatal: .*bad name.*; see `git status`$"):
        save("no name", "a message")
    config = Path(".git/config")
    config.write_text(f"{config.read_text()}\n[core")
    with pytest.raises(ExperimentError, match=r"^git rev-parse failed: fatal: bad config line"):
        save("retrain-1", "a message")
    monkeypatch.setenv("PATH", str(project))
    with pytest.raises(ExperimentError, match=r"^git is not installed"):
        save("retrain-1", "a message")


@pytest.fixture
def slow_git(project):
    """Configure a git filter that hangs when git reads the answers; return the file that the filter creates."""
    Path(".git/info/attributes").write_text("answers filter=slow\n")
    run("git", "config", "filter.slow.clean", "echo $$ > .git/hangs; sleep 600")
    Path("answers").write_text('{"accuracy": 0.99}')
    return project / ".git/hangs"


@pytest.mark.fault_case("killed-during-experiment-record")
def test_a_git_that_hangs_is_ended_in_time_with_what_it_started(project, slow_git):
    with pytest.raises(ExperimentError, match=r"^git add did not end in time; try it by hand$"):
        save("retrain-1", "a message", limit=2.0)
    assert_gone(int(slow_git.read_text()))
    assert not (project / ".git/refs/exps").exists()


@pytest.mark.fault_case("killed-during-experiment-record")
def test_a_run_killed_while_it_is_recorded_leaves_the_project_as_it_was(project, slow_git):
    files = {path: path.read_bytes() for path in project.iterdir() if path.is_file()}
    index = (project / ".git/index").read_bytes()
    program = "from pipeline.flows.dvc_experiments import save; save('retrain-1', 'a message')"
    owner = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (slow_git.exists() and slow_git.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    assert_gone(int(slow_git.read_text()))
    assert {path: path.read_bytes() for path in project.iterdir() if path.is_file()} == files
    assert (project / ".git/index").read_bytes() == index and not list((project / ".git").glob("*.lock"))
    run("git", "config", "--remove-section", "filter.slow")
    save("retrain-1", "a message")
    assert set(shown()) == {"retrain-1"}


def assert_gone(process_id: int) -> None:
    deadline = time.monotonic() + 20
    while Path(f"/proc/{process_id}/stat").exists():
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
        if state in "ZX":
            return
        assert time.monotonic() < deadline, f"process {process_id} lives on"
        time.sleep(0.02)
