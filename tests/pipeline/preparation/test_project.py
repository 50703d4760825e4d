"""`tailor new`: the project's files, its git and DVC setup in any location, and the image folders that git ignores."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from pipeline.commands.app import main
from pipeline.flows.records import Outcome
from pipeline.preparation.project import create_project, keep_out_of_git
from pipeline.scheduling import trigger
from pipeline.shared.errors import ParamsError
from tests.support.making import encode, picture
from tests.support.project import OwnProject

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("git"), reason="needs git")]


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True, text=True).stdout


def staged(folder: Path) -> set[str]:
    """Return the files that `git add -A` in a folder would commit."""
    git(folder, "add", "-A")
    return set(git(folder, "ls-files").splitlines())


def test_a_project_has_its_own_git_repository_unless_it_is_inside_one(tmp_path: Path) -> None:
    create_project(tmp_path / "alone")
    assert (tmp_path / "alone/.git").is_dir() and (tmp_path / "alone/.dvc/config").is_file()
    git(tmp_path, "init", "--quiet", "shared")
    (tmp_path / "shared/.gitignore").write_text("/build/\n")
    create_project(tmp_path / "shared/part")
    assert not (tmp_path / "shared/part/.git").exists() and (tmp_path / "shared/part/.dvc/config").is_file()
    create_project(tmp_path / "shared/build/demo")  # the outer repository ignores it
    assert (tmp_path / "shared/build/demo/.git").is_dir()
    files = {
        ".dvc-site-cache/repo/.gitignore",
        ".dvc/.gitignore",
        ".dvc/config",
        ".dvcignore",
        ".gitignore",
        "data/ingested/.gitignore",
        "data/text/README.md",
        "dvc.yaml",
        "params.yaml",
    }
    assert staged(tmp_path / "alone") == staged(tmp_path / "shared/part") == files
    assert "analytics = false" in (tmp_path / "alone/.dvc/config").read_text()


# Runs at the start of each Python process. Every use of DVC's default site cache, which each user can write, fails.
NO_DEFAULT_CACHE = """
import sys
def refuse(event, arguments):
    if event in ("open", "os.mkdir", "os.listdir", "os.scandir", "sqlite3.connect") and arguments:
        if str(arguments[0]).startswith("/var/tmp/dvc"):
            raise PermissionError(13, "the default site cache is used", str(arguments[0]))
sys.addaudithook(refuse)
"""


def test_dvc_writes_its_site_cache_into_the_project_and_nothing_to_the_default_folder(tmp_path: Path) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(NO_DEFAULT_CACHE)
    project = OwnProject(tmp_path / "trees")
    project.environment["PYTHONPATH"] = f"{tmp_path / 'hook'}{os.pathsep}{project.environment['PYTHONPATH']}"
    project.environment.pop("DVC_SITE_CACHE_DIR", None)
    project.root.mkdir()
    project.run("python", "-P", "-m", "pipeline.commands", "new", ".")
    put(project.root / "data/source")
    project.run("python", "-P", "-m", "pipeline.commands", "init", "data/source")
    assert project.stages_run(project.run("dvc", "repro", "split")) == ["code", "split"]
    repo = project.root / ".dvc-site-cache/repo"
    assert [path.name for path in repo.iterdir() if path.is_dir()] != []
    assert not repo.stat().st_mode & stat.S_IWOTH
    assert staged(project.root) & {str(path.relative_to(project.root)) for path in repo.rglob("*")} == {
        ".dvc-site-cache/repo/.gitignore"
    }
    project.run("dvc", "config", "--unset", "core.site_cache_dir")
    assert "the default site cache is used" in project.run("dvc", "status", expect=255).stderr


def test_a_clone_of_a_project_keeps_the_site_cache_in_a_folder_of_its_owner(tmp_path: Path) -> None:
    create_project(tmp_path / "first")
    staged(tmp_path / "first")
    git(tmp_path / "first", "-c", "user.name=t", "-c", "user.email=t@example.invalid", "commit", "--quiet", "-m", "new")
    git(tmp_path, "clone", "--quiet", "first", "clone")
    assert "site_cache_dir = .dvc-site-cache" in (tmp_path / "clone/.dvc/config").read_text()
    assert not (tmp_path / "clone/.dvc-site-cache/repo").stat().st_mode & stat.S_IWOTH


def test_no_file_of_the_folder_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("/notes\n")
    git(tmp_path, "init", "--quiet")
    create_project(tmp_path)
    rules = (tmp_path / ".gitignore").read_text().splitlines()
    assert rules[0] == "/notes" and "/data/source" in rules
    for folder, message in ((tmp_path, "params.yaml: exists already"), (tmp_path / "params.yaml", "is a file")):
        with pytest.raises(ParamsError, match=message):
            create_project(folder)


def test_git_ignores_a_folder_of_images_once_and_never_a_tracked_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "a*b [c]", "axb c", "tracked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"")
    assert not keep_out_of_git(Path("photos")), "no repository"
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "tracked")
    added = [keep_out_of_git(Path(name)) for name in ("photos", "photos", "a*b [c]", "tracked", ".", "/")]
    assert added == [True, False, True, False, False, False]
    assert staged(tmp_path) == {".gitignore", "axb c/1.jpg", "tracked/1.jpg"}


def put(folder: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for other in range(3):
            (folder / name / f"{other}.png").write_bytes(encode(picture(10 * number + other)))


@pytest.mark.parametrize("inside", [".", "work"])
def test_init_refuses_a_folder_of_images_that_contains_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], inside: str
) -> None:
    """git add would commit the class folders, and the project's own folders would be read as classes."""
    put(tmp_path)
    (tmp_path / inside).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / inside)
    given = "." if inside == "." else ".."
    assert main(["init", given]) == 2
    assert f"{given}: is the project's folder or contains it" in capsys.readouterr().err
    assert not (tmp_path / inside / "params.yaml").exists()


def test_image_folders_set_in_params_by_hand_are_ignored_by_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    create_project(Path())
    for name in ("data/source", "photos", "incoming", "other", "fox", "unlabelled", "fresh"):
        put(tmp_path / name)
    assert main(["init", "data/source"]) == 0
    params = tmp_path / "params.yaml"
    text = params.read_text().replace("location: data/source", "location: photos").replace("data/drop", "incoming")
    params.write_text(text.replace("settle_seconds: 60", "settle_seconds: 3600"))
    main(["data", "check"])
    main(["ingest"])
    main(["ingest", "--drop", "other"])
    with monkeypatch.context() as patch:
        patch.setattr(trigger, "run_once", lambda *_, **__: Outcome("skipped", ""))
        main(["retrain", "--drop", "fresh"])
    for command in (["add-class", "fox", "fox"], ["data", "next", "unlabelled", "--output", "ranked"]):
        assert main(command) != 0, "there is no release yet"
    assert {name for name in staged(tmp_path) if name.endswith(".png")} == set()
    assert "/ranked/" in (tmp_path / ".gitignore").read_text()


def test_a_pack_of_images_is_ignored_by_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create_project(Path())
    for name in ("a", "b"):
        for number in range(4):
            path = tmp_path / "data/source" / name / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encode(picture(number + (10 if name == "b" else 0))))
    assert main(["init", "data/source"]) == 0
    assert main(["data", "pack", "data/packed"]) == 0
    assert list((tmp_path / "data/packed").rglob("*.parquet"))
    assert not any(name.startswith(("data/packed", "data/source")) for name in staged(tmp_path))
