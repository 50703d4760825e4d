"""Ingest of a drop folder that is still being written, or appears so because of clock differences."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.split_tables import load_classes
from pipeline.ingestion import ingest as ingest_module
from pipeline.ingestion.drop_folder import Clock, Drop, read_drop
from pipeline.ingestion.ingest import ingest
from pipeline.ingestion.row_checks import check_rows
from pipeline.ingestion.transaction import IngestReport, finish_round, write_round
from pipeline.params import Params
from pipeline.sources import Ingested
from tests.support.dropping import FIRST_NEW, drop_images, project
from tests.support.making import png, table, write

DROP = Path("data/drop")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class FixedClock(Clock):
    """A clock at a fixed time: `young` files changed 5 s ago, all others 600 s ago. on_read: called at the reading."""

    def __init__(self, young: list[Path], on_read: Callable[[], object] = lambda: None) -> None:
        self.young = young
        self.on_read = on_read

    def now(self) -> float:
        self.on_read()
        return 10_000.0

    def ctime(self, path: Path) -> float:
        return 10_000.0 - (5 if path in self.young else 600)


def read(params: Params, clock: Clock) -> Drop:
    return read_drop(DROP, params.ingest, load_classes(), clock)


@pytest.mark.fault_case("drop-being-written")
def test_files_that_are_still_being_written_wait_for_a_later_run(tmp_path):
    params = project(tmp_path, settle_seconds=60.0)
    settled = drop_images("cat", range(3))
    young = drop_images("dog", range(3, 5))
    drop = read(params, FixedClock(young))
    assert [row.file for row in drop.rows] == settled and drop.waiting == 2
    assert drop.files.keys() == set(settled), "ingest moves only these"


def test_a_table_and_the_folders_beside_it_wait_while_one_of_its_images_is_written(tmp_path):
    params = project(tmp_path, settle_seconds=60.0)
    images = drop_images("photos", range(2))
    beside = drop_images("cat", range(5, 7))
    labels = table(DROP / "labels.csv", {"path": ["photos/0.png", "photos/1.png"], "label": ["cat", "dog"]})
    drop = read(params, FixedClock(images[1:]))
    assert (drop.rows, drop.files, drop.waiting) == ([], {}, 5)
    drop = read(params, FixedClock([]))
    assert len(drop.rows) == 4 and drop.files.keys() == {labels, *images, *beside}


def test_the_ctime_of_a_file_counts_and_not_its_mtime(tmp_path):
    params = project(tmp_path, settle_seconds=60.0)
    (path,) = drop_images("cat", range(1))
    os.utime(path, (0, 0))
    assert ingest(params).waiting == 1


@pytest.mark.fault_case("clock-set-back")
def test_after_a_clock_was_set_back_files_are_watched_for_changes(tmp_path, capsys):
    params = project(tmp_path, settle_seconds=30.0)
    unchanged, growing = drop_images("cat", range(2))
    slept = []

    class SetBack(Clock):
        def now(self) -> float:
            return Clock.now() - 7200

        def sleep(self, seconds: float) -> None:
            slept.append(seconds)
            before = growing.stat().st_ctime_ns
            while growing.stat().st_ctime_ns == before:
                growing.write_bytes(growing.read_bytes() + b" ")

    drop = read(params, SetBack())
    assert ([row.file for row in drop.rows], drop.waiting, slept) == ([unchanged], 1, [30.0])
    assert drop.files.keys() == {unchanged}
    assert "a clock was set back" in capsys.readouterr().err


def test_with_require_marker_only_complete_folders_are_read_and_the_marker_is_removed(tmp_path):
    params = project(tmp_path, require_marker=True)
    drop_images("cat", range(2))
    drop_images("dog", range(2, 5))
    write(DROP / "cat/.complete", b"")
    report = ingest(params)
    assert (report.added, report.waiting) == (2, 3)
    assert not (DROP / "cat/.complete").exists()
    write(DROP / ".complete", b"")
    assert ingest(params).added == 3


def test_a_marker_written_while_the_drop_is_read_belongs_to_the_next_batch(tmp_path):
    params = project(tmp_path, require_marker=True, settle_seconds=60.0)
    drop_images("cat", range(2))
    drop_images("dog", range(2, 5))
    write(DROP / "cat/.complete", b"")

    def write_markers():
        write(DROP / "dog/.complete", b"")
        write(DROP / "cat/.complete", b"again")

    drop, classes = read(params, FixedClock([], write_markers)), load_classes()
    assert (len(drop.rows), drop.waiting) == (2, 3)
    write_round(drop, check_rows(drop.rows, params.ingest, classes, Ingested()), classes, params.ingest.taken)
    assert finish_round().added == 2
    assert (DROP / "cat/.complete").read_bytes() == b"again"
    assert len(read(params, FixedClock([])).rows) == 3


def ingest_with_change(monkeypatch, params: Params, change: Callable[[], object]) -> IngestReport:
    """Ingest the drop; `change` is called after its rows were checked."""
    with monkeypatch.context() as patch:
        patch.setattr(ingest_module, "write_round", lambda *arguments: (change(), write_round(*arguments)))
        return ingest_module.ingest(params)


def test_an_image_that_changes_after_its_check_waits_for_the_next_run(tmp_path, monkeypatch):
    params = project(tmp_path)
    path, _ = drop_images("cat", range(2))
    report = ingest_with_change(monkeypatch, params, lambda: path.write_bytes(png(FIRST_NEW + 77)))
    assert (report.added, report.waiting) == (1, 1) and path.exists()
    assert ingest(params).added == 1


def test_a_table_waits_for_the_next_run_if_one_of_its_images_changes_after_its_check(tmp_path, monkeypatch):
    params = project(tmp_path)
    images = drop_images("photos", range(4))
    paths = [str(path.relative_to(DROP)) for path in images]
    labels = table(DROP / "labels.csv", {"path": paths, "label": ["cat", "dog", "eel", "cat"]})
    report = ingest_with_change(monkeypatch, params, lambda: images[1].write_bytes(png(FIRST_NEW + 77)))
    assert report.added == 3
    assert labels.exists() and all(path.exists() for path in images)
    again = ingest(params)
    assert (again.added, again.already_present, again.quarantined, labels.exists()) == (1, 3, 0, False)
