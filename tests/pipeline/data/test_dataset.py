"""Images of a split in memory: correct pixels and labels, and normalisation equal to torchvision's."""

import re

import numpy as np
import pytest
import torch

from pipeline import split
from pipeline.data.dataset import load_images, normalise
from pipeline.data.split_tables import load_classes
from pipeline.shared.errors import DataError, ParamsError
from tests.support.making import data_params, encode, folder, params, picture, table, write


@pytest.fixture
def made(tmp_path):
    root = folder(tmp_path / "source", {"ant": 5, "bee": 4})
    settled = data_params(root)
    split.run(settled, tmp_path / "split")
    return settled, tmp_path / "split", root


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_every_image_has_its_own_pixels_label_and_bytes(made, name):
    settled, where, root = made
    images = load_images(settled.data, settled.image, name, where)
    assert images.images.dtype == torch.uint8 and images.labels.dtype == torch.int64 and len(images) > 0
    for index, sample_id in enumerate(images.sample_ids):
        assert images.encoded(index) == (root / sample_id).read_bytes()
        assert load_classes(where)[images.labels[index]] == sample_id.split("/")[0]
        # making.folder numbers its pictures in writing order.
        seed = {"ant": 1, "bee": 6}[sample_id.split("/")[0]] + int(sample_id[-7:-4])
        assert np.array_equal(images.images[index].numpy(), picture(seed).transpose(2, 0, 1))


def test_an_empty_split_is_an_empty_tensor(tmp_path):
    settled = data_params(folder(tmp_path / "source", {"a": 4, "b": 4}), validation_per_class=0)
    split.run(settled, tmp_path / "split")
    images = load_images(settled.data, settled.image, "validation", tmp_path / "split")
    assert len(images) == 0 and images.images.shape == (0, 3, 16, 16)


def test_an_image_damaged_after_the_split_is_named(made):
    settled, where, root = made
    spoilt = load_images(settled.data, settled.image, "train", where).references[0]
    (root / spoilt).write_bytes(b"spoilt")
    with pytest.raises(DataError, match=re.escape(f"{spoilt}: is not a JPEG, PNG or WebP image; replace the image")):
        load_images(settled.data, settled.image, "train", where)
    (root / spoilt).unlink()
    with pytest.raises(DataError, match=re.escape(f"{root / spoilt}: No such file or directory")):
        load_images(settled.data, settled.image, "train", where)


def test_a_table_gives_the_pixels_of_its_image_column(tmp_path):
    images = [encode(picture(i), "WEBP", lossless=True) for i in range(8)]
    table(tmp_path / "source/train.parquet", {"image": images, "label": [0, 1] * 4})
    settled = data_params(tmp_path / "source", "table", test_per_class=1)
    split.run(settled, tmp_path / "split")
    actual = load_images(settled.data, settled.image, "train", tmp_path / "split")
    for row, reference in enumerate(actual.references):
        index = int(reference.rpartition("#")[2])
        assert np.array_equal(actual.images[row].numpy(), picture(index).transpose(2, 0, 1))
        assert actual.labels[row] == index % 2


def test_a_missing_split_names_the_stage(tmp_path):
    for load in (lambda: load_images(params().data, params().image, "train", tmp_path), lambda: load_classes(tmp_path)):
        with pytest.raises(ParamsError, match="run `dvc repro split` first"):
            load()


def test_pixels_are_normalised_per_channel():
    image = params({"image.mean": [0.1, 0.5, 0.9], "image.std": [0.2, 0.5, 1.5]}).image
    pixels = torch.randint(0, 256, (2, 5, 3, 4, 4), dtype=torch.uint8)
    actual = normalise(pixels, image)
    assert actual.dtype == torch.float32
    for channel, (mean, std) in enumerate(zip(image.mean, image.std, strict=True)):
        expected = (pixels[:, :, channel].double() / 255 - mean) / std
        assert torch.allclose(actual[:, :, channel].double(), expected, atol=1e-6)


def test_a_too_large_image_file_is_rejected_before_it_is_read(tmp_path):
    root = folder(tmp_path / "source", {"a": 4, "b": 4})
    with write(root / "a/huge.png", b"").open("r+b") as stream:
        stream.truncate(33 * 2**20)  # a sparse file, which uses no disk space
    with pytest.raises(DataError, match=re.escape(f"{root}/a/huge.png: has {33 * 2**20} bytes, above the limit")):
        split.run(data_params(root), tmp_path / "split")
