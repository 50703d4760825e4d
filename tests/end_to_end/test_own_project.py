"""A user's project with the installed package, and the check that git never contains its images."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.installed import PNG, QUICK, Installed, put_images
from tests.support.project import ROOT, OwnProject, Project

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("own project")]

STAGES = [
    "code",
    "split",
    "prior",
    "embed",
    "embed_text",
    "teacher",
    "student",
    "classifier",
    "evaluate",
    "export",
    "seeds",
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def trees(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> OwnProject:
    """A project with images in three classes, trained by one `dvc repro`; a user module has a name of Tailor's."""
    project = installed.new(tmp_path_factory.mktemp("own") / "trees")
    put_images(project.root / "data/source")
    (project.root / "models.py").write_text("raise SystemExit('this is not Tailor')\n")
    project.run("tailor", "init", "data/source")
    project.set(QUICK)
    assert "data check: passed" in project.run("tailor", "data", "check").stdout
    project.first = project.run("dvc", "repro")
    project.commit()
    return project


def git_objects(project: Project) -> bytes:
    """Return the content of all objects in the project's git repository, reachable or not."""
    command = ["git", "cat-file", "--batch-all-objects", "--batch"]
    return subprocess.run(command, cwd=project.root, check=True, capture_output=True).stdout


def test_a_new_project_trains_evaluates_and_exports_with_the_installed_package(trees: OwnProject) -> None:
    assert trees.stages_run(trees.first) == STAGES
    manifest = json.loads((trees.root / "artifacts/export/manifest.json").read_text())
    assert manifest["classes"] == ["class0", "class1", "class2"]
    assert len(manifest["code_sha256"]) == 64 and manifest["versions"]["tailor"]
    local_paths = (str(ROOT), str(trees.root))
    for name in ("dvc.yaml", "dvc.lock", "params.yaml", ".gitignore", ".dvc/config"):
        assert not any(path in (trees.root / name).read_text() for path in local_paths), name


def test_a_second_repro_only_hashes_the_code(trees: OwnProject) -> None:
    assert trees.stages_run(trees.run("dvc", "repro")) == ["code"]


def test_an_upgrade_runs_the_stages_that_import_changed_code(installed: Installed, trees: OwnProject) -> None:
    paths = {"prior": "pipeline/prior.py", "metrics": "pipeline/evaluation/metrics.py"}
    modules = {name: installed.packages / path for name, path in paths.items()}
    before = {path: path.read_text() for path in modules.values()}
    try:
        modules["prior"].write_text(before[modules["prior"]] + "\n# a comment\n")
        assert trees.stages_run(trees.run("dvc", "repro")) == ["code"]
        modules["metrics"].write_text(before[modules["metrics"]] + "\nNEW = 1\n")
        changed = trees.stages_run(trees.run("dvc", "repro"))
        assert changed[:3] == ["code", "classifier", "evaluate"] and "seeds" in changed
    finally:
        for path, text in before.items():
            path.write_text(text)
    assert trees.stages_run(trees.run("dvc", "repro")) == ["code"]  # the previous results are in DVC's cache


def test_a_second_project_shares_only_the_environment(installed: Installed, trees: OwnProject, tmp_path: Path) -> None:
    birds = installed.new(tmp_path / "birds")
    put_images(birds.root / "data/source", (12, 8), seed=1)
    birds.run("tailor", "init", "data/source")
    birds.set(QUICK)
    assert birds.stages_run(birds.run("dvc", "repro", "split")) == ["code", "split"]
    classes = [json.loads((root / "data/split/classes.json").read_text()) for root in (birds.root, trees.root)]
    assert "class2" not in json.dumps(classes[0]) and "class2" in json.dumps(classes[1])


def test_git_contains_no_image_of_a_new_project(trees: OwnProject) -> None:
    put_images(trees.root / "data/drop", (2, 1))
    trees.run("git", "add", "-A")
    trees.run("dvc", "exp", "run", "-S", "prior.smoothing=0.5", "prior")
    trees.run("git", "checkout", "params.yaml")
    assert "refs/exps" in trees.run("git", "for-each-ref").stdout
    objects = git_objects(trees)
    assert b"queue_total" in objects and PNG not in objects


def test_git_contains_no_image_of_a_clone(tmp_path: Path) -> None:
    clone = Project(tmp_path / "clone")
    clone.commit()
    for folder in ("data/source", "data/drop"):
        put_images(clone.root / folder)
    clone.set({"data": {"source": "folder", "profile": "natural", "test_per_class": 1, "validation_per_class": 1}})
    clone.run("git", "add", "-A")
    clone.run("dvc", "exp", "run", "split")
    assert "refs/exps" in clone.run("git", "for-each-ref").stdout
    objects = git_objects(clone)
    assert b"queue_total" in objects and PNG not in objects


def test_dvc_shares_the_images_of_a_project(installed: Installed, tmp_path: Path) -> None:
    project = installed.new(tmp_path / "shared")
    put_images(project.root / "data/source", (3, 2))
    project.run("dvc", "add", "data/source")
    project.commit()
    assert "data/source.dvc" in project.run("git", "ls-files").stdout
    assert PNG not in git_objects(project)


def test_init_makes_the_working_folder_a_project_without_images_in_git(installed: Installed, tmp_path: Path) -> None:
    """The folder is part of a git repository, as in a repository of several projects."""
    put_images(tmp_path / "work/photos [1]")
    project = OwnProject(tmp_path / "work", installed.root / "bin", code=None)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    printed = project.run("tailor", "init", "photos [1]", "--dry-run").stdout
    assert "location: photos [1]" in printed and not (project.root / "params.yaml").exists()
    project.run("tailor", "init", "photos [1]")
    assert not (project.root / ".git").exists() and (project.root / ".dvc").is_dir()
    project.commit()
    assert PNG not in git_objects(project)
    inside = OwnProject(project.root / "data", installed.root / "bin", code=None)
    refused = inside.run("tailor", "init", "../photos [1]", expect=2)
    assert "is in the project" in refused.stderr and not (inside.root / "params.yaml").exists()
    assert "exists already" in project.run("tailor", "new", ".", expect=2).stderr


def test_the_package_contains_the_recipes(installed: Installed, tmp_path: Path) -> None:
    project = installed.new(tmp_path / "cifar", "--recipe", "recipes/cifar100-if100-200.yaml")
    assert "source: cifar100" in (project.root / "params.yaml").read_text()
    printed = project.run("python", "-P", "-m", "pipeline.commands", "recipe", "recipes/variants/k-m-2.yaml").stdout
    assert "student.queue_minimum: 3 → 2" in printed or "has these values already" in printed
