"""`tailor ingest` with the real commands: DVC reruns only the stages that the new images affect."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

from pipeline.sources.digits import DigitsSource
from tests.support.project import Project

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def first_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a finished split, to copy."""
    first_project = Project(tmp_path_factory.mktemp("ingest") / "project")
    first_project.set({"ingest": {"settle_seconds": 0}})
    first_project.commit()
    first_project.run("dvc", "repro", "split")
    return first_project


@pytest.fixture
def project(first_project: Project, tmp_path: Path) -> Project:
    """A copy of the project for one test."""
    own = copy.copy(first_project)
    own.root = shutil.copytree(first_project.root, tmp_path / "project")
    return own


def drop(project: Project, count: int) -> None:
    """Write scans that are in no split into the class folders of the drop folder."""
    tables = (pyarrow.parquet.read_table(path) for path in (project.root / "data/split").glob("*.parquet"))
    held = {reference for table in tables for reference in table.column("reference").to_pylist()}
    source = DigitsSource()
    for row in [row for row in source.rows if row.reference not in held][:count]:
        path = project.root / f"data/drop/{row.label}/{row.reference}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read(row.reference))


def md5s(project: Project) -> dict[str, str]:
    """Return DVC's md5 sums of the split's tables."""
    done = project.run("dvc", "ls", ".", "data/split", "--show-hash", "--json")
    return {entry["path"]: entry["md5"] for entry in json.loads(done.stdout)}


def test_a_new_shard_changes_only_the_training_split(project):
    before = md5s(project)
    assert "no new data" in project.run("tailor", "ingest").stdout
    assert project.stages_run(project.run("dvc", "repro", "split")) == []
    drop(project, 30)
    report = json.loads(project.run("tailor", "ingest", "--json").stdout)
    assert (report["added"], report["quarantined"], report["refused"]) == (30, 0, None)
    assert "data/ingested" in project.run("dvc", "status", "split").stdout
    done = project.run("dvc", "repro", "split")
    assert project.stages_run(done) == ["split"] and "30 of the training images taken in" in done.stdout
    after = md5s(project)
    assert {name for name in after if after[name] != before[name]} == {"train.parquet"}
    # The empty class folders remain for the next images.
    folders = [folder for folder in (project.root / "data/drop").iterdir() if not folder.name.startswith(".")]
    assert folders and not any(list(folder.iterdir()) for folder in folders)
    assert "no new data" in project.run("tailor", "ingest").stdout
    # After the ingest is reverted, the previous split is in DVC's cache, and no stage runs.
    next((project.root / "data/ingested").glob("*.parquet")).unlink()
    assert project.stages_run(project.run("dvc", "repro", "split")) == []
    assert md5s(project) == before


def test_a_refused_drop_exits_with_status_1_and_one_line(project):
    (project.root / "data/drop/3").mkdir(parents=True)
    (project.root / "data/drop/3/notes.png").write_text("no image")
    done = project.run("tailor", "ingest", expect=1)
    assert "1 of 1 row is bad" in done.stdout and (project.root / "data/drop/3/notes.png").exists()


def test_misuse_exits_with_status_2_and_one_line(project):
    done = project.run("tailor", "ingest", "--drop", "nowhere", expect=2)
    assert done.stderr == "tailor: --drop is 'nowhere', which is not a folder; expected one with a folder per class\n"
