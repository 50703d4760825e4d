"""Ingest of new classes, which are not in the source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import split
from pipeline.ingestion.ingest import ingest
from pipeline.shared.errors import DataError
from tests.support.dropping import FIRST_NEW, drop_images, project, rows_of
from tests.support.making import png, table


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("policy", ["accept", ["gnu"]])
def test_an_allowed_new_class_is_appended_after_the_existing_classes(tmp_path, policy):
    params = project(tmp_path, new_classes=policy)
    drop_images("gnu", range(3))
    drop_images("cat", range(3, 5))
    report = ingest(params)
    assert (report.new_classes, report.added) == (["gnu"], 5)
    split.run(params)
    assert Path("data/split/classes.json").read_text(encoding="utf-8").split('"')[1::2] == ["cat", "dog", "eel", "gnu"]
    assert [row["label"] for row in rows_of("train")[-5:]] == [0, 0, 3, 3, 3]
    drop_images("gnu", range(5, 6))
    again = ingest(refuse_new_classes(params))
    assert (again.new_classes, again.added) == ([], 1)


def test_a_later_shard_of_a_new_class_can_be_ingested_again_after_the_first_was_removed(tmp_path):
    params = project(tmp_path, new_classes=["gnu"])
    drop_images("gnu", range(2))
    first = ingest(params).shard
    drop_images("gnu", range(2, 5))
    later = ingest(params).shard
    first.rename(tmp_path / "removed.parquet")
    with pytest.raises(DataError, match=f"{later.name}: holds the class 'gnu', which the source does not have"):
        split.run(params)
    later.rename(Path("data/drop") / later.name)
    split.run(params)
    again = ingest(params)
    assert (again.added, again.new_classes) == (3, ["gnu"])
    assert split.run(params).ingested == 3


def test_new_classes_are_sorted_after_the_classes_of_the_source(tmp_path):
    params = project(tmp_path, new_classes="accept")
    for label in ("zebra", "apple"):
        drop_images(label, range(2) if label == "zebra" else range(2, 4))
        ingest(params)
    split.run(params)
    assert json.loads(Path("data/split/classes.json").read_text())[3:] == ["apple", "zebra"]


def refuse_new_classes(params):
    """Return the same params with new classes rejected: a class that was ingested before exists."""
    return params.model_copy(update={"ingest": params.ingest.model_copy(update={"new_classes": "refuse"})})


@pytest.mark.parametrize("name", ["a\nb", " gnu", "g" * 201])
def test_a_new_class_with_an_invalid_name_is_bad(tmp_path, name):
    params = project(tmp_path, new_classes="accept", min_good_share=0.0)
    table(Path("data/drop/new.parquet"), {"image": [png(FIRST_NEW)], "label": [name]})
    assert ingest(params).reasons == {"class name": 1}
