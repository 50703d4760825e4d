"""A small encoder with random weights, listed as `tiny` during a test."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from models.networks import encoders
from models.networks.backbones import build_backbone
from models.networks.encoders import HALF, Encoder
from pipeline.params import Params
from pipeline.shared.artifacts import sha256_of
from tests.support.making import data_params, params

TINY = "test_vit"  # of timm: 0.3 million parameters, made for tests


def tiny_encoder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, model: str = TINY, interpolation: str = "bilinear"
) -> Path:
    """List the encoder `tiny`, a model of timm, and write the file with its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = build_backbone(f"timm/{model}").network
    path = folder / "tiny.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    listed = Encoder("tiny", model, 160, 64, 1, HALF, HALF, "MIT", "hf://timm/tiny@main", interpolation=interpolation)
    monkeypatch.setitem(encoders.ENCODERS, "tiny", listed)
    return path


def tiny_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """List the encoder `tiny` with weights from a Python package, so that its name suffices."""
    package = folder / "packages/tiny_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    weights = tiny_encoder(package, monkeypatch)
    monkeypatch.syspath_prepend(str(package.parent))
    source = f"package:tiny_weights/{weights.name}"
    listed = dataclasses.replace(encoders.ENCODERS["tiny"], source=source, sha256=sha256_of(weights))
    monkeypatch.setitem(encoders.ENCODERS, "tiny", listed)


def tiny_params(weights: Path, source: Path, changes: dict[str, Any] | None = None) -> Params:
    """Params for a folder of images at 32 pixels, with the encoder `tiny`. changes: dotted keys."""
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
