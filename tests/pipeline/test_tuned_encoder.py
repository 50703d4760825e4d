"""A student that tunes the encoder: trained on images against a frozen teacher, resumed, evaluated and exported."""

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
from models.contrast.queues import ClassQueues
from pipeline.data.class_prior import load_prior
from pipeline.data.dataset import load_images
from pipeline.features.stored import load_features, stored_encoder
from pipeline.model_io.checkpoint import load_model
from pipeline.model_io.encoder import load_encoder
from pipeline.onnx_export.release import open_session
from pipeline.shared.artifacts import EXPORT, STUDENT, TEACHER
from pipeline.shared.errors import ParamsError
from pipeline.training.engine import Training
from pipeline.training.run import model_config
from pipeline.training.student_setup import build_objective
from tests.support.making import folder
from tests.support.small_encoder import tiny_encoder, tiny_params

FEATURES = (pipeline.split, pipeline.prior, pipeline.embed, pipeline.teacher)
TUNES = ["last_blocks", "lora", "adaptformer", "all"]
PREFIX = "backbone.network.0.network."


@pytest.fixture(name="weights")
def _weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The check takes several seconds in each run; test_backbone_check.py tests it.
    monkeypatch.setattr(pipeline.student, "check_tuned_export", lambda *_: None)
    return tiny_encoder(tmp_path, monkeypatch)


def until(stages, weights, tune, **changes):
    """Run these stages on a folder of two classes and return the params, with a tuned student."""
    given = {
        "student.queue_total": 64, "student.tune": tune, "student.tune_rank": 2, "student.tune_rate": 1.0,
        "student.augment.flip": True, "student.optimizer": "adamw", "student.learning_rate": 0.001, **changes,
    }  # fmt: skip
    ready = tiny_params(weights, folder(weights.parent / "images", {"a": 30, "b": 9}), given)
    for stage in stages:
        stage.run(ready)
    return ready


def stop_at_epoch(monkeypatch, number):
    """Interrupt the next training run at its epoch `number`; later runs are not interrupted."""
    whole, epochs = Training._epoch, []

    def stopping(self, *arguments):
        epochs.append(1)
        if len(epochs) == number:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    monkeypatch.setattr(Training, "_epoch", stopping)


@pytest.mark.parametrize("tune", TUNES)
def test_a_tuned_student_trains_on_images_resumes_bit_identically_and_is_saved_by_plain_names(
    weights, tune, monkeypatch
):
    params = until(FEATURES, weights, tune)
    done = pipeline.student.run(params)
    assert {"classification", "gml", "distillation", "queue_fill"} <= set(done.last)
    trained = safetensors.torch.load_file(STUDENT / "model.safetensors")
    pretrained = safetensors.torch.load_file(weights)
    plain = {name.removeprefix(PREFIX) for name in trained if name.startswith(PREFIX) and ".adapter." not in name}
    assert plain == set(pretrained)
    assert any(".adapter." in name for name in trained) == (tune == "adaptformer")
    changed = {
        name
        for name, value in pretrained.items()
        if name != "pos_embed" and not torch.equal(trained[PREFIX + name], value)
    }
    last = {name for name in pretrained if name.startswith(("blocks.4.", "blocks.5.", "norm."))}
    if tune in ("last_blocks", "adaptformer"):
        assert changed == (last if tune == "last_blocks" else set())
    else:
        assert "blocks.0.attn.qkv.weight" in changed
    assert ("blocks.0.norm1.weight" in changed) == (tune == "all")
    stop_at_epoch(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        pipeline.student.run(params)
    pipeline.student.run(params)
    again = safetensors.torch.load_file(STUDENT / "model.safetensors")
    assert trained.keys() == again.keys() and all(torch.equal(trained[name], again[name]) for name in trained)


@pytest.mark.slow
@pytest.mark.parametrize("tune", TUNES)
def test_a_tuned_student_is_evaluated_and_exported_as_one_graph_that_records_the_tuning(weights, tune):
    params = until((*FEATURES, pipeline.student, pipeline.evaluate), weights, tune)
    pipeline.export.run(params)
    pixels = load_images(params.data, params.image, "test").images
    model, _ = load_model(STUDENT, "student")
    expected = model((pixels / 255 - 0.5) / 0.5)[1].detach().numpy()
    frozen = load_encoder(params.encoder, params.image).network
    assert not torch.allclose(model.backbone.network[0](pixels / 255.0), frozen(pixels / 255.0))
    strength = np.zeros((len(pixels), 1), np.float32)
    actual = open_session(EXPORT / "student.onnx").run(["logits"], {"image": pixels.numpy(), "strength": strength})[0]
    assert np.allclose(actual, expected, atol=1e-3)
    assert json.loads((EXPORT / "manifest.json").read_text())["encoder"]["tune"] == tune
    text = {
        "last_blocks": "tiny (last 2 blocks tuned)",
        "lora": "tiny (tuned by LoRA of rank 2, merged into the weights)",
        "adaptformer": "tiny (with an AdaptFormer adapter of 2 hidden units in each block)",
        "all": "tiny (all weights tuned)",
    }
    assert f"{text[tune]}, a residual adapter" in (EXPORT / "model_card.md").read_text()


def test_the_contrast_encoder_of_a_tuned_student_is_the_frozen_encoder(weights, monkeypatch):
    params = until(FEATURES, weights, "all", **{"student.augment.flip": False, "student.epochs": 1})
    stored = load_features(params, "train")
    enqueued = []

    def enqueue(self, features, target, sample_ids):
        enqueued.append((features, sample_ids))
        return plain(self, features, target, sample_ids)

    plain = ClassQueues.enqueue
    monkeypatch.setattr(ClassQueues, "enqueue", enqueue)
    pipeline.student.run(params)
    assert len(enqueued) == len(stored) // 8
    for features, ids in enqueued:
        assert torch.allclose(features, stored.images[ids, 0].float(), rtol=1e-2, atol=1e-2)


def test_the_student_starts_with_the_pretrained_weights_and_its_own_rate_for_them(weights):
    params = until(FEATURES, weights, "all", **{"student.tune_rate": 0.25})
    config = model_config(params.student, params.image, 2, stored_encoder(params))
    objective = build_objective(params.student, params.image, config, load_prior(), 1, TEACHER, params.encoder)
    state, pretrained = objective.model.state_dict(), load_encoder(params.encoder, params.image).network.state_dict()
    assert all(torch.equal(state[f"backbone.network.0.{name}"], value) for name, value in pretrained.items())
    assert set(objective.model.backbone.rate_factors().values()) == {0.25}
    assert objective.teacher.backbone.network[0] is not objective.model.backbone.network[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.views": 2}, "encoder.views is 2, but student.tune is lora, which draws views of the images"),
        ({"student.contrast_encoder": "momentum"}, "student: contrast_encoder is momentum, but tune is lora"),
        (
            {"encoder": None, "student.adapter": 0, "student.backbone": "resnet20", "teacher.backbone": "resnet20"},
            "student.tune is lora, but there is no encoder; set tune: none",
        ),
        ({"teacher.augment.flip": True}, "teacher.augment.flip is True; the features of an encoder are not augmented"),
    ],
)
def test_sections_that_do_not_fit_a_tuned_encoder_are_refused_by_their_key(weights, changes, message):
    with pytest.raises(ParamsError) as caught:
        tiny_params(weights, weights.parent, {"student.tune": "lora", **changes})
    assert str(caught.value).startswith(f"params.yaml: {message}")


