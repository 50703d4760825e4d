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
from pipeline.ingestion.ingest import IngestReport, ingest
from pipeline.shared.errors import ParamsError, StageError
from pipeline.sources import open_source
from tests.support.dropping import FIRST_NEW, drop_images, files, held_out, listing, project, rows_of, shards
from tests.support.making import png, write


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_good_images_join_the_training_split_and_validation_and_test_stay_byte_for_byte(tmp_path):
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


def test_the_files_leave_the_drop_for_its_own_taken_folder_or_for_good(tmp_path):
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
def test_class_folders_stay_in_the_drop_and_empty_ones_are_no_data(tmp_path, taken):
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


def test_nothing_new_is_said_and_changes_nothing(tmp_path):
    params = project(tmp_path)
    assert ingest(params) == IngestReport()
    drop_images("cat", range(3))
    ingest(params)
    before = files("data/ingested")
    drop_images("cat", range(3))
    again = ingest(params)
    assert (again.shard, again.added, again.already_there) == (None, 0, 3)
    assert str(again).startswith("no new data") and files("data/ingested") == before


def test_the_same_rows_make_the_same_shard_wherever_they_came_from(tmp_path):
    names = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        params = project(tmp_path / place)
        drop_images("dog", range(4))
        names.append(ingest(params).shard)
    assert names[0] == names[1]


def test_each_kind_of_bad_row_goes_to_the_quarantine_with_its_reason_and_its_file(tmp_path):
    params = project(tmp_path, min_good_share=0.0)
    label, held = held_out("test")
    other, validated = held_out("validation")
    trained = next(row for row in rows_of("train") if row["label"] == 0)
    drop_images("cat", range(2))
    bad = {
        f"{label}/held.png": (held, "in test"),
        f"{other}/validated.png": (validated, "in validation"),
        "dog/relabelled.png": ((Path("source") / trained["reference"]).read_bytes(), "two labels"),
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


def test_the_same_image_twice_under_one_label_is_taken_once(tmp_path):
    params = project(tmp_path)
    write(Path("data/drop/cat/a.png"), png(FIRST_NEW))
    write(Path("data/drop/cat/b.png"), png(FIRST_NEW))
    report = ingest(params)
    assert (report.added, report.already_there, report.quarantined) == (1, 1, 0)


@pytest.mark.parametrize(("bad", "refused"), [(3, False), (4, True)])
@pytest.mark.fault_case("few-bad-rows", "many-bad-rows")
def test_three_bad_rows_of_ten_pass_and_four_refuse_the_drop_whole(tmp_path, bad, refused):
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
    root, here = tmp_path_factory.mktemp("made"), Path.cwd()
    params = project(root, min_good_share=0.0, new_classes=["gnu"])
    trained = next(row for row in rows_of("train") if row["label"] == 1)
    images = {
        "held": held_out("test")[1],
        "validated": held_out("validation")[1],
        "trained": (Path("source") / trained["reference"]).read_bytes(),
        "broken": png(1)[:50],
        **{f"new {number}": png(FIRST_NEW + number) for number in range(4)},
    }
    os.chdir(here)
    return root, params, images


IMAGES = ["held", "validated", "trained", "broken", *(f"new {number}" for number in range(4))]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["cat", "dog", "gnu", "yak"]), st.sampled_from(IMAGES)), max_size=12))
def test_every_row_ends_in_one_place_no_image_has_two_labels_and_none_is_held_out(made, tmp_path, drop):
    root, params, images = made
    place = Path(tempfile.mkdtemp(dir=tmp_path))
    shutil.copytree(root / "data/split", place / "data/split")
    os.chdir(place)
    for number, (label, image) in enumerate(drop):
        write(Path(f"data/drop/{label}/{number}.png"), images[image])
    report = ingest(params)
    assert report.added + report.already_there + report.quarantined == len(drop)
    taken = {row["sha256"]: row["label"] for row in shards()}
    assert len(taken) == len(shards()) == report.added
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in images.items()}
    assert not {digests[name] for name in ("held", "validated", "trained", "broken")} & set(taken)
    asked = {name: {label for label, image in drop if image == name and label != "yak"} for name in images}
    expected = {digests[name]: labels for name, labels in asked.items() if name.startswith("new") and len(labels) == 1}
    assert {digest: {label} for digest, label in taken.items()} == expected
    again = ingest(params)
    assert again == IngestReport()


def test_one_ingest_at_a_time(tmp_path):
    from filelock import FileLock

    params = project(tmp_path)
    drop_images("cat", range(1))
    Path("data/.ingest").mkdir()
    with FileLock("data/.ingest/lock"), pytest.raises(StageError, match="another ingest holds it"):
        ingest(params)
    assert ingest(params).added == 1


def test_without_a_split_nothing_is_taken_as_what_is_held_out_is_not_known(tmp_path):
    params = project(tmp_path)
    drop_images("cat", range(1))
    for path in Path("data/split").iterdir():
        path.unlink()
    with pytest.raises(ParamsError, match="run `dvc repro split` first"):
        ingest(params)
    assert len(files("data/drop")) == 1


def test_a_drop_that_was_named_and_is_not_there_is_misuse(tmp_path):
    with pytest.raises(ParamsError, match="--drop is 'nowhere', which is not a folder"):
        ingest(project(tmp_path), Path("nowhere"))
