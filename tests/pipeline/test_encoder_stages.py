"""Teacher and student on the features of a frozen encoder, and their export with the encoder as one graph."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch

import pipeline.embed
import pipeline.evaluate
import pipeline.export
import pipeline.prior
import pipeline.split
import pipeline.student
import pipeline.teacher
from models.networks.adapters import ResidualAdapter, feature_backbone
from pipeline.augment import draw_stored, take_stored
from pipeline.data.dataset import load_images
from pipeline.model_io.checkpoint import attach_encoder, load_model
from pipeline.onnx_export.release import open_session
from pipeline.shared.artifacts import EXPORT, STUDENT, TEACHER, sha256_of
from pipeline.shared.errors import ParamsError
from tests.support.making import data_params, folder, params
from tests.support.small_encoder import tiny_encoder, tiny_params


@pytest.fixture(name="weights")
def _weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny_encoder(tmp_path, monkeypatch)


def until(stages, weights, changes=None):
    """Run these stages on a folder of two classes and return the params."""
    ready = tiny_params(weights, folder(weights.parent / "images", {"a": 30, "b": 9}), changes)
    for stage in stages:
        stage.run(ready)
    return ready


FEATURES = (pipeline.split, pipeline.prior, pipeline.embed)
QUEUES = {"student.queue_total": 64}


def test_an_adapter_starts_as_the_identity_and_changes_features_after_training():
    features = torch.randn(3, 8)
    adapter = ResidualAdapter(8, 4)
    assert torch.equal(adapter(features), features)
    torch.nn.init.ones_(adapter.up.weight)
    assert not torch.equal(adapter(features), features)
    assert torch.equal(feature_backbone(8, 0)(features), features)


def test_each_view_is_one_of_the_stored_views_of_its_image():
    features = torch.arange(5)[:, None, None] * 10 + torch.arange(3)[:, None] + torch.zeros(2)
    draws = draw_stored(5, 4, 3, torch.Generator().manual_seed(1))
    views = take_stored(features, draws)
    assert views.shape == (4, 5, 2)
    assert torch.equal(views[..., 0] // 10, torch.arange(5.0).expand(4, 5))
    assert len(views[..., 0].unique()) > 5
    assert torch.equal(take_stored(features[2:4], draws.rows(2, 4)), views[:, 2:4])


@pytest.mark.parametrize("views", [0, 2])
def test_both_stages_train_on_features_and_resume_bit_identically(weights, views, monkeypatch):
    params = until(FEATURES, weights, {**QUEUES, "encoder.views": views, "encoder.crop_padding": 4})
    pipeline.teacher.run(params)
    done = pipeline.student.run(params)
    assert {"classification", "gml", "distillation", "queue_fill"} <= set(done.last)
    trained = safetensors.torch.load_file(STUDENT / "model.safetensors")
    assert set(trained) == {
        "classifier.weight",
        *(f"backbone.network.{part}.{kind}" for part in ("norm", "down", "up") for kind in ("weight", "bias")),
    }
    assert set(safetensors.torch.load_file(TEACHER / "model.safetensors")) == {"classifier.weight"}

    from pipeline.training.engine import Training

    whole, epochs = Training._epoch, []

    def stopping(self, *arguments):
        epochs.append(1)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    monkeypatch.setattr(Training, "_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        pipeline.student.run(params)
    pipeline.student.run(params)
    again = safetensors.torch.load_file(STUDENT / "model.safetensors")
    assert all(torch.equal(trained[name], again[name]) for name in trained)


@pytest.mark.slow
def test_encoder_adapter_and_head_are_exported_as_one_graph_with_their_licence(weights):
    params = until((*FEATURES, pipeline.teacher, pipeline.student, pipeline.evaluate), weights, QUEUES)
    pipeline.export.run(params)
    model, config = load_model(STUDENT, "student")
    attach_encoder(model, config, params, STUDENT)
    pixels = load_images(params.data, params.image, "test").images
    expected = model.eval()((pixels / 255 - 0.5) / 0.5)[1].detach().numpy()
    strength = np.zeros((len(pixels), 1), np.float32)
    actual = open_session(EXPORT / "student.onnx").run(["logits"], {"image": pixels.numpy(), "strength": strength})[0]
    assert np.allclose(actual, expected, atol=1e-3)
    manifest = json.loads((EXPORT / "manifest.json").read_text())
    assert manifest["encoder"]["licence"] == "MIT" and manifest["encoder"]["sha256"] == sha256_of(weights)
    assert (
        f"tiny, licence MIT; weights tiny.safetensors, sha256 {sha256_of(weights)}"
        in (EXPORT / "model_card.md").read_text()
    )


def test_a_network_of_another_encoder_is_refused(weights):
    params = until((*FEATURES, pipeline.teacher), weights, QUEUES)
    other = weights.with_name("other.safetensors")
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file(tensors | {"norm.bias": tensors["norm.bias"] + 1}, other)
    changed = params.model_copy(
        update={"encoder": params.encoder.model_copy(update={"weights": str(other), "sha256": sha256_of(other)})}
    )
    with pytest.raises(ParamsError, match=r"^encoder\.sha256 is .*, but the features of .* run `dvc repro embed`"):
        pipeline.student.run(changed)
    pipeline.embed.run(changed)
    with pytest.raises(
        ParamsError, match=r"^encoder is tiny \(\w{12}\), but artifacts/teacher was trained with tiny \("
    ):
        pipeline.student.run(changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher.backbone": "resnet20"},
            "teacher.backbone is 'resnet20', but section encoder is set; expected backbone",
        ),
        ({"encoder": None}, "teacher.backbone is 'encoder', but section encoder is null"),
        ({"student.augment.flip": True}, "student.augment.flip is True; the features of an encoder are not augmented"),
        ({"teacher.pretrained": {"file": "a", "sha256": "0" * 64}}, "teacher.pretrained is set; the weights of"),
    ],
)
def test_sections_that_do_not_fit_an_encoder_are_refused_by_their_key(weights, changes, message):
    with pytest.raises(ParamsError) as caught:
        tiny_params(weights, weights.parent, changes)
    assert str(caught.value).startswith(f"params.yaml: {message}")


def test_an_adapter_or_bicubic_images_without_an_encoder_are_refused():
    with pytest.raises(
        ParamsError, match=r"^params\.yaml: student\.adapter is 8, but there is no encoder; set adapter: 0"
    ):
        params({"student.adapter": 8})


def test_a_run_without_an_encoder_does_not_read_the_folder_of_features(weights):
    ready = data_params(folder(weights.parent / "images", {"a": 12, "b": 9})).model_dump(mode="json")
    made = params(
        {**{f"data.{key}": value for key, value in ready["data"].items()}, "teacher.epochs": 1, "teacher.batch_size": 8}
    )
    for stage in (pipeline.split, pipeline.prior, pipeline.teacher):
        stage.run(made)
    assert json.loads((TEACHER / "config.json").read_text())["encoder"] is None
