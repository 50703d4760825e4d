"""Stage `embed`: features once per image, resumed after a kill, extended by new images, never half-written."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import pipeline.embed
import pipeline.split
from models.preprocess import preprocess
from pipeline.data.embeddings import load_features
from pipeline.model_io.embedding import BATCH
from pipeline.model_io.encoder import LoadedEncoder, load_encoder
from pipeline.shared.artifacts import EMBEDDINGS, SPLIT, sha256_of
from pipeline.shared.errors import DataError, ParamsError, StageError
from pipeline.shared.fingerprint import ROOT
from serving.repository.manifest import ImageFormat
from tests.support.making import data_params, encode, folder, picture, png, write
from tests.support.small_encoder import tiny_encoder, tiny_params


@pytest.fixture(name="weights")
def _weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.model_io.embedding.SHARD_ROWS", 16)
    monkeypatch.setattr("pipeline.data.embeddings.SHARD_ROWS", 16)
    monkeypatch.setitem(BATCH, "cpu", 4)
    return tiny_encoder(tmp_path, monkeypatch)


def made(weights, changes=None, **sizes):
    """Params, after a split of a folder with those numbers of images by class."""
    ready = tiny_params(weights, folder(weights.parent / "images", sizes or {"a": 40, "b": 9}), changes)
    pipeline.split.run(ready)
    return ready


def contents(path=EMBEDDINGS):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def features(params, split="train"):
    return load_features(params, split)


def test_the_features_are_those_of_the_encoder_on_the_servers_pixels(weights):
    params = made(weights)
    done = pipeline.embed.run(params)
    assert (done.images, done.computed) == (49, 49)
    assert str(done) == "tiny: features of 49 images, 49 computed, 0 stored before → artifacts/embeddings"
    loaded = load_encoder(params.encoder, params.image)
    for split in ("train", "validation", "test"):
        stored = features(params, split)
        pixels = [preprocess(stored.encoded(index), 32, 32) for index in range(len(stored))]
        expected = loaded.network((torch.from_numpy(np.stack(pixels)) / 255 - 0.5) / 0.5)
        assert stored.pixels(torch.arange(len(stored))).dtype == torch.float16
        assert torch.allclose(stored.images[:, 0].float(), expected, atol=4e-3)
    index = json.loads((EMBEDDINGS / "index.json").read_text())
    assert index["encoder"]["sha256"] == params.encoder.sha256 and index["encoder"]["licence"] == "MIT"
    assert not EMBEDDINGS.with_name(".embeddings.unfinished").exists()


def test_bicubic_pixels_are_those_of_the_server(weights, monkeypatch):
    tiny_encoder(weights.parent, monkeypatch, interpolation="bicubic")
    params = made(weights, {"image.interpolation": "bicubic"})
    pipeline.embed.run(params)
    stored = features(params)
    form = ImageFormat(size=32, resize_to=32, interpolation="bicubic")
    pixels = form.pixels(stored.encoded(0))
    assert not np.array_equal(pixels, preprocess(stored.encoded(0), 32, 32))
    network = load_encoder(params.encoder, params.image).network
    expected = network((torch.from_numpy(pixels)[None] / 255 - 0.5) / 0.5)
    assert torch.allclose(stored.pixels(torch.tensor([0])).float(), expected, atol=4e-3)


def test_views_are_stored_for_training_images_alone(weights):
    params = made(weights, {"encoder.views": 2, "encoder.crop_padding": 4, "encoder.flip": True})
    pipeline.embed.run(params)
    train, test = features(params), features(params, "test")
    assert train.images.shape[1:] == (3, 64) and test.images.shape[1:] == (1, 64)
    assert not torch.equal(train.images[:, 1], train.images[:, 2])
    first = contents()
    shutil.rmtree(EMBEDDINGS)
    pipeline.embed.run(params)
    assert contents() == first


def test_only_new_images_are_computed(weights):
    params = made(weights)
    pipeline.embed.run(params)
    before = features(params)
    assert pipeline.embed.run(params).computed == 0
    write(weights.parent / "images/a/100.png", png(1000))  # added
    (weights.parent / "images/a/001.png").unlink()  # removed
    write(weights.parent / "images/b/000.png", png(1001))  # replaced
    pipeline.split.run(params)
    with pytest.raises(StageError, match="holds features of other images than data/split; run `dvc repro embed`"):
        [features(params, split) for split in ("train", "validation", "test")]
    assert pipeline.embed.run(params).computed == 2
    after = features(params)
    rows = {name: row for row, name in enumerate(before.sample_ids)}
    common = [(rows[name], row) for row, name in enumerate(after.sample_ids) if name in rows and "b/000" not in name]
    assert common
    assert all(torch.equal(before.images[old], after.images[new]) for old, new in common)


def test_a_run_that_stops_anywhere_resumes_to_the_same_bytes(weights, monkeypatch):
    params = made(weights, {"encoder.views": 1})
    pipeline.embed.run(params)
    expected = contents()
    whole = LoadedEncoder.features
    for after in range(0, 14, 2):
        shutil.rmtree(EMBEDDINGS)
        left = after

        def stopping(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return whole(*arguments)

        monkeypatch.setattr(LoadedEncoder, "features", stopping)
        with pytest.raises(KeyboardInterrupt):
            pipeline.embed.run(params)
        assert not EMBEDDINGS.exists()
        monkeypatch.setattr(LoadedEncoder, "features", whole)
        pipeline.embed.run(params)
        assert contents() == expected


def test_a_run_that_stops_before_the_split_changes_gives_each_image_its_own_feature(weights, monkeypatch):
    params = made(weights)
    whole, calls = LoadedEncoder.features, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) > 6:  # 4 of a shard of 16 images
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(LoadedEncoder, "features", stopping)
    with pytest.raises(KeyboardInterrupt):
        pipeline.embed.run(params)
    monkeypatch.setattr(LoadedEncoder, "features", whole)
    for number in range(3):  # sorted before the other images, so that all rows move
        write(weights.parent / f"images/a/0-{number}.png", png(1000 + number))
    pipeline.split.run(params)
    assert pipeline.embed.run(params).computed == 52 - 16
    loaded = load_encoder(params.encoder, params.image)
    for split in ("train", "validation", "test"):
        stored = features(params, split)
        pixels = np.stack([preprocess(stored.encoded(index), 32, 32) for index in range(len(stored))])
        expected = loaded.network((torch.from_numpy(pixels) / 255 - 0.5) / 0.5)
        assert torch.allclose(stored.images[:, 0].float(), expected, atol=4e-3)


def test_changed_code_of_a_feature_computes_it_again(weights, monkeypatch):
    params = made(weights)
    pipeline.embed.run(params)
    hashed = []
    monkeypatch.setattr("pipeline.model_io.encoder.sha256_of_sources", lambda *names: hashed.extend(names) or "other")
    assert pipeline.embed.run(params).computed == 49
    assert {"models/preprocess.py", "models/networks/backbones.py"} <= set(hashed)
    assert all((ROOT / name).is_file() for name in hashed)


def test_weights_at_another_path_and_a_download_change_no_output(weights):
    params = made(weights)
    pipeline.embed.run(params)
    expected = contents()
    moved = weights.parent / "moved" / weights.name
    moved.parent.mkdir()
    weights.rename(moved)
    section = params.encoder.model_copy(update={"weights": str(moved), "download": True, "licence": "MIT"})
    changed = params.model_copy(update={"encoder": section})
    assert len(features(changed)) > 0
    assert pipeline.embed.run(changed).computed == 0
    assert contents() == expected


def test_the_features_of_new_images_do_not_depend_on_which_were_stored_before(weights):
    params = made(weights, {"encoder.views": 2, "encoder.crop_padding": 4, "encoder.flip": True})
    pipeline.embed.run(params)
    for number in (0, 7, 50):
        write(weights.parent / f"images/a/{number:03}-new.png", png(1000 + number))
    pipeline.split.run(params)
    assert 3 <= pipeline.embed.run(params).computed < 20  # also those that another split now makes training images
    extended = contents()
    shutil.rmtree(EMBEDDINGS)
    assert pipeline.embed.run(params).computed == 52
    assert contents() == extended


def test_a_renamed_image_and_a_copy_in_another_class_are_not_computed_again(weights):
    params = made(weights)
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
        for stored in (features(params, split) for split in ("train", "validation", "test"))
        for row, name in enumerate(stored.sample_ids)
    }
    assert torch.equal(features_by_id["a/000-again.png"], features_by_id["a/000.png"])


@pytest.mark.parametrize("content", [png(1000), png(1)[:60], b""], ids=["replaced", "damaged", "empty"])
def test_an_image_that_has_changed_since_the_split_is_refused_and_its_feature_is_not_stored(weights, content):
    params = made(weights)
    path = weights.parent / "images/a/007.png"
    before = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a/007\.png: has changed since the images were split; run `dvc repro` again"):
        pipeline.embed.run(params)
    path.write_bytes(before)
    pipeline.embed.run(params)
    resumed = contents()
    shutil.rmtree(EMBEDDINGS)
    pipeline.embed.run(params)
    assert contents() == resumed


def test_a_second_run_at_the_same_time_is_refused_and_the_first_one_finishes(weights, monkeypatch):
    params = made(weights)
    whole, refused = LoadedEncoder.features, []

    def twice(*arguments):
        if not refused:
            code = f"import pipeline.embed, sys; sys.argv = ['embed', '--params', {str(weights.parent / 'p.yaml')!r}]; "
            (weights.parent / "p.yaml").write_text(json.dumps(params.model_dump(mode="json")))
            command = [sys.executable, "-c", code + "sys.exit(pipeline.embed.stage_main(pipeline.embed.run, ''))"]
            refused.append(subprocess.run(command, capture_output=True, text=True, check=False))
        return whole(*arguments)

    monkeypatch.setattr(LoadedEncoder, "features", twice)
    assert pipeline.embed.run(params).computed == 49
    assert refused[0].returncode == 1
    assert refused[0].stderr.endswith("another `embed` of this project runs; wait until it has finished\n")


@pytest.mark.faults
def test_a_process_that_is_killed_at_any_moment_resumes_to_the_same_bytes(weights):
    params = made(weights, {"encoder.views": 1})
    started = time.monotonic()
    pipeline.embed.run(params)
    seconds, expected = time.monotonic() - started, contents()
    draw = random.Random(17)
    for _ in range(20):
        shutil.rmtree(EMBEDDINGS, ignore_errors=True)
        child = os.fork()
        if not child:
            pipeline.embed.run(params)
            os._exit(0)
        time.sleep(draw.uniform(0, 1.2 * seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pipeline.embed.run(params)
        assert contents() == expected


def test_a_full_disk_leaves_the_old_features_and_no_half_written_file(weights, monkeypatch):
    params = made(weights)
    pipeline.embed.run(params)
    expected = contents()
    write(weights.parent / "images/a/100.png", png(1000))
    pipeline.split.run(params)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("serving.shared.atomic.os.fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        pipeline.embed.run(params)
    assert Path(caught.value.filename).match(".embeddings.unfinished/train-*.safetensors")
    assert contents() == expected
    assert list(EMBEDDINGS.with_name(".embeddings.unfinished").iterdir()) == []


def test_a_file_limit_in_the_middle_is_one_line_and_the_next_run_continues_after_the_finished_shards(
    weights, monkeypatch, capsys
):
    params = made(weights)
    (weights.parent / "p.yaml").write_text(json.dumps(params.model_dump(mode="json")))
    whole, calls, limits = LoadedEncoder.features, [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments):
        calls.append(1)
        if len(calls) == 5:  # the first batch of the second shard
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes; a shard has 2,600
        return whole(*arguments)

    monkeypatch.setattr(LoadedEncoder, "features", limited)
    try:
        code = pipeline.embed.stage_main(pipeline.embed.run, "", ["--params", str(weights.parent / "p.yaml")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = r"embed: \S+/\.embeddings\.unfinished/train-\w{64}\.safetensors: File too large\n"
    assert code == 1 and re.fullmatch(line, capsys.readouterr().err)
    assert not EMBEDDINGS.exists() and len(list(EMBEDDINGS.with_name(".embeddings.unfinished").iterdir())) == 1
    monkeypatch.setattr(LoadedEncoder, "features", whole)
    assert pipeline.embed.run(params).computed == 49 - 16
    resumed = contents()
    shutil.rmtree(EMBEDDINGS)
    pipeline.embed.run(params)
    assert contents() == resumed


def test_a_feature_that_is_not_finite_names_the_image(weights, monkeypatch):
    params = made(weights)
    whole = LoadedEncoder.features

    def broken(*arguments):
        computed = whole(*arguments)
        computed[1, 0, 3] = torch.nan
        return computed

    monkeypatch.setattr(LoadedEncoder, "features", broken)
    with pytest.raises(StageError, match=r"^\S+\.png: its feature is not finite"):
        pipeline.embed.run(params)


def test_features_of_another_encoder_or_size_are_refused(weights):
    params = made(weights)
    with pytest.raises(ParamsError, match=r"index\.json: no such file; run `dvc repro embed` first"):
        features(params)
    pipeline.embed.run(params)
    other = params.model_copy(update={"image": params.image.model_copy(update={"resize_to": 40})})
    with pytest.raises(ParamsError, match=r"^image\.resize_to is 40, but the features of .* computed with 32; run"):
        features(other)
    more = params.model_copy(update={"encoder": params.encoder.model_copy(update={"views": 3})})
    with pytest.raises(ParamsError, match=r"^encoder\.views is 3, but"):
        features(more)
    # Another size is another key: nothing of the old features is used.
    assert pipeline.embed.run(other).computed == 49


def test_a_damaged_shard_is_computed_again(weights):
    params = made(weights)
    pipeline.embed.run(params)
    expected = contents()
    shard = EMBEDDINGS / "train-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(StageError, match=r"train-00000\.safetensors: missing, damaged or of another encoder; run"):
        features(params)
    assert pipeline.embed.run(params).computed == 16
    assert contents() == expected


def test_features_that_were_changed_by_hand_are_refused_and_computed_again(weights):
    params = made(weights)
    pipeline.embed.run(params)
    expected = contents()
    shard = EMBEDDINGS / "train-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 4
    shard.write_bytes(data)
    with pytest.raises(StageError, match=r"train-00001\.safetensors: missing, damaged or of another encoder; run"):
        features(params)
    pipeline.embed.run(params)
    assert contents() == expected
    shard.unlink()
    with pytest.raises(StageError, match=r"train-00001\.safetensors: missing, damaged or of another encoder; run"):
        features(params)
    pipeline.embed.run(params)
    assert contents() == expected


def test_features_of_another_encoder_beside_the_index_are_refused_and_computed_again(weights):
    params = made(weights)
    pipeline.embed.run(params)
    expected = contents()
    tensors = safetensors.torch.load_file(weights)
    other = weights.with_name("other.safetensors")
    safetensors.torch.save_file(tensors | {"norm.bias": tensors["norm.bias"] + 1}, other)
    section = params.encoder.model_copy(update={"weights": str(other), "sha256": sha256_of(other)})
    assert pipeline.embed.run(params.model_copy(update={"encoder": section})).computed == 49
    (EMBEDDINGS / "index.json").write_bytes(expected["index.json"])
    with pytest.raises(StageError, match=r"train-00000\.safetensors: missing, damaged or of another encoder; run"):
        features(params)
    pipeline.embed.run(params)
    assert contents() == expected


def test_without_an_encoder_nothing_is_computed_and_the_output_never_changes(weights):
    params = data_params(folder(weights.parent / "images", {"a": 6, "b": 6}))
    assert pipeline.embed.run(params).images == 0 and not SPLIT.exists()
    assert contents() == {"index.json": b'{\n  "encoder": null\n}\n'}


def test_without_an_encoder_the_stage_does_not_load_pytorch():
    code = "import pipeline.embed, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
