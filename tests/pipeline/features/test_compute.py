"""Features of a frozen encoder: those of its network on the server's pixels, and what they depend on."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import pipeline.embed
import pipeline.split
from models.preprocess import preprocess
from pipeline.features.stored import load_features
from pipeline.model_io.encoder import LoadedEncoder, load_encoder
from pipeline.shared.artifacts import EMBEDDINGS
from pipeline.shared.errors import StageError
from pipeline.shared.fingerprint import ROOT
from serving.repository.manifest import ImageFormat
from tests.support.making import encode, folder, picture, png, write
from tests.support.small_encoder import (
    check_features,
    files_from_scratch,
    small_shards,
    split_folder,
    stored_files,
    tiny_encoder,
    tiny_params,
)


@pytest.fixture(name="weights")
def _weights(tmp_path, monkeypatch):
    return small_shards(tmp_path, monkeypatch)


def test_the_features_are_those_of_the_encoder_on_the_servers_pixels(weights):
    params = split_folder(weights)
    done = pipeline.embed.run(params)
    assert (done.images, done.computed) == (49, 49)
    assert str(done) == "tiny: features of 49 images, 49 computed, 0 stored before → artifacts/embeddings"
    check_features(params)
    assert load_features(params, "train").pixels(torch.arange(3)).dtype == torch.float16
    index = json.loads((EMBEDDINGS / "index.json").read_text())
    assert index["encoder"]["sha256"] == params.encoder.sha256 and index["encoder"]["licence"] == "MIT"
    assert not EMBEDDINGS.with_name(".embeddings.unfinished").exists()


def test_bicubic_pixels_are_those_of_the_server(weights, monkeypatch):
    tiny_encoder(weights.parent, monkeypatch, interpolation="bicubic")
    params = split_folder(weights, {"image.interpolation": "bicubic"})
    pipeline.embed.run(params)
    stored = load_features(params, "train")
    form = ImageFormat(size=32, resize_to=32, interpolation="bicubic")
    pixels = form.pixels(stored.encoded(0))
    assert not np.array_equal(pixels, preprocess(stored.encoded(0), 32, 32))
    network = load_encoder(params.encoder, params.image).network
    expected = network((torch.from_numpy(pixels)[None] / 255 - 0.5) / 0.5)
    assert torch.allclose(stored.pixels(torch.tensor([0])).float(), expected, atol=4e-3)


def test_views_are_stored_for_training_images_alone(weights):
    params = split_folder(weights, {"encoder.views": 2, "encoder.crop_padding": 4, "encoder.flip": True})
    pipeline.embed.run(params)
    train, test = load_features(params, "train"), load_features(params, "test")
    assert train.images.shape[1:] == (3, 64) and test.images.shape[1:] == (1, 64)
    assert not torch.equal(train.images[:, 1], train.images[:, 2])
    first = stored_files()
    assert files_from_scratch(params) == first


def test_changed_code_of_a_feature_computes_it_again(weights, monkeypatch):
    params = split_folder(weights)
    pipeline.embed.run(params)
    hashed = []
    monkeypatch.setattr("pipeline.model_io.encoder.sha256_of_sources", lambda *names: hashed.extend(names) or "other")
    assert pipeline.embed.run(params).computed == 49
    assert {"models/preprocess.py", "models/networks/backbones.py"} <= set(hashed)
    assert all((ROOT / name).is_file() for name in hashed)


def test_weights_at_another_path_and_a_download_change_no_output(weights):
    params = split_folder(weights)
    pipeline.embed.run(params)
    expected = stored_files()
    moved = weights.parent / "moved" / weights.name
    moved.parent.mkdir()
    weights.rename(moved)
    section = params.encoder.model_copy(update={"weights": str(moved), "download": True, "licence": "MIT"})
    changed = params.model_copy(update={"encoder": section})
    assert len(load_features(changed, "train")) > 0
    assert pipeline.embed.run(changed).computed == 0
    assert stored_files() == expected


def test_the_features_of_new_images_do_not_depend_on_which_were_stored_before(weights):
    params = split_folder(weights, {"encoder.views": 2, "encoder.crop_padding": 4, "encoder.flip": True})
    pipeline.embed.run(params)
    for number in (0, 7, 50):
        write(weights.parent / f"images/a/{number:03}-new.png", png(1000 + number))
    pipeline.split.run(params)
    assert 3 <= pipeline.embed.run(params).computed < 20  # includes images that the new split moves to train
    extended = stored_files()
    shutil.rmtree(EMBEDDINGS)
    assert pipeline.embed.run(params).computed == 52
    assert stored_files() == extended


def test_a_renamed_image_and_a_copy_in_another_class_are_not_computed_again(weights):
    params = split_folder(weights)
    pipeline.embed.run(params)
    images = weights.parent / "images"
    (images / "a/003.png").rename(images / "a/zzz.png")
    (images / "b/002.png").rename(images / "a/002-was-b.png")
    pipeline.split.run(params)
    assert pipeline.embed.run(params).computed == 0


def test_two_encodings_of_an_image_are_two_images_with_the_same_feature(weights):
    images = folder(weights.parent / "images", {"a": 20, "b": 9})
    write(images / "a/000-again.png", encode(picture(1), compress_level=0))
    params = tiny_params(weights, images)
    pipeline.split.run(params)
    assert pipeline.embed.run(params).computed == 30
    features_by_id = {
        name: stored.images[row, 0]
        for stored in (load_features(params, split) for split in ("train", "validation", "test"))
        for row, name in enumerate(stored.sample_ids)
    }
    assert torch.equal(features_by_id["a/000-again.png"], features_by_id["a/000.png"])


def test_a_feature_that_is_not_finite_names_the_image(weights, monkeypatch):
    params = split_folder(weights)
    whole = LoadedEncoder.features

    def broken(*arguments):
        computed = whole(*arguments)
        computed[1, 0, 3] = torch.nan
        return computed

    monkeypatch.setattr(LoadedEncoder, "features", broken)
    with pytest.raises(StageError, match=r"^\S+\.png: its feature is not finite"):
        pipeline.embed.run(params)
