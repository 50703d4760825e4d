"""Shards written by ingest, as input of split and training."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import pytest
import torch

from pipeline import split
from pipeline.data.dataset import load_images
from pipeline.data.stream import ImageStream
from pipeline.ingestion.ingest import ingest
from pipeline.shared.errors import DataError, StageError
from pipeline.sources import Groups, Ingested, ReaderWithIngested
from tests.support.dropping import drop_images, files, project, rows_of
from tests.support.making import png, write


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_split_and_ingest_refuse_a_changed_shard(tmp_path):
    params = project(tmp_path)
    drop_images("cat", range(2))
    shard = ingest(params).shard
    content = pyarrow.parquet.read_table(shard)
    pyarrow.parquet.write_table(content.set_column(1, "label", pa.array(["dog", "dog"])), shard)
    for run in (split.run, ingest):
        drop_images("cat", range(3, 4))
        with pytest.raises(DataError, match="its sha256 differs from its name"):
            run(params)


def test_split_refuses_a_shard_with_a_class_that_the_source_does_not_have(tmp_path):
    params = project(tmp_path)
    drop_images("cat", range(2))
    ingest(params)
    for name in ("ant", "bee"):
        for number in range(8):
            write(Path(f"other/{name}/{number}.png"), png(hash((name, number)) % 10_000))
    other = params.model_copy(update={"data": params.data.model_copy(update={"location": "other"})})
    with pytest.raises(DataError, match=r"holds the class 'cat', which the source does not have"):
        split.run(other)


def test_split_skips_ingested_images_that_were_added_to_the_source(tmp_path, capsys):
    params = project(tmp_path)
    (path,) = drop_images("cat", range(1))
    data = path.read_bytes()
    ingest(params)
    write(Path("source/cat/late.png"), data)
    split.run(params)
    assert "1 ingested image is in a split of the source already" in capsys.readouterr().err
    digests = [row["sha256"] for name in ("train", "validation", "test") for row in rows_of(name)]
    assert digests.count(hashlib.sha256(data).hexdigest()) == 1


def test_split_fails_if_a_shard_is_added_while_it_runs(tmp_path, monkeypatch):
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


@pytest.mark.parametrize("row_groups", [False, True], ids=["files", "a table"])
def test_ingested_images_are_equal_when_streamed_and_in_memory(tmp_path, row_groups):
    params = project(tmp_path)
    drop_images("cat", range(3))
    ingest(params)
    split.run(params)
    held = load_images(params.data, params.image, "train")
    stream = ImageStream(params.data, params.image, params.stream, "train", torch.device("cpu"))
    assert torch.equal(stream.pixels(torch.arange(len(held))), held.images)
    if row_groups:
        references = pa.chunked_array([pa.array(list(stream.references))])
        ours = pc.starts_with(references, "ingested:").to_numpy()
        own = SimpleNamespace(groups=lambda found: Groups(np.arange(len(found)) // 2, np.full(len(found), 7)))
        groups = ReaderWithIngested(own, Ingested()).groups(references)
        assert set(groups.number[ours]).isdisjoint(groups.number[~ours]) and len(set(groups.number[ours])) == 1
