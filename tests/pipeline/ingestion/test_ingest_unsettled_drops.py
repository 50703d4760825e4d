"""Ingest of a drop folder that is still being written, or appears so because of clock differences."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.ingestion import drop_folder
from pipeline.ingestion import transaction as ingest_round
from pipeline.ingestion.ingest import ingest
from tests.support.dropping import FIRST_NEW, drop_images, project
from tests.support.making import png, table, write


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.fault_case("drop-being-written")
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


@pytest.mark.fault_case("clock-set-back")
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
