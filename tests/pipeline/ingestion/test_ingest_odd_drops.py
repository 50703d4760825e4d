"""Ingest of tables and of unexpected files in a drop folder: they do not prevent the ingest of the rest."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from pipeline.ingestion.ingest import ingest
from tests.support.dropping import FIRST_NEW, drop_images, files, listing, project, shards
from tests.support.making import png, table, write


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_of_paths_is_ingested_with_its_images(tmp_path, suffix):
    params = project(tmp_path)
    images = drop_images("photos", range(4))
    paths = [str(path.relative_to("data/drop")) for path in images]
    table(Path(f"data/drop/labels.{suffix}"), {"path": paths, "label": ["cat", "dog", "eel", "cat"]})
    report = ingest(params)
    assert (report.added, report.quarantined) == (4, 0)
    assert [row["label"] for row in shards()] == ["cat", "dog", "eel", "cat"]
    assert not [path for path in Path("data/drop").glob("*/*") if path.is_file()]


def test_integer_labels_of_a_table_are_class_numbers(tmp_path):
    params = project(tmp_path, min_good_share=0.5)
    table(Path("data/drop/new.parquet"), {"image": [png(FIRST_NEW + i) for i in range(4)], "label": [0, 2, 3, None]})
    report = ingest(params)
    assert [row["label"] for row in shards()] == ["cat", "eel"]
    assert report.reasons == {"unknown class": 1, "no label": 1}


def test_a_label_of_a_csv_table_is_a_name_where_classes_are_named_by_digits(tmp_path):
    params = project(tmp_path, {"001": 9, "002": 9, "7": 9}, min_good_share=0.0)
    paths = [str(path.relative_to("data/drop")) for path in drop_images("photos", range(6))]
    labels = {"path": paths, "label": ["001", "002", "7", "1", "003", "3"]}
    table(Path("data/drop/labels.csv"), labels).rename("data/drop/LABELS.CSV")
    report = ingest(params)
    assert [row["label"] for row in shards()] == ["001", "002", "7"]
    assert report.reasons == {"unknown class": 3}


def test_a_year_in_a_csv_table_becomes_a_new_class_where_classes_are_years(tmp_path):
    params = project(tmp_path, {"2024": 9, "2025": 9}, new_classes="accept")
    paths = [str(path.relative_to("data/drop")) for path in drop_images("photos", range(2))]
    table(Path("data/drop/labels.csv"), {"path": paths, "label": ["2026", "1"]})
    assert ingest(params).new_classes == ["1", "2026"]


def test_a_path_or_link_out_of_the_drop_is_never_read(tmp_path):
    params = project(tmp_path, min_good_share=0.0)
    secret = write(tmp_path / "secret.png", png(FIRST_NEW + 1))
    table(Path("data/drop/labels.csv"), {"path": ["../../secret.png", str(secret)], "label": ["cat", "dog"]})
    Path("data/drop/cat").mkdir()
    Path("data/drop/cat/link.png").symlink_to(secret)
    report = ingest(params)
    assert (report.added, report.reasons) == (0, {"outside": 3})
    assert secret.read_bytes() not in files("data/quarantine").values()
    assert secret.exists()


def test_invalid_entries_of_a_drop_do_not_affect_the_others(tmp_path):
    params = project(tmp_path, min_good_share=0.0)
    images = drop_images("photos", range(2))
    reasons = {".": "outside", "a\0b": "outside", "x" * 5000: "unreadable", "photos/gone.png": "unreadable",
           "photos": "unreadable", "photos/pipe.png": "unreadable", "photos/itself.png": "outside"}  # fmt: skip
    os.mkfifo("data/drop/photos/pipe.png")
    Path("data/drop/photos/itself.png").symlink_to("itself.png")
    paths = [str(images[0].absolute()), "photos/../photos/1.png", *reasons]
    table(Path("data/drop/labels.parquet"), {"path": paths, "label": ["cat"] * len(paths)})
    Path("data/drop/itself.csv").symlink_to("itself.csv")
    os.mkfifo("data/drop/pipe.csv")
    report = ingest(params)
    assert (report.added, report.quarantined) == (2, len(reasons) + 2)
    assert {row["name"]: row["reason"] for row in listing()} == {
        "itself.csv": "outside", "pipe.csv": "unreadable",
        **{f"labels.parquet#{number}": reason for number, reason in enumerate(reasons.values(), 2)},
    }  # fmt: skip
    assert not [path for path in Path("data/drop/photos").iterdir() if path.is_file()]


@pytest.mark.parametrize("columns", [{"picture": [1], "label": ["cat"]}, {"image": [b"x"], "class": ["cat"]}])
def test_a_table_without_its_columns_is_one_bad_row(tmp_path, columns):
    params = project(tmp_path, min_good_share=0.0)
    table(Path("data/drop/odd.parquet"), columns)
    write(Path("data/drop/cut.parquet"), b"PAR1 cut off")
    report = ingest(params)
    assert report.reasons == {"table": 2} and {row["name"] for row in listing()} == {"odd.parquet", "cut.parquet"}


def test_a_csv_table_above_the_limit_is_one_bad_row_that_names_the_key(tmp_path):
    params = project(tmp_path, min_good_share=0.0, max_table_mib=1)
    table(Path("data/drop/labels.csv"), {"path": ["p" * 1000] * 1100, "label": ["cat"] * 1100})
    assert ingest(params).reasons == {"table": 1}
    assert (
        "takes at least 2 MiB when it is read, above the limit of 1 MiB; raise ingest.max_table_mib"
        in (listing()[0]["detail"])
    )


def test_tables_above_the_memory_limit_together_wait_for_the_next_run(tmp_path):
    params = project(tmp_path, min_good_share=0.0, max_table_mib=1)
    for name in ("a", "b"):
        table(Path(f"data/drop/{name}.csv"), {"path": ["none.png"] * 600, "label": ["cat"] * 600})
    first, second = ingest(params), ingest(params)
    assert (first.quarantined, first.waiting) == (600, 1) and (second.quarantined, second.waiting) == (600, 0)


def test_names_that_are_not_utf8_are_skipped_and_reported(tmp_path, capsys):
    params = project(tmp_path)
    drop_images("cat", range(2))
    odd = os.fsencode(tmp_path) + b"/data/drop/cat/\xff.png"
    Path(os.fsdecode(odd)).write_bytes(png(FIRST_NEW + 9))
    assert ingest(params).added == 2
    assert "1 name is not UTF-8" in capsys.readouterr().err and Path(os.fsdecode(odd)).exists()


def test_a_file_that_cannot_be_quarantined_is_never_removed_from_the_drop(tmp_path, monkeypatch):
    params = project(tmp_path, min_good_share=0.0, taken="remove")
    drop_images("cat", range(1))
    write(Path("data/drop/cat/foreign.png"), b"another user's")

    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "link", denied)
    monkeypatch.setattr(shutil, "copyfile", denied)
    report = ingest(params)
    assert (report.added, report.quarantined, listing()[0]["file"]) == (1, 1, "")
    assert list(files("data/drop").values()) == [b"another user's"]


def test_two_damaged_tables_of_one_name_are_both_quarantined(tmp_path):
    params = project(tmp_path, min_good_share=0.0, taken="remove")
    for content in (b"PAR1 monday", b"PAR1 tuesda"):
        write(Path("data/drop/labels.parquet"), content)
        ingest(params)
    quarantined = [data for path, data in files("data/quarantine").items() if "/files/" in path]
    assert sorted(quarantined) == [b"PAR1 monday", b"PAR1 tuesda"] and files("data/drop") == {}


def test_a_file_without_read_permission_is_moved_aside(tmp_path, monkeypatch):
    params = project(tmp_path, min_good_share=0.0, taken="remove")
    drop_images("cat", range(1))
    closed = write(Path("data/drop/cat/closed.png"), b"no permission")
    closed.chmod(0)
    # Root may read every file; this tests the case without permission.
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).stat().st_mode & 0o777 != 0)
    report = ingest(params)
    assert (report.added, report.quarantined, listing()[0]["file"]) == (1, 1, "")
    (moved,) = Path("data/drop").rglob("closed.png")
    assert ".taken" in moved.parts
