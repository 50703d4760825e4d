"""Ingest: a drop folder becomes one shard of training images, or nothing changes."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import split
from pipeline.ingestion.ingest import ingest
from pipeline.ingestion.transaction import IngestReport
from pipeline.shared.errors import ParamsError, StageError
from pipeline.sources import open_source
from tests.support.dropping import FIRST_NEW, drop_images, files, held_out, listing, project, rows_of, shards
from tests.support.making import png, write


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_good_images_are_added_to_train_and_leave_validation_and_test_unchanged(tmp_path):
    params = project(tmp_path)
    before, old = files("data/split"), rows_of("train")
    drop_images("cat", range(3))
    drop_images("eel", range(3, 5))
    report = ingest(params)
    assert (report.added, report.quarantined, report.waiting, report.refused) == (5, 0, 0, None)
    assert report.shard == Path(f"data/ingested/{hashlib.sha256(report.shard.read_bytes()).hexdigest()}.parquet")
    split.run(params)
    after = files("data/split")
    for name in ("validation.parquet", "test.parquet", "classes.json"):
        assert after[f"data/split/{name}"] == before[f"data/split/{name}"]
    new = rows_of("train")
    assert new[: len(old)] == old and [row["label"] for row in new[len(old) :]] == [0, 0, 0, 2, 2]
    source = open_source(params.data)
    assert [source.read(row["reference"]) for row in new[len(old) :]] == [png(FIRST_NEW + i) for i in range(5)]


def test_ingested_files_are_moved_to_the_taken_folder_or_removed(tmp_path):
    params = project(tmp_path)
    drop_images("cat", range(2))
    ingest(params)
    assert not list(Path("data/drop/cat").iterdir())
    assert len(list(Path("data/drop/.taken").rglob("*.png"))) == 2
    params = project(tmp_path, taken="remove")
    drop_images("cat", range(2, 4))
    assert ingest(params).added == 2
    assert len(list(Path("data/drop").rglob("*.png"))) == 2


@pytest.mark.parametrize("taken", ["keep", "remove"])
def test_class_folders_stay_in_the_drop_and_empty_folders_are_ignored(tmp_path, taken):
    params = project(tmp_path, taken=taken, new_classes="refuse")
    drop_images("cat", range(1))
    drop_images("dog/monday", range(1, 2))
    Path("data/drop/unknown").mkdir()
    assert ingest(params).added == 2
    folders = {path for path in Path("data/drop").rglob("*") if path.is_dir() and ".taken" not in path.parts}
    assert {str(path.relative_to("data/drop")) for path in folders} == {"cat", "dog", "dog/monday", "unknown"}
    assert ingest(params) == IngestReport()
    # `cp new.png data/drop/cat` between two rounds: without the folder, cp would create a file of that name.
    shutil.copy(write(Path("new.png"), png(FIRST_NEW + 2)), "data/drop/cat")
    assert ingest(params).added == 1
    split.run(params)
    assert [row["label"] for row in rows_of("train")[-3:]].count(0) == 2


def test_ingest_without_new_images_changes_nothing(tmp_path):
    params = project(tmp_path)
    assert ingest(params) == IngestReport()
    drop_images("cat", range(3))
    ingest(params)
    before = files("data/ingested")
    drop_images("cat", range(3))
    again = ingest(params)
    assert (again.shard, again.added, again.already_present) == (None, 0, 3)
    assert str(again).startswith("no new data") and files("data/ingested") == before


def test_equal_rows_give_equal_shards(tmp_path):
    names = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        params = project(tmp_path / folder)
        drop_images("dog", range(4))
        names.append(ingest(params).shard)
    assert names[0] == names[1]


def test_each_kind_of_bad_row_is_quarantined_with_its_reason_and_file(tmp_path):
    params = project(tmp_path, min_good_share=0.0)
    test_label, test_image = held_out("test")
    validation_label, validation_image = held_out("validation")
    train_row = next(row for row in rows_of("train") if row["label"] == 0)
    drop_images("cat", range(2))
    bad = {
        f"{test_label}/held.png": (test_image, "in test"),
        f"{validation_label}/validated.png": (validation_image, "in validation"),
        "dog/relabelled.png": ((Path("source") / train_row["reference"]).read_bytes(), "two labels"),
        "cat/twice.png": (png(5), "two labels"),
        "dog/twice.png": (png(5), "two labels"),
        "cat/empty.png": (b"", "empty"),
        "cat/notes.txt": (b"not an image", "format"),
        "cat/cut.png": (png(6)[:60], "damaged"),
        "gnu/new.png": (png(7), "unknown class"),
        "lost.png": (png(8), "no label"),
    }
    bad["cat/twice.png"] = bad["dog/twice.png"] = (png(FIRST_NEW + 50), "two labels")
    for name, (data, _) in bad.items():
        write(Path("data/drop") / name, data)
    report = ingest(params)
    assert (report.added, report.quarantined) == (2, len(bad))
    listed = {row["name"]: row for row in listing()}
    assert {name: row["reason"] for name, row in listed.items()} == {name: reason for name, (_, reason) in bad.items()}
    (folder,) = Path("data/quarantine").iterdir()
    assert all((folder / listed[name]["file"]).read_bytes() == data for name, (data, _) in bad.items())
    assert sum(report.reasons.values()) == len(bad) and report.reasons["two labels"] == 3
    assert [path.name for path in Path("data/drop").rglob("*") if path.is_file() and ".taken" not in path.parts] == []


def test_an_image_that_is_twice_in_the_drop_is_added_once(tmp_path):
    params = project(tmp_path)
    write(Path("data/drop/cat/a.png"), png(FIRST_NEW))
    write(Path("data/drop/cat/b.png"), png(FIRST_NEW))
    report = ingest(params)
    assert (report.added, report.already_present, report.quarantined) == (1, 1, 0)


@pytest.mark.parametrize(("bad", "refused"), [(3, False), (4, True)])
@pytest.mark.fault_case("few-bad-rows", "many-bad-rows")
def test_a_drop_is_refused_if_the_share_of_bad_rows_is_above_the_limit(tmp_path, bad, refused):
    params = project(tmp_path, min_good_share=0.7)
    drop_images("cat", range(10 - bad))
    for number in range(bad):
        write(Path(f"data/drop/cat/bad{number}.png"), b"no image")
    before = files("data/drop")
    report = ingest(params)
    assert report.reasons == {"format": bad}
    if refused:
        assert f"{bad} of 10 rows are bad" in report.refused and "ingest.min_good_share = 0.7" in report.refused
        assert (report.shard, report.added, report.quarantined) == (None, 0, 0)
        assert files("data/drop") == before and not Path("data/ingested").exists()
        assert len(listing()) == bad
    else:
        assert (report.added, report.quarantined, report.refused) == (7, 3, None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project to copy: its root, its params, and encoded images by kind."""
    root, working_folder = tmp_path_factory.mktemp("made"), Path.cwd()
    params = project(root, min_good_share=0.0, new_classes=["gnu"])
    train_row = next(row for row in rows_of("train") if row["label"] == 1)
    images = {
        "held": held_out("test")[1],
        "validated": held_out("validation")[1],
        "trained": (Path("source") / train_row["reference"]).read_bytes(),
        "broken": png(1)[:50],
        **{f"new {number}": png(FIRST_NEW + number) for number in range(4)},
    }
    os.chdir(working_folder)
    return root, params, images


