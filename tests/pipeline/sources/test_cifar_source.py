"""Sources cifar10 and cifar100: small archives in the published format, valid, damaged and hostile."""

import hashlib
import io
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from pipeline import split
from pipeline.data.dataset import evaluation_images
from pipeline.data.stream import ImageStream
from pipeline.params import StreamParams
from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources import open_source
from pipeline.sources.cifar import unpickle_arrays
from tests.support.archives import NAMES, python2_pickle, write_archive
from tests.support.making import data_params


def opened(root, name="cifar10", **changes):
    return open_source(data_params(root, name, **changes).data)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar.gz"])
def test_every_image_and_label_equals_torchvisions(tmp_path, monkeypatch, name, packed):
    write_archive(tmp_path, name, monkeypatch, packed=packed)
    source = opened(tmp_path, name)
    if packed:  # torchvision reads only archives that it has unpacked
        monkeypatch.setattr(
            NAMES[name], "tgz_md5", hashlib.md5((tmp_path / NAMES[name].filename).read_bytes()).hexdigest()
        )
        torchvision.datasets.utils.extract_archive(tmp_path / NAMES[name].filename, tmp_path)
    for part, train in (("train", True), ("test", False)):
        peer = NAMES[name](tmp_path, train=train)
        rows = [row for row in source.rows if row.split == part]
        assert [row.label for row in rows] == peer.targets
        actual = np.stack([np.asarray(Image.open(io.BytesIO(source.read(row.reference)))) for row in rows])
        assert np.array_equal(actual, peer.data)
        assert source.classes == peer.classes
    assert rows[3].sample_id == f"{name}/test#3"


def test_the_split_uses_the_test_images_of_the_archive(tmp_path, monkeypatch):
    write_archive(tmp_path / "root", "cifar10", monkeypatch, per_class=4)
    made = data_params(tmp_path / "root", "cifar10", profile="exponential", imbalance_factor=5)
    result = split.run(made, tmp_path / "out")
    assert result.sizes["test"] == 40 and result.sizes["validation"] == 10
    assert 20 + 4 <= result.sizes["train"] < 200
    on = made.model_copy(update={"stream": StreamParams(mode="on", decode="exact")})
    stream, held = (evaluation_images(given, "test", tmp_path / "out") for given in (on, made))
    assert isinstance(stream, ImageStream) and torch.equal(
        stream.pixels(torch.arange(40)), held.pixels(torch.arange(40))
    )


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_downloaded_unless_data_download_is_true(tmp_path, name, monkeypatch):
    def fetch(*_, **__):
        raise AssertionError("went to the network")

    monkeypatch.setattr(NAMES[name], "download", fetch)
    with pytest.raises(ParamsError) as caught:
        opened(tmp_path, name)
    folder, packed = NAMES[name].base_folder, NAMES[name].filename
    assert f"holds neither {folder}/ nor {packed}" in str(caught.value)
    assert str(caught.value).endswith("or set data.download: true")
    with pytest.raises(AssertionError, match="went to the network"):
        opened(tmp_path, name, download=True)


def test_a_failed_download_names_the_folder_for_the_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(NAMES["cifar10"], "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(DataError) as caught:
        opened(tmp_path / "new", download=True)
    message = str(caught.value)
    assert message.startswith("http://127.0.0.1:9/cifar-10-python.tar.gz: not downloaded (") and "\n" not in message
    assert message.endswith(f"fetch it by other means and put it into {tmp_path / 'new'}")


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_file_that_is_not_the_published_one_is_named_with_both_sums(tmp_path, monkeypatch, file):
    write_archive(tmp_path, "cifar10", monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / file
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        opened(tmp_path)
    assert str(caught.value).startswith(f"{path}: has md5 {hashlib.md5(data).hexdigest()}, the published file has ")


def test_a_missing_or_cut_off_archive_is_named(tmp_path, monkeypatch):
    write_archive(tmp_path / "a", "cifar10", monkeypatch)
    (tmp_path / "a/cifar-10-batches-py/data_batch_4").unlink()
    with pytest.raises(
        DataError, match="data_batch_4: not readable \\(No such file or directory\\); fetch the archive again"
    ):
        opened(tmp_path / "a")
    write_archive(tmp_path / "b", "cifar10", monkeypatch, packed=True)
    path = tmp_path / "b/cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[:60_000])
    with pytest.raises(DataError, match=r"cifar-10-python.tar.gz: cifar-10-batches-py/batches.meta: not readable \("):
        opened(tmp_path / "b")


class Hostile:
    def __init__(self, call, *arguments):
        self.made = call, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize(
    "content",
    [
        {"data": Hostile(os.system, "touch owned")},
        Hostile(eval, "open('owned', 'w')"),
        {"data": np.array([Hostile(os.mkdir, "owned")], dtype=object)},
    ],
)
def test_a_pickle_that_would_run_code_is_rejected_without_running_it(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    for data in (pickle.dumps(content), pickle.dumps(content, protocol=2)):
        with pytest.raises(DataError, match=r"batch: not unpickled: it contains .*, which is not an array"):
            unpickle_arrays(data, "batch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"\x80", b"no pickle", python2_pickle({"a": 1})[:-2]])
def test_a_broken_pickle_is_one_line(data):
    with pytest.raises(DataError) as caught:
        unpickle_arrays(data, "batch")
    assert str(caught.value).startswith("batch: not unpickled") and "\n" not in str(caught.value)
