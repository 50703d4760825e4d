"""Pretrained weights from a local file: the correct file is loaded, or the error names the problem."""

from __future__ import annotations

import re

import pytest
import safetensors.torch
import torch

import pipeline.prior
import pipeline.split
import pipeline.teacher
from models.networks.backbones import build_backbone
from pipeline.model_io.pretrained import load_pretrained
from pipeline.params import PretrainedParams
from pipeline.shared.artifacts import sha256_of
from pipeline.shared.errors import ParamsError
from tests.support.making import data_params, folder, params


@pytest.fixture
def weights(tmp_path):
    """A file with the weights of a ResNet-20."""
    torch.manual_seed(7)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(build_backbone("resnet20").network.state_dict(), path)
    return path


def refusal(path, sha256=None, backbone="resnet20") -> str:
    given = PretrainedParams(file=str(path), sha256=sha256 or sha256_of(path))
    with pytest.raises(ParamsError) as caught:
        load_pretrained(build_backbone(backbone), given, "student.pretrained")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_backbone_starts_from_the_files_weights(weights):
    backbone = build_backbone("resnet20")
    load_pretrained(backbone, PretrainedParams(file=str(weights), sha256=sha256_of(weights)), "student.pretrained")
    expected = safetensors.torch.load_file(weights)
    assert all(torch.equal(value, expected[name]) for name, value in backbone.network.state_dict().items())


def test_a_file_with_another_sha256_is_rejected(weights):
    assert refusal(weights, "0" * 64) == (
        f"student.pretrained.sha256 is {'0' * 64}, but {weights} has {sha256_of(weights)}; it is another file"
    )


def test_a_missing_invalid_or_unsuitable_weights_file_is_rejected(weights, tmp_path):
    missing = tmp_path / "none.safetensors"
    message = refusal(missing, "0" * 64)
    assert message.startswith(f"student.pretrained.file is {str(missing)!r}: No such file or directory")
    pickled = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, pickled)
    assert "which has no conv1.weight" in refusal(pickled)
    named = pickled.rename(tmp_path / "weights.tensors")
    assert "which is no safetensors file" in refusal(named)
    assert re.search(
        r"which has blocks\.\S+ of shape .*; does it belong to the backbone\?$", refusal(weights, backbone="resnet32")
    )


def test_an_invalid_sha256_is_rejected_with_its_key():
    with pytest.raises(
        ParamsError, match=r"teacher\.pretrained\.sha is not a key; did you mean teacher\.pretrained\.sha256\?"
    ):
        params({"teacher.pretrained": {"file": "weights.safetensors", "sha": "0" * 64}})
    with pytest.raises(ParamsError, match=r"teacher\.pretrained\.sha256 is '0123'; string should match pattern"):
        params({"teacher.pretrained": {"file": "weights.safetensors", "sha256": "0123"}})


def test_a_stage_starts_from_it(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = data_params(folder(tmp_path / "images", {"a": 12, "b": 9})).model_dump(mode="json")["data"]
    given = {
        **{f"data.{key}": value for key, value in base.items()},
        "teacher.epochs": 1, "teacher.batch_size": 8, "teacher.learning_rate": 1e-9, "teacher.backbone": "resnet20",
        "teacher.pretrained": {"file": str(weights), "sha256": sha256_of(weights)},
    }  # fmt: skip
    made = params(given)
    pipeline.split.run(made)
    pipeline.prior.run(made)
    pipeline.teacher.run(made)
    trained = safetensors.torch.load_file(tmp_path / "artifacts/teacher/model.safetensors")
    expected = safetensors.torch.load_file(weights)
    assert torch.allclose(trained["backbone.network.conv1.weight"], expected["conv1.weight"], atol=1e-5)
