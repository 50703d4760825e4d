"""The commit of a run and the files of a revision: git errors are reported; a project may be a subfolder of a repo."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.evaluation.runs import load_run_at_revision
from pipeline.shared.errors import StageError
from pipeline.shared.lineage import GitError, code_revision, git
from tests.support.making import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("git"), reason="needs git"),
]
STAGE = """stages:
  evaluate:
    cmd: "true"
    outs: [artifacts/evaluation/predictions.parquet, artifacts/prior.json]
"""


def run(folder, *command):
    author = {f"GIT_{role}_{part}": "a@b" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=os.environ | author | {"PATH": path})


def repository(root, project, *init):
    """A repository with a project in a subfolder; DVC is set up there (`--subdir`) or in the root."""
    folder = root / project
    (folder / "artifacts/evaluation").mkdir(parents=True)
    run(root, "git", "init", "-q")
    run(folder if init else root, "dvc", "init", "-q", *init)
    (folder / "artifacts/evaluation/predictions.parquet").write_bytes(b"predictions")
    (folder / "artifacts/prior.json").write_bytes(b"prior")
    (folder / "dvc.yaml").write_text(STAGE)
    run(folder, "dvc", "commit", "-q", "-f")
    run(root, "git", "add", "-A")
    run(root, "git", "commit", "-q", "-m", "a run")
    return folder


@pytest.mark.parametrize(
    ("project", "init"),
    [(".", ()), ("models/photos", ()), ("models/photos", ("--subdir",))],
    ids=["root", "top", "subdir"],
)
def test_a_run_of_a_revision_is_loaded_from_the_projects_folder(tmp_path, monkeypatch, project, init):
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(repository(tmp_path / "repository", project, *init))
    loaded = load_run_at_revision("HEAD", tmp_path / "copy")
    assert (loaded.predictions.read_bytes(), loaded.prior.read_bytes()) == (b"predictions", b"prior")


@pytest.mark.skipif(os.geteuid() != 0, reason="changes the owner of files")
def test_a_repository_of_another_owner_is_an_error_of_compare_and_init(tmp_path, monkeypatch):
    folder = repository(tmp_path, ".")
    (folder / "params.yaml").write_text("seed: 0\n")
    run(folder, "chown", "-R", "12345:12345", ".")
    monkeypatch.chdir(folder)
    with pytest.raises(GitError, match=r"dubious ownership.*safe\.directory"):
        git(Path(), "status")
    with pytest.raises(StageError, match="dubious ownership"):
        load_run_at_revision("HEAD", tmp_path / "copy")
    command = [sys.executable, "-m", "pipeline.commands", "init", "."]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert ended.returncode == 1 and "dubious ownership" in ended.stderr and ended.stderr.count("\n") == 1
    assert "has uncommitted changes" not in ended.stderr


def test_git_returns_none_outside_a_repository(tmp_path):
    assert git(tmp_path, "rev-parse", "HEAD") is None
    assert code_revision() == "unknown" or len(code_revision().partition("+")[0]) == 40


@pytest.mark.parametrize("damage", ["version", "config", "gitfile"])
def test_every_other_refusal_of_git_is_an_error_too(tmp_path, monkeypatch, capsys, damage):
    folder = repository(tmp_path, ".")
    monkeypatch.chdir(folder)
    if damage == "gitfile":
        (folder / ".git").rename(tmp_path / "moved")
        (folder / ".git").write_text("gitdir: /nowhere\n")
    else:
        config = folder / ".git/config"
        config.write_text("[core]\n\trepositoryformatversion = 99\n" if damage == "version" else "[core\n")
    with pytest.raises(GitError, match=r": fatal: .*(found 99|bad config line 1|not a git repository: /nowhere)"):
        git(Path(), "rev-parse", "HEAD")
    assert code_revision() == "unknown" and "recorded as unknown: " in capsys.readouterr().err
    with pytest.raises(StageError, match="fatal: "):
        load_run_at_revision("HEAD", tmp_path / "copy")


def test_a_repository_without_a_commit_has_no_revision_and_is_no_error(tmp_path, monkeypatch):
    run(tmp_path, "git", "init", "-q")
    monkeypatch.chdir(tmp_path)
    assert code_revision() == "unknown" and git(Path(), "status", "--porcelain") == ""
