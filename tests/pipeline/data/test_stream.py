"""A split as a stream: the same images as in memory, bounded memory, and no remaining thread at its end."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from pipeline import split
from pipeline.data import dataset
from pipeline.data.dataset import Images, evaluation_images, free_on_gpu, load_images, training_images
from pipeline.data.stream import ImageStream
from pipeline.data.stream_decoding import decode_fast
from pipeline.params import Params, StreamParams
from pipeline.preparation import pack as packing
from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources import open_reader
from pipeline.sources.shards import Shard
from tests.support.making import data_params, encode, folder, picture, write
from tests.support.small_training import CPU

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def stream_of(params, *arguments, **options) -> ImageStream:
    """Return a stream with the sections of params."""
    return ImageStream(params.data, params.image, params.stream, *arguments, **options)


def images_of(params, *arguments) -> Images:
    """Return images in memory with the sections of params."""
    return load_images(params.data, params.image, *arguments)


def streaming(params: Params, **changes) -> Params:
    """Return the same params with every split as a stream."""
    return params.model_copy(update={"stream": StreamParams(**{"mode": "on", "workers": 3, **changes})})


def stream_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("stream")]


@pytest.fixture
def made(tmp_path):
    params = streaming(data_params(folder(tmp_path / "source", {"ant": 25, "bee": 18})))
    split.run(params, tmp_path / "split")
    return params, tmp_path / "split", tmp_path / "source"


@pytest.fixture
def packed(made, tmp_path):
    """Write the same images as shards with row groups of a few rows."""
    params = made[0]
    shards = tmp_path / "packed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "ROW_GROUP_BYTES", 3000)
        packing.pack(params, shards, 10_000)
    small = streaming(data_params(shards, "table", table={"train": "train", "id": "name"}))
    split.run(small, tmp_path / "packed-split")
    return small, tmp_path / "packed-split", shards


@pytest.mark.parametrize("decode", ["fast", "exact"])
@pytest.mark.parametrize("name", ["train", "validation", "test"])
@pytest.mark.parametrize("kind", ["made", "packed"])
def test_a_stream_returns_the_same_images_as_memory(kind, name, decode, request):
    params, where, _ = request.getfixturevalue(kind)
    held, stream = images_of(params, name, where), stream_of(streaming(params, decode=decode), name, CPU, where)
    assert len(stream) == len(held) and torch.equal(stream.labels, held.labels)
    assert list(stream.sample_ids) == held.sample_ids and stream.encoded(1) == held.encoded(1)
    indices = torch.randperm(len(held), generator=torch.Generator().manual_seed(1))
    assert torch.equal(stream.pixels(indices), held.pixels(indices))
    for size in (1, 4, len(held), 99):
        pairs = zip(stream.batches(indices, size), held.batches(indices, size), strict=True)
        assert all(torch.equal(actual, expected) for actual, expected in pairs)


@pytest.mark.parametrize("workers", [1, 4])
def test_batches_are_in_order_for_any_number_of_threads(made, workers):
    params, where, _ = made
    held = images_of(params, "train", where)
    stream = stream_of(streaming(params, workers=workers, prefetch=3), "train", CPU, where)
    indices = held.order(torch.Generator().manual_seed(0))[:35].view(7, 5)
    with stream.feed(indices) as feed:
        assert all(torch.equal(actual, held.pixels(part)) for actual, part in zip(feed, indices, strict=True))
    assert stream_threads() == []


def test_at_most_prefetch_batches_are_read_ahead_and_leaving_early_ends_the_threads(made):
    params, where, _ = made
    stream = stream_of(streaming(params, prefetch=2), "train", CPU, where)
    allocated = []
    allocate = stream.allocate_batch
    stream.allocate_batch = lambda count: allocated.append(count) or allocate(count)
    with stream.feed(torch.zeros(50, 4, dtype=torch.int64)) as feed:
        for taken in range(1, 6):
            next(feed)
            assert len(allocated) == taken + 3, "the batches taken, two ahead, and the one that comes next"
    assert stream_threads() == []


def test_an_empty_split_streams_nothing(tmp_path):
    params = streaming(data_params(folder(tmp_path / "source", {"a": 4, "b": 4}), validation_per_class=0))
    split.run(params, tmp_path / "split")
    stream = stream_of(params, "validation", CPU, tmp_path / "split")
    assert len(stream) == 0 and list(stream.batches(torch.arange(0), 8)) == []


def test_an_empty_split_of_a_table_streams_nothing(packed, tmp_path):
    table = {"train": "train", "id": "name"}
    params = streaming(data_params(packed[2], "table", table=table, validation_per_class=0))
    split.run(params, tmp_path / "without")
    stream = stream_of(params, "validation", CPU, tmp_path / "without")
    assert len(stream) == 0 and list(stream.batches(torch.arange(0), 8)) == [] and stream.warning() is None
    assert len(stream.order(torch.Generator().manual_seed(0))) == 0


def test_a_source_without_files_can_be_streamed(tmp_path):
    params = streaming(data_params(tmp_path, "digits", test_per_class=2, validation_per_class=2), decode="exact")
    split.run(params, tmp_path / "split")
    held, stream = (
        images_of(params, "train", tmp_path / "split"),
        stream_of(params, "train", CPU, tmp_path / "split"),
    )
    assert torch.equal(stream.pixels(torch.arange(9)), held.pixels(torch.arange(9)))
    assert stream.encoded(3) == held.encoded(3) and stream.warning() is None


def test_a_row_group_is_read_once_an_epoch_although_the_order_is_random(packed, monkeypatch):
    params, where, _ = packed
    # One thread: several read some groups a second time where the cache is as small as the one set below.
    stream = stream_of(streaming(params, workers=1, prefetch=1), "train", CPU, where)
    stream.window = 9_000
    reads = []
    original = Shard.read_group
    monkeypatch.setattr(Shard, "read_group", lambda self, *a: reads.append((self.name, a[0])) or original(self, *a))
    stream.reader = open_reader(params.data, cache_bytes=18_000)
    order = stream.order(torch.Generator().manual_seed(0))
    with stream.feed(order[:36].view(9, 4)) as feed:
        assert len(list(feed)) == 9
    assert len(set(reads)) > 8 and len(reads) <= len(set(reads)) + 1


def damage_images(source: Path, where: Path, params: Params, *indices: int) -> list[str]:
    """Damage the files of some training images; return their references."""
    names = [images_of(params, "train", where).references[place] for place in indices]
    for name in names:
        write(source / name, b"spoilt")
    return names


def test_an_image_damaged_after_the_split_raises_an_error_with_its_name(made):
    params, where, source = made
    (name,) = damage_images(source, where, params, 3)
    stream = stream_of(params, "train", CPU, where)
    with (
        pytest.raises(DataError, match=re.escape(f"{name}: is not a JPEG, PNG or WebP image; replace the image")),
        stream.feed(torch.arange(36).view(9, 4)) as feed,
    ):
        list(feed)
    assert stream_threads() == []


def test_with_skip_a_bad_image_is_replaced_by_the_next_of_its_class_and_counted_and_named(made):
    params, where, source = made
    held = images_of(params, "train", where)
    names = damage_images(source, where, params, 3, 4)
    (source / held.references[20]).unlink()
    stream = stream_of(params, "train", CPU, where, replace_bad=True)
    last = int(torch.nonzero(held.labels == 0).max())
    for place, instead in ((3, 5), (4, 5), (20, 21), (last, last)):
        assert torch.equal(stream.pixels(torch.tensor([place])), held.pixels(torch.tensor([instead])))
    assert stream.epoch_record(10.0)["images_replaced"] == 3
    warning = stream.replaced()
    assert warning.startswith("3 images could not be read; replaced by others of their class, the first 3: ")
    assert all(name in warning for name in [*names, held.references[20]]) and "dvc repro -f split" in warning
    assert stream.replaced() is None and stream.epoch_record(10.0)["images_replaced"] == 0


def test_a_class_without_any_readable_image_is_not_replaced_by_another(made):
    params, where, source = made
    labels = images_of(params, "train", where).labels
    damage_images(source, where, params, *torch.nonzero(labels == 1).flatten().tolist())
    stream = stream_of(params, "train", CPU, where, replace_bad=True)
    with pytest.raises(DataError, match="no other image of its class can be read instead"):
        stream.pixels(torch.nonzero(labels == 1)[0])


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_shard_cut_off_after_the_split_is_named_and_never_skipped(packed, keep):
    params, where, shards = packed
    stream = stream_of(params, "train", CPU, where, replace_bad=True)
    shard = shards / "train/00001.parquet"
    shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * keep)])
    indices = torch.arange(36)
    if keep < 0.99:
        with pytest.raises(DataError, match=re.escape(f"{shard}: not readable as a table")):
            stream.pixels(indices)
    with pytest.raises(DataError, match=re.escape(f"{shard}: not readable as a table")):
        stream_of(params, "train", CPU, where)


def test_a_missing_folder_is_one_error_and_not_one_per_image(made):
    params, where, source = made
    source.rename(source.with_name("elsewhere"))
    with pytest.raises(ParamsError, match=r"data\.location is '.*source', which is not a folder"):
        stream_of(params, "train", CPU, where, replace_bad=True)


def test_memory_that_pytorch_keeps_for_reuse_counts_as_free(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("returned"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (len(done), 10))
    assert free_on_gpu(torch.device("cuda:0")) == {"on cuda:0": 1} and free_on_gpu(CPU) == {}


def test_the_gpu_decoder_without_a_gpu_is_rejected_with_the_key(made):
    params, where, _ = made
    with pytest.raises(ParamsError, match=r"stream\.decode is 'gpu', but the device is cpu; expected fast or exact"):
        stream_of(streaming(params, decode="gpu"), "train", CPU, where)


def test_images_that_nvjpeg_rejects_are_decoded_on_the_cpu(made):
    # Without a GPU its decoder fails, as for a damaged file.
    params, where, _ = made
    held, stream = images_of(params, "train", where), stream_of(params, "train", CPU, where)
    actual = stream.decode_on_gpu(stream.allocate_batch(3).zero_(), [(0, 7, held.encoded(7)), (2, 9, held.encoded(9))])
    assert torch.equal(actual[0], decode_fast(held.encoded(7), params.image))
    assert torch.equal(actual[2], decode_fast(held.encoded(9), params.image))
    assert not actual[1].any()


def test_an_image_that_only_nvjpeg_rejects_is_named_or_replaced(made):
    params, where, source = made
    held = images_of(params, "train", where)
    (name,) = damage_images(source, where, params, 3)
    nvjpeg = [(0, 3, b"spoilt"), (1, 9, held.encoded(9))]
    stream = stream_of(params, "train", CPU, where)
    with pytest.raises(DataError, match=re.escape(f"{name}: is not a JPEG, PNG or WebP image; replace the image")):
        stream.decode_on_gpu(stream.allocate_batch(2), nvjpeg)
    stream = stream_of(params, "train", CPU, where, replace_bad=True)
    actual = stream.decode_on_gpu(stream.allocate_batch(2), nvjpeg)
    assert torch.equal(actual, held.pixels(torch.tensor([4, 9])))
    assert name in stream.replaced()


def test_the_time_that_steps_wait_for_data_includes_the_decoding_by_nvjpeg(made, monkeypatch):
    params, where, _ = made
    stream = stream_of(params, "train", CPU, where)
    monkeypatch.setattr(stream, "decode", lambda part, _out: [(slot, index, b"") for slot, index in enumerate(part)])
    monkeypatch.setattr(stream, "decode_on_gpu", lambda pixels, _nvjpeg: time.sleep(0.1) or pixels)
    with stream.feed(torch.arange(4).view(2, 2)) as batches:
        list(batches)
    assert stream.wait_seconds >= 0.2
    waited, queued = stream.wait_seconds, mock.Mock()
    monkeypatch.setattr("pipeline.data.stream_order.queued_steps", lambda _: queued)
    for ended in (False, True):  # a GPU with steps left at the end of the wait, and one without
        queued.query.return_value = ended
        with stream.feed(torch.arange(4).view(2, 2)) as batches:
            list(batches)
        assert (stream.wait_seconds > waited) == ended


def test_auto_streams_a_split_above_half_of_the_free_memory_and_returns_the_reason(made):
    params, where, _ = made
    auto = streaming(params, mode="auto")
    need = sum(len(images_of(params, name, where)) for name in ("train", "validation")) * 3 * 16 * 16
    train, validation, reason = training_images(auto, CPU, where, free_memory=lambda: 2 * need)
    assert isinstance(train, Images) and isinstance(validation, Images) and reason is None
    train, validation, reason = training_images(auto, CPU, where, free_memory=lambda: 2 * need - 1)
    assert isinstance(train, ImageStream) and isinstance(validation, ImageStream)
    assert reason == (
        f"reads images as it needs them: decoded they take {need / 1e9:.1f} GB, above half of the "
        f"{(2 * need - 1) / 1e9:.1f} GB free in memory (stream.mode: auto)"
    )
    assert isinstance(evaluation_images(streaming(params), "test", where), ImageStream)
    assert isinstance(evaluation_images(streaming(params, mode="off"), "test", where), Images)


def test_a_rank_with_enough_memory_streams_if_another_rank_must(made, monkeypatch):
    params, where, _ = made
    auto = streaming(params, mode="auto")
    monkeypatch.setattr(dataset, "mean_over_ranks", lambda value: (value + 1) / 2)
    train, validation, reason = training_images(auto, CPU, where)
    assert isinstance(train, ImageStream) and isinstance(validation, ImageStream)
    assert reason == "reads images as it needs them: another process has too little memory for all (stream.mode: auto)"
    monkeypatch.setattr(dataset, "mean_over_ranks", lambda value: value)
    assert isinstance(training_images(auto, CPU, where)[0], Images)


def test_a_table_sorted_by_class_gives_a_warning_with_what_to_do(packed):
    params, where, _ = packed
    stream = stream_of(params, "train", CPU, where)
    assert stream.warning() is None
    stream.window, stream.labels = 3_000, torch.arange(len(stream)) % 3
    assert stream.warning() is None
    stream.labels = torch.from_numpy(stream.groups.number)
    assert "is sorted by class" in stream.warning() and "stream.shuffle_mib" in stream.warning()


PEAK = """
import sys, torch
from pathlib import Path
from tests.support.making import data_params
from pipeline.params import StreamParams
from pipeline.data.stream import ImageStream
for name in ("folder-120", "folder-1200", "table-120", "table-1200"):
    root, kind = Path(sys.argv[1]) / name, name.split("-")[0]
    table = {"table": {"train": "images.parquet", "label": "image"}} if kind == "table" else {}
    params = data_params(root, kind, **table)
    image = params.image.model_copy(update={"size": 160, "resize_to": 160})
    params = params.model_copy(update={"image": image, "stream": StreamParams(mode="on", workers=2, shuffle_mib=1)})
    stream = ImageStream(params.data, params.image, params.stream, "train", torch.device("cpu"), root)
    order = stream.order(torch.Generator().manual_seed(0))
    with stream.feed(order.view(-1, 8)) as feed:
        seen = sum(len(batch) for batch in feed)
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(seen, int(peak.split()[1]) / 1024)
"""


def test_ten_times_the_images_take_no_more_memory(tmp_path):
    for rows in (120, 1200):
        images = [encode(picture(seed, (40, 40)), "JPEG", quality=50) for seed in range(rows)]
        shards, loose = tmp_path / f"table-{rows}", tmp_path / f"folder-{rows}"
        shards.mkdir()
        pyarrow.parquet.write_table(pa.table({"image": images}), shards / "images.parquet", row_group_size=50)
        for seed, data in enumerate(images):
            write(loose / f"{seed}.jpg", data)
        for root, references in (
            (loose, [f"{seed}.jpg" for seed in range(rows)]),
            (shards, [f"images.parquet#{seed}" for seed in range(rows)]),
        ):
            columns = {"sample_id": references, "label": [0] * rows, "reference": references}
            pyarrow.parquet.write_table(pa.table(columns), root / "train.parquet")
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    actual = [(int(seen), float(peak)) for seen, peak in map(str.split, done.stdout.splitlines())]
    assert [seen for seen, _ in actual] == [120, 1200, 120, 1200]
    # Decoded, the larger split is 79 MiB larger.
    growth = [large - small for (_, small), (_, large) in (actual[:2], actual[2:])]
    assert max(growth) < 20, actual
