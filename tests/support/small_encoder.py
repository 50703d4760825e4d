"""A small encoder with random weights, listed as `tiny` during a test."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import pipeline.embed
import pipeline.split
from models.networks import encoders
from models.networks.backbones import build_backbone
from models.networks.encoders import HALF, Encoder
from models.preprocess import preprocess
from pipeline.data.assignment import SPLITS
from pipeline.features.compute import BATCH
from pipeline.features.stored import load_features
from pipeline.model_io.encoder import load_encoder
from pipeline.params import Params
from pipeline.shared.artifacts import EMBEDDINGS, sha256_of
from tests.support.making import data_params, folder, params

TINY = "test_vit"  # a network of timm for tests, 0.3 million parameters


def tiny_encoder(
    root: Path, monkeypatch: pytest.MonkeyPatch, model: str = TINY, interpolation: str = "bilinear"
) -> Path:
    """Add the encoder `tiny`, a model of timm, to the list, and write the file with its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = build_backbone(f"timm/{model}").network
    path = root / "tiny.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    listed = Encoder("tiny", model, 160, 64, 1, HALF, HALF, "MIT", "hf://timm/tiny@main", interpolation=interpolation)
    monkeypatch.setitem(encoders.ENCODERS, "tiny", listed)
    return path


def tiny_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the encoder `tiny` to the list with weights in a Python package, so that params need only its name."""
    package = root / "packages/tiny_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    weights = tiny_encoder(package, monkeypatch)
    monkeypatch.syspath_prepend(str(package.parent))
    source = f"package:tiny_weights/{weights.name}"
    listed = dataclasses.replace(encoders.ENCODERS["tiny"], source=source, sha256=sha256_of(weights))
    monkeypatch.setitem(encoders.ENCODERS, "tiny", listed)


def tiny_params(weights: Path, source: Path, changes: dict[str, Any] | None = None) -> Params:
    """Return params for a folder of images at 32 pixels, with the encoder `tiny`. changes: dotted keys."""
    data = data_params(source).model_dump(mode="json")["data"]
    given = {
        **{f"data.{key}": value for key, value in data.items()},
        "image.size": 32,
        "image.resize_to": 32,
        "encoder": {"name": "tiny", "weights": str(weights), "sha256": sha256_of(weights)},
        **{
            f"{stage}.{key}": value
            for stage in ("teacher", "student")
            for key, value in {
                "backbone": "encoder", "epochs": 3, "batch_size": 8, "augment.crop_padding": 0, "augment.flip": False,
            }.items()
        },
        "student.adapter": 16,
    }  # fmt: skip
    return params(given | (changes or {}))


def small_shards(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `tiny_encoder`, in the working folder `root`, with shards of 16 images and batches of 4."""
    monkeypatch.chdir(root)
    monkeypatch.setattr("pipeline.features.compute.SHARD_ROWS", 16)
    monkeypatch.setattr("pipeline.features.stored.SHARD_ROWS", 16)
    monkeypatch.setitem(BATCH, "cpu", 4)
    return tiny_encoder(root, monkeypatch)


def split_folder(weights: Path, changes: dict[str, Any] | None = None, **sizes: int) -> Params:
    """Params, after a split of a folder with those numbers of images by class."""
    ready = tiny_params(weights, folder(weights.parent / "images", sizes or {"a": 40, "b": 9}), changes)
    pipeline.split.run(ready)
    return ready


def stored_files() -> dict[str, bytes]:
    """The files of the stored features."""
    return {file.name: file.read_bytes() for file in sorted(EMBEDDINGS.iterdir())}


def files_from_scratch(params: Params) -> dict[str, bytes]:
    """The files of the stored features, after these were removed and computed again."""
    shutil.rmtree(EMBEDDINGS)
    pipeline.embed.run(params)
    return stored_files()


def check_features(params: Params) -> None:
    """Check the stored features of all images against those of the network on the server's pixels."""
    assert params.encoder is not None
    network = load_encoder(params.encoder, params.image).network
    for split in SPLITS:
        stored = load_features(params, split)
        pixels = np.stack([preprocess(stored.encoded(index), 32, 32) for index in range(len(stored))])
        expected = network((torch.from_numpy(pixels) / 255 - 0.5) / 0.5)
        assert torch.allclose(stored.images[:, 0].float(), expected, atol=4e-3)