def test_the_export_of_the_encoder_is_tried_before_the_student_trains(weights, monkeypatch):
    params = until(FEATURES[:-1], weights, "all")

    def refuse(encoder, section, size, opset):
        raise ParamsError(f"{encoder.name} {section.tune} {size} {opset}")

    monkeypatch.setattr(pipeline.student, "check_tuned_export", refuse)
    with pytest.raises(ParamsError, match=rf"^tiny all 32 {params.export.opset}$"):
        pipeline.student.run(params)  # there is no teacher either; that error would come later


def test_adapters_for_an_encoder_without_transformer_blocks_are_refused_before_and_after_the_teacher_trains(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    weights = tiny_encoder(tmp_path, monkeypatch, "test_efficientnet")
    reason = r"^student\.tune is adaptformer, but its network has no transformer blocks with an MLP$"
    with pytest.raises(ParamsError, match=reason):
        until(FEATURES, weights, "adaptformer")
    assert not TEACHER.exists()
    until(FEATURES, weights, "none", **{"student.augment.flip": False})
    with pytest.raises(ParamsError, match=reason):
        pipeline.student.run(until((), weights, "adaptformer"))


def test_an_encoder_that_cannot_be_tuned_and_a_student_of_another_tune_are_refused(weights):
    params = until(FEATURES[:-1], weights, "last_blocks", **{"student.tune_blocks": 7})
    with pytest.raises(ParamsError, match=r"^student\.tune is last_blocks, but its network has 6 blocks, not 7"):
        pipeline.teacher.run(params)
    until(FEATURES[-1:], weights, "last_blocks")
    with pytest.raises(
        ParamsError, match=r"^student\.tune is last_blocks, but its network has 6 blocks, not 7; tune `all` of it$"
    ):
        pipeline.student.run(params)
    two = params.model_copy(update={"student": params.student.model_copy(update={"tune_blocks": 2, "epochs": 1})})
    pipeline.student.run(two)
    frozen = params.model_copy(update={"student": params.student.model_copy(update={"tune": "none"})})
    with pytest.raises(
        ParamsError,
        match=r"^student\.tune is none, but artifacts/student was trained with last_blocks; run `dvc repro`",
    ):
        pipeline.evaluate.run(frozen)
