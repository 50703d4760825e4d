"""Stored features: refused and computed again when they are damaged, edited or of another encoder."""

from __future__ import annotations

import json

import pytest
import safetensors.torch

import pipeline.embed
from pipeline.features.stored import load_features
from pipeline.shared.artifacts import EMBEDDINGS, EMBEDDINGS_INDEX, sha256_of
from pipeline.shared.errors import ParamsError, StageError
from tests.support.small_encoder import small_shards, split_folder, stored_files


@pytest.fixture(name="weights")
def _weights(tmp_path, monkeypatch):
    return small_shards(tmp_path, monkeypatch)


def test_features_of_another_encoder_or_size_are_refused(weights):
    params = split_folder(weights)
    with pytest.raises(ParamsError, match=r"index\.json: no such file; run `dvc repro embed` first"):
        load_features(params, "train")
    pipeline.embed.run(params)
    other = params.model_copy(update={"image": params.image.model_copy(update={"resize_to": 40})})
    with pytest.raises(ParamsError, match=r"^image\.resize_to is 40, but the features of .* computed with 32; run"):
        load_features(other, "train")
    more = params.model_copy(update={"encoder": params.encoder.model_copy(update={"views": 3})})
    with pytest.raises(ParamsError, match=r"^encoder\.views is 3, but"):
        load_features(more, "train")
    # Another size gives another key, so no old feature is used.
    assert pipeline.embed.run(other).computed == 49


@pytest.mark.parametrize("changes", [{"keys": {}}, {"encoder": None}, {"encoder": {}}, {"params": 1}])
def test_an_index_that_was_edited_is_refused(weights, changes):
    params = split_folder(weights)
    pipeline.embed.run(params)
    EMBEDDINGS_INDEX.write_text(json.dumps(json.loads(EMBEDDINGS_INDEX.read_text()) | changes))
    with pytest.raises(ParamsError, match=r"index\.json: damaged or without features; run `dvc repro -f embed`"):
        load_features(params, "train")


def test_a_damaged_shard_is_computed_again(weights):
    params = split_folder(weights)
    pipeline.embed.run(params)
    expected = stored_files()
    shard = EMBEDDINGS / "train-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(StageError, match=r"train-00000\.safetensors: missing, damaged or of another encoder; run"):
        load_features(params, "train")
    assert pipeline.embed.run(params).computed == 16
    assert stored_files() == expected


def test_features_that_were_changed_by_hand_are_refused_and_computed_again(weights):
    params = split_folder(weights)
    pipeline.embed.run(params)
    expected = stored_files()
    shard = EMBEDDINGS / "train-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 4
    shard.write_bytes(data)
    with pytest.raises(StageError, match=r"train-00001\.safetensors: missing, damaged or of another encoder; run"):
        load_features(params, "train")
    pipeline.embed.run(params)
    assert stored_files() == expected
    shard.unlink()
    with pytest.raises(StageError, match=r"train-00001\.safetensors: missing, damaged or of another encoder; run"):
        load_features(params, "train")
    pipeline.embed.run(params)
    assert stored_files() == expected


def test_features_of_another_encoder_beside_the_index_are_refused_and_computed_again(weights):
    params = split_folder(weights)
    pipeline.embed.run(params)
    expected = stored_files()
    tensors = safetensors.torch.load_file(weights)
    other = weights.with_name("other.safetensors")
    safetensors.torch.save_file(tensors | {"norm.bias": tensors["norm.bias"] + 1}, other)
    section = params.encoder.model_copy(update={"weights": str(other), "sha256": sha256_of(other)})
    assert pipeline.embed.run(params.model_copy(update={"encoder": section})).computed == 49
    (EMBEDDINGS / "index.json").write_bytes(expected["index.json"])
    with pytest.raises(StageError, match=r"train-00000\.safetensors: missing, damaged or of another encoder; run"):
        load_features(params, "train")
    pipeline.embed.run(params)
    assert stored_files() == expected
