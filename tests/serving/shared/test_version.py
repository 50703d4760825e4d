"""Version and commit of Tailor in a checkout, in an installation, and without git."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from setuptools import Distribution

from serving.shared import version
from tests.support.making import ROOT


def git(folder: Path, *arguments: str) -> str:
    name = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")
    return subprocess.run(["git", "-C", folder, *name, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_of_a_checkout_is_marked_when_tracked_files_have_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version, "ROOT", tmp_path)
    git(tmp_path, "init", "--quiet")
    assert version.source_commit() == "unknown"  # no commit yet
    (tmp_path / "module.py").write_text("X = 1\n")
    git(tmp_path, "add", "module.py")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    (tmp_path / "untracked").touch()
    assert version.source_commit() == git(tmp_path, "rev-parse", "HEAD")[:12]
    (tmp_path / "module.py").write_text("X = 2\n")
    assert version.source_commit() == git(tmp_path, "rev-parse", "HEAD")[:12] + "+changes"


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_an_installation_has_the_commit_of_its_build_and_never_that_of_the_project_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "-m", "the user's project")
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(version, "ROOT", tmp_path / "site-packages")
    monkeypatch.setattr(version, "COMMIT_FILE", tmp_path / "site-packages/commit.txt")
    assert version.source_commit() == "unknown"
    version.COMMIT_FILE.write_text("0123456789ab\n")
    assert version.source_commit() == "0123456789ab"


def test_without_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(version, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert version.source_commit() == "unknown"


def test_the_distribution_has_a_name_of_its_own_and_the_version_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files()
    assert (distribution.get_name(), distribution.get_version()) == ("tailor-longtail", version.TAILOR_VERSION)
    assert tomllib.loads(Path("pyproject.toml").read_text())["project"]["scripts"] == {
        "tailor": "pipeline.commands.__main__:main"
    }