IMAGES = ["held", "validated", "trained", "broken", *(f"new {number}" for number in range(4))]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["cat", "dog", "gnu", "yak"]), st.sampled_from(IMAGES)), max_size=12))
def test_every_row_is_added_once_quarantined_or_present_and_no_held_out_image_is_added(made, tmp_path, drop):
    root, params, images = made
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    shutil.copytree(root / "data/split", folder / "data/split")
    os.chdir(folder)
    for number, (label, image) in enumerate(drop):
        write(Path(f"data/drop/{label}/{number}.png"), images[image])
    report = ingest(params)
    assert report.added + report.already_present + report.quarantined == len(drop)
    added = {row["sha256"]: row["label"] for row in shards()}
    assert len(added) == len(shards()) == report.added
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in images.items()}
    assert not {digests[name] for name in ("held", "validated", "trained", "broken")} & set(added)
    labels = {name: {label for label, image in drop if image == name and label != "yak"} for name in images}
    expected = {digests[name]: own for name, own in labels.items() if name.startswith("new") and len(own) == 1}
    assert {digest: {label} for digest, label in added.items()} == expected
    again = ingest(params)
    assert again == IngestReport()


def test_a_second_ingest_at_the_same_time_fails(tmp_path):
    from filelock import FileLock

    params = project(tmp_path)
    drop_images("cat", range(1))
    Path("data/.ingest").mkdir()
    with FileLock("data/.ingest/lock"), pytest.raises(StageError, match="another ingest holds it"):
        ingest(params)
    assert ingest(params).added == 1


def test_without_a_split_nothing_is_ingested(tmp_path):
    params = project(tmp_path)
    drop_images("cat", range(1))
    for path in Path("data/split").iterdir():
        path.unlink()
    with pytest.raises(ParamsError, match="run `dvc repro split` first"):
        ingest(params)
    assert len(files("data/drop")) == 1


def test_a_missing_drop_argument_is_misuse(tmp_path):
    with pytest.raises(ParamsError, match="--drop is 'nowhere', which is not a folder"):
        ingest(project(tmp_path), Path("nowhere"))
