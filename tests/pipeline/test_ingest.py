"""Ingest: a drop folder becomes one shard of training images, or nothing."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import pytest
import torch
from dropping import FIRST_NEW, drop_images, files, held_out, project, rows_of, shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import png, table, write

from pipeline import drop_folder, ingest_round, split
from pipeline.dataset import load_images
from pipeline.errors import DataError, ParamsError, StageError
from pipeline.ingest import IngestReport, ingest
from pipeline.sources import Groups, Ingested, ReaderWithIngested, open_source
from pipeline.stream import ImageStream


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def listing() -> list[dict[str, str]]:
    (path,) = Path("data/quarantine").glob("*/rows.csv")
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


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
    """A project to copy: its root, its params, and encoded images by what they are."""
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


@pytest.mark.parametrize("policy", ["accept", ["gnu"]])
def test_a_new_class_that_is_allowed_comes_after_the_known_ones_and_keeps_their_numbers(tmp_path, policy):
    params = project(tmp_path, new_classes=policy)
    drop_images("gnu", range(3))
    drop_images("cat", range(3, 5))
    report = ingest(params)
    assert (report.new_classes, report.added) == (["gnu"], 5)
    split.run(params)
    assert Path("data/split/classes.json").read_text(encoding="utf-8").split('"')[1::2] == ["cat", "dog", "eel", "gnu"]
    assert [row["label"] for row in rows_of("train")[-5:]] == [0, 0, 3, 3, 3]
    drop_images("gnu", range(5, 6))
    again = ingest(project_params_again(params))
    assert (again.new_classes, again.added) == ([], 1)


def test_a_later_shard_of_a_new_class_is_taken_in_anew_when_the_first_was_taken_back(tmp_path):
    params = project(tmp_path, new_classes=["gnu"])
    drop_images("gnu", range(2))
    first = ingest(params).shard
    drop_images("gnu", range(2, 5))
    later = ingest(params).shard
    first.rename(tmp_path / "taken back.parquet")
    with pytest.raises(DataError, match=f"{later.name}: holds the class 'gnu', which the source does not have"):
        split.run(params)
    later.rename(Path("data/drop") / later.name)
    split.run(params)
    again = ingest(params)
    assert (again.added, again.new_classes) == (3, ["gnu"])
    assert split.run(params).ingested == 3


def test_a_class_taken_in_later_is_sorted_among_the_new_ones_behind_those_of_the_source(tmp_path):
    params = project(tmp_path, new_classes="accept")
    for label in ("zebra", "apple"):
        drop_images(label, range(2) if label == "zebra" else range(2, 4))
        ingest(params)
    split.run(params)
    assert json.loads(Path("data/split/classes.json").read_text())[3:] == ["apple", "zebra"]


def project_params_again(params):
    """The same params, new classes refused: a class that was taken in is known from then on."""
    return params.model_copy(update={"ingest": params.ingest.model_copy(update={"new_classes": "refuse"})})


@pytest.mark.parametrize("name", ["a\nb", " gnu", "g" * 201])
def test_a_new_class_with_an_unfit_name_is_bad_even_where_new_classes_are_accepted(tmp_path, name):
    params = project(tmp_path, new_classes="accept", min_good_share=0.0)
    table(Path("data/drop/new.parquet"), {"image": [png(FIRST_NEW)], "label": [name]})
    assert ingest(params).reasons == {"class name": 1}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_of_paths_is_taken_with_the_images_that_it_names(tmp_path, suffix):
    params = project(tmp_path)
    images = drop_images("photos", range(4))
    paths = [str(path.relative_to("data/drop")) for path in images]
    table(Path(f"data/drop/labels.{suffix}"), {"path": paths, "label": ["cat", "dog", "eel", "cat"]})
    report = ingest(params)
    assert (report.added, report.quarantined) == (4, 0)
    assert [row["label"] for row in shards()] == ["cat", "dog", "eel", "cat"]
    assert not [path for path in Path("data/drop").glob("*/*") if path.is_file()]


def test_integer_labels_of_a_table_are_class_numbers_and_others_are_bad(tmp_path):
    params = project(tmp_path, min_good_share=0.5)
    table(Path("data/drop/new.parquet"), {"image": [png(FIRST_NEW + i) for i in range(4)], "label": [0, 2, 3, None]})
    report = ingest(params)
    assert [row["label"] for row in shards()] == ["cat", "eel"]
    assert report.reasons == {"unknown class": 1, "no label": 1}


def test_a_label_of_a_csv_table_is_a_name_as_it_is_written_before_it_is_a_number(tmp_path):
    params = project(tmp_path, {"001": 9, "002": 9, "7": 9}, min_good_share=0.0)
    paths = [str(path.relative_to("data/drop")) for path in drop_images("photos", range(6))]
    labels = {"path": paths, "label": ["001", "002", "7", "1", "003", "3"]}
    table(Path("data/drop/labels.csv"), labels).rename("data/drop/LABELS.CSV")
    report = ingest(params)
    assert [row["label"] for row in shards()] == ["001", "002", "7", "002"]
    assert report.reasons == {"unknown class": 2}


def test_a_path_or_a_link_that_leads_out_of_the_drop_is_never_read(tmp_path):
    params = project(tmp_path, min_good_share=0.0)
    secret = write(tmp_path / "secret.png", png(FIRST_NEW + 1))
    table(Path("data/drop/labels.csv"), {"path": ["../../secret.png", str(secret)], "label": ["cat", "dog"]})
    Path("data/drop/cat").mkdir()
    Path("data/drop/cat/link.png").symlink_to(secret)
    report = ingest(params)
    assert (report.added, report.reasons) == (0, {"outside": 3})
    assert secret.read_bytes() not in files("data/quarantine").values()
    assert secret.exists()


def test_no_odd_entry_of_a_drop_stops_the_others(tmp_path):
    params = project(tmp_path, min_good_share=0.0)
    images = drop_images("photos", range(2))
    odd = {".": "outside", "a\0b": "outside", "x" * 5000: "unreadable", "photos/gone.png": "unreadable",
           "photos": "unreadable", "photos/pipe.png": "unreadable", "photos/itself.png": "outside"}  # fmt: skip
    os.mkfifo("data/drop/photos/pipe.png")
    Path("data/drop/photos/itself.png").symlink_to("itself.png")
    paths = [str(images[0].absolute()), "photos/../photos/1.png", *odd]
    table(Path("data/drop/labels.parquet"), {"path": paths, "label": ["cat"] * len(paths)})
    Path("data/drop/itself.csv").symlink_to("itself.csv")
    os.mkfifo("data/drop/pipe.csv")
    report = ingest(params)
    assert (report.added, report.quarantined) == (2, len(odd) + 2)
    found = {row["name"]: row["reason"] for row in listing()}
    assert found == {
        "itself.csv": "outside", "pipe.csv": "unreadable",
        **{f"labels.parquet#{number}": reason for number, reason in enumerate(odd.values(), 2)},
    }  # fmt: skip
    assert not [path for path in Path("data/drop/photos").iterdir() if path.is_file()]


@pytest.mark.parametrize("columns", [{"picture": [1], "label": ["cat"]}, {"image": [b"x"], "class": ["cat"]}])
def test_a_table_without_the_columns_is_one_bad_row(tmp_path, columns):
    params = project(tmp_path, min_good_share=0.0)
    table(Path("data/drop/odd.parquet"), columns)
    write(Path("data/drop/cut.parquet"), b"PAR1 cut off")
    report = ingest(params)
    assert report.reasons == {"table": 2} and {row["name"] for row in listing()} == {"odd.parquet", "cut.parquet"}


def test_a_csv_table_too_large_to_be_read_whole_is_one_bad_row(tmp_path, monkeypatch):
    params = project(tmp_path, min_good_share=0.0)
    monkeypatch.setattr(drop_folder, "MAX_CSV_BYTES", 10)
    table(Path("data/drop/labels.csv"), {"path": ["photos/0.png"], "label": ["cat"]})
    assert ingest(params).reasons == {"table": 1}
    assert "above the limit of 10" in listing()[0]["detail"]


def test_names_that_are_not_utf8_are_passed_over_and_said(tmp_path, capsys):
    params = project(tmp_path)
    drop_images("cat", range(2))
    odd = os.fsencode(tmp_path) + b"/data/drop/cat/\xff.png"
    Path(os.fsdecode(odd)).write_bytes(png(FIRST_NEW + 9))
    assert ingest(params).added == 2
    assert "1 names are not UTF-8" in capsys.readouterr().err and Path(os.fsdecode(odd)).exists()


def test_what_cannot_be_put_into_the_quarantine_is_never_removed_from_the_drop(tmp_path, monkeypatch):
    params = project(tmp_path, min_good_share=0.0, taken="remove")
    drop_images("cat", range(1))
    write(Path("data/drop/cat/foreign.png"), b"another user's")

    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(ingest_round.os, "link", denied)
    monkeypatch.setattr(ingest_round.shutil, "copyfile", denied)
    report = ingest(params)
    assert (report.added, report.quarantined, listing()[0]["file"]) == (1, 1, "")
    assert list(files("data/drop").values()) == [b"another user's"]


def test_two_damaged_tables_of_one_name_are_both_kept_in_the_quarantine(tmp_path):
    params = project(tmp_path, min_good_share=0.0, taken="remove")
    for content in (b"PAR1 monday", b"PAR1 tuesda"):
        write(Path("data/drop/labels.parquet"), content)
        ingest(params)
    kept = [data for path, data in files("data/quarantine").items() if "/files/" in path]
    assert sorted(kept) == [b"PAR1 monday", b"PAR1 tuesda"] and files("data/drop") == {}


def test_a_file_that_may_not_be_read_stays_aside_and_stops_no_other(tmp_path, monkeypatch):
    params = project(tmp_path, min_good_share=0.0, taken="remove")
    drop_images("cat", range(1))
    closed = write(Path("data/drop/cat/closed.png"), b"nobody's")
    closed.chmod(0)
    # A superuser may read every file; what is asked here is what is done where one may not.
    monkeypatch.setattr(ingest_round.os, "access", lambda path, _: Path(path).stat().st_mode & 0o777 != 0)
    report = ingest(params)
    assert (report.added, report.quarantined, listing()[0]["file"]) == (1, 1, "")
    (aside,) = Path("data/drop").rglob("closed.png")
    assert ".taken" in aside.parts


def test_a_disk_that_fills_while_the_round_is_written_changes_nothing(tmp_path, monkeypatch):
    params = project(tmp_path, min_good_share=0.0)
    drop_images("cat", range(2))
    write(Path("data/drop/cat/bad.png"), b"no image")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = files("data/drop")
    with monkeypatch.context() as patch:
        patch.setattr(ingest_round.os, "link", full)
        patch.setattr(ingest_round.shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            ingest(params)
    assert files("data/drop") == before and not files("data/ingested") and not files("data/quarantine")
    assert ingest(params).added == 2


def test_files_still_being_written_wait_and_the_settled_ones_go_ahead(tmp_path, monkeypatch):
    params = project(tmp_path, settle_seconds=60.0)
    settled = drop_images("cat", range(3))
    young = drop_images("dog", range(3, 5))
    changed = {path: time.time() - (600 if path in settled else 5) for path in settled + young}
    monkeypatch.setattr(drop_folder, "_changed", lambda path: changed[Path(path)])
    report = ingest(params)
    assert (report.added, report.waiting) == (3, 2)
    assert all(path.exists() for path in young)


def test_a_table_waits_while_an_image_that_it_names_is_written_and_so_do_folders_beside_it(tmp_path, monkeypatch):
    params = project(tmp_path, settle_seconds=60.0)
    images = drop_images("photos", range(2))
    beside = drop_images("cat", range(5, 7))
    labels = table(Path("data/drop/labels.csv"), {"path": ["photos/0.png", "photos/1.png"], "label": ["cat", "dog"]})
    young = {images[1]}
    monkeypatch.setattr(drop_folder, "_changed", lambda path: time.time() - (5 if Path(path) in young else 600))
    report = ingest(params)
    assert (report.added, report.quarantined, report.waiting) == (0, 0, 5)
    young.clear()
    assert (ingest(params).added, labels.exists(), beside[0].exists()) == (4, False, False)


def test_a_file_is_young_by_its_ctime_whatever_time_a_copy_gave_it(tmp_path):
    params = project(tmp_path, settle_seconds=60.0)
    (path,) = drop_images("cat", range(1))
    os.utime(path, (0, 0))
    assert ingest(params).waiting == 1


def test_after_a_clock_was_set_back_files_of_the_future_are_watched_instead(tmp_path, monkeypatch, capsys):
    params = project(tmp_path, settle_seconds=30.0)
    still, growing = drop_images("cat", range(2))
    clock, slept = [time.time() - 7200], []
    monkeypatch.setattr(drop_folder.time, "time", lambda: clock[0])

    def sleep(seconds):
        slept.append(seconds)
        time_passes = growing.stat().st_ctime_ns
        while growing.stat().st_ctime_ns == time_passes:
            growing.write_bytes(growing.read_bytes() + b" ")

    monkeypatch.setattr(drop_folder.time, "sleep", sleep)
    report = ingest(params)
    assert (report.added, report.waiting, slept) == (1, 1, [30.0])
    assert growing.exists() and not still.exists()
    assert "a clock was set back" in capsys.readouterr().err


def test_under_require_marker_only_what_is_complete_is_read_and_the_marker_is_used_up(tmp_path):
    params = project(tmp_path, require_marker=True)
    drop_images("cat", range(2))
    drop_images("dog", range(2, 5))
    write(Path("data/drop/cat/.complete"), b"")
    report = ingest(params)
    assert (report.added, report.waiting) == (2, 3)
    assert not Path("data/drop/cat/.complete").exists()
    write(Path("data/drop/.complete"), b"")
    assert ingest(params).added == 3


def test_a_marker_that_comes_while_the_drop_is_read_is_left_for_the_next_batch(tmp_path, monkeypatch):
    params = project(tmp_path, require_marker=True)
    drop_images("cat", range(2))
    drop_images("dog", range(2, 5))
    write(Path("data/drop/cat/.complete"), b"")
    whole = drop_folder._files

    def late(root):
        found = list(whole(root))
        write(Path("data/drop/dog/.complete"), b"")
        write(Path("data/drop/cat/.complete"), b"again")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(drop_folder, "_files", late)
        assert (report := ingest(params)).added == 2 and report.waiting == 3
    assert Path("data/drop/cat/.complete").read_bytes() == b"again"
    assert ingest(params).added == 3


def test_an_image_that_changes_after_it_was_judged_waits_and_the_others_go_ahead(tmp_path, monkeypatch):
    params = project(tmp_path)
    first, _ = drop_images("cat", range(2))
    whole = ingest_round.write_shard

    def late(path, good, classes):
        first.write_bytes(png(FIRST_NEW + 77))
        return whole(path, good, classes)

    with monkeypatch.context() as patch:
        patch.setattr(ingest_round, "write_shard", late)
        report = ingest(params)
    assert (report.added, report.waiting) == (1, 1) and first.exists()
    assert ingest(params).added == 1


def test_a_table_waits_whole_when_one_of_its_images_changes_after_it_was_judged(tmp_path, monkeypatch):
    params = project(tmp_path)
    images = drop_images("photos", range(4))
    paths = [str(path.relative_to("data/drop")) for path in images]
    labels = table(Path("data/drop/labels.csv"), {"path": paths, "label": ["cat", "dog", "eel", "cat"]})
    whole = ingest_round.write_shard

    def late(path, good, classes):
        images[1].write_bytes(png(FIRST_NEW + 77))
        return whole(path, good, classes)

    with monkeypatch.context() as patch:
        patch.setattr(ingest_round, "write_shard", late)
        assert ingest(params).added == 3
    assert labels.exists() and all(path.exists() for path in images)
    again = ingest(params)
    assert (again.added, again.already_there, again.quarantined, labels.exists()) == (1, 3, 0, False)


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


def test_a_shard_that_was_changed_is_refused_by_split_and_ingest(tmp_path):
    params = project(tmp_path)
    drop_images("cat", range(2))
    shard = ingest(params).shard
    content = pyarrow.parquet.read_table(shard)
    pyarrow.parquet.write_table(content.set_column(1, "label", pa.array(["dog", "dog"])), shard)
    for run in (split.run, ingest):
        drop_images("cat", range(3, 4))
        with pytest.raises(DataError, match="its content is not what its name says"):
            run(params)


def test_a_shard_of_other_data_is_refused_by_name_of_the_class(tmp_path):
    params = project(tmp_path)
    drop_images("cat", range(2))
    ingest(params)
    for name in ("ant", "bee"):
        for number in range(8):
            write(Path(f"other/{name}/{number}.png"), png(hash((name, number)) % 10_000))
    other = params.model_copy(update={"data": params.data.model_copy(update={"location": "other"})})
    with pytest.raises(DataError, match=r"holds the class 'cat', which the source does not have"):
        split.run(other)


def test_images_that_the_source_gained_since_are_left_out_of_what_was_taken_in(tmp_path, capsys):
    params = project(tmp_path)
    (path,) = drop_images("cat", range(1))
    data = path.read_bytes()
    ingest(params)
    write(Path("source/cat/late.png"), data)
    split.run(params)
    assert "1 images taken in are in a split of the source already" in capsys.readouterr().err
    digests = [row["sha256"] for name in ("train", "validation", "test") for row in rows_of(name)]
    assert digests.count(hashlib.sha256(data).hexdigest()) == 1


def test_a_shard_that_is_placed_while_split_runs_fails_it_so_that_it_runs_again(tmp_path, monkeypatch):
    params = project(tmp_path)
    before, check = files("data/split"), split.find_duplicates

    def meanwhile(*arguments):
        drop_images("cat", range(2))
        ingest(params)
        return check(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(split, "find_duplicates", meanwhile)
        with pytest.raises(StageError, match=r"data/ingested changed while split ran; run `dvc repro` again"):
            split.run(params)
    assert files("data/split") == before
    assert split.run(params).ingested == 2


# Every kill: a process that ends by SIGKILL at its n-th change of the disk, for every n until it lives to the end.
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree"}


def killed_at(change: int, params) -> bool:
    """Run ingest in a child that is killed at that change of the disk; whether it was."""
    child = os.fork()
    if child == 0:
        left = [change]

        def count(event: str, arguments: tuple) -> None:
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in CHANGES or writes:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            ingest(params)
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def a_drop_of_everything() -> None:
    drop_images("cat", range(3))
    images = drop_images("photos", range(10, 13))
    paths = [str(path.relative_to("data/drop")) for path in images]
    table(Path("data/drop/labels.csv"), {"path": paths, "label": ["dog", "eel", "gnu"]})
    write(Path("data/drop/dog/bad.png"), b"no image")
    write(Path("data/drop/.complete"), b"")


def outcome() -> tuple:
    """What must be the same in the end, whenever a run was killed."""
    waiting = [path for path in files("data/drop") if "/.taken/" not in path]
    quarantined = [data for path, data in files("data/quarantine").items() if path.endswith(".png")]
    return shards(), sorted(quarantined), waiting, sorted(path.name for path in Path("data/.ingest").iterdir())


@pytest.mark.slow
def test_killed_at_any_change_of_the_disk_the_next_run_ends_as_if_nothing_had_happened(made, tmp_path):
    root, params, _ = made
    rules = params.ingest.model_copy(update={"require_marker": True, "new_classes": "refuse"})
    params = params.model_copy(update={"ingest": rules})
    changes, killed, expected = 0, True, None
    while killed:
        shutil.copytree(root / "data/split", tmp_path / str(changes) / "data/split")
        os.chdir(tmp_path / str(changes))
        a_drop_of_everything()
        held = files("data/split")
        killed = killed_at(changes, params)
        for shard in Path("data/ingested").glob("*.parquet"):
            assert hashlib.sha256(shard.read_bytes()).hexdigest() == shard.stem
        # Only a run that was killed when all was in place leaves the next one nothing to report.
        in_place = bool(files("data/ingested")) and not Path("data/.ingest/round/plan.json").exists()
        if killed:
            again = ingest(params)
            expect = (0, 0) if in_place else (5, 2)
            assert (again.added, again.quarantined) == expect and again.refused is None, f"killed at change {changes}"
        assert files("data/split") == held
        expected = expected or outcome()
        assert outcome() == expected, f"killed at change {changes}"
        changes += 1
    assert changes > 20
    assert [row["label"] for row in expected[0]] == ["cat"] * 3 + ["dog", "eel"]
    assert len(expected[1]) == 2 and expected[2] == []


@pytest.mark.parametrize("row_groups", [False, True], ids=["files", "a table"])
def test_images_taken_in_are_streamed_as_they_are_held_in_memory(tmp_path, row_groups):
    params = project(tmp_path)
    drop_images("cat", range(3))
    ingest(params)
    split.run(params)
    held = load_images(params, "train")
    stream = ImageStream(params, "train", torch.device("cpu"))
    assert torch.equal(stream.pixels(torch.arange(len(held))), held.images)
    if row_groups:
        references = pa.chunked_array([pa.array(list(stream.references))])
        ours = pc.starts_with(references, "ingested:").to_numpy()
        own = SimpleNamespace(groups=lambda found: Groups(np.arange(len(found)) // 2, np.full(len(found), 7)))
        groups = ReaderWithIngested(own, Ingested()).groups(references)
        assert set(groups.number[ours]).isdisjoint(groups.number[~ours]) and len(set(groups.number[ours])) == 1
