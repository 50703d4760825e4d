"""A student with a memory of training features: its stages, its metrics, and its export as one graph."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from scipy.special import logsumexp

import pipeline.embed
import pipeline.evaluate
import pipeline.export
import pipeline.prior
import pipeline.split
import pipeline.student
import pipeline.teacher
from pipeline.data.class_prior import load_prior
from pipeline.data.dataset import load_images
from pipeline.evaluation.network_metrics import network_logits, student_parts
from pipeline.features.stored import load_features
from pipeline.model_io.checkpoint import BEST, load_model
from pipeline.model_io.encoder import load_encoder
from pipeline.onnx_export.release import open_session
from pipeline.shared.artifacts import EVALUATION, EXPORT, STUDENT
from pipeline.shared.errors import ParamsError
from tests.support.making import folder, params, png, write
from tests.support.small_encoder import tiny_encoder, tiny_params

CPU = torch.device("cpu")
BOTH = {"student.queue_total": 64, "student.memory": {"classifier": "both"}}
ALONE = {"student.memory": {"classifier": "memory"}}
BEFORE = (pipeline.split, pipeline.prior, pipeline.embed, pipeline.teacher)


@pytest.fixture(name="weights")
def _weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny_encoder(tmp_path, monkeypatch)


def until(stages, weights, changes):
    """Run these stages on a folder of three classes, one with few training images, and return the params."""
    ready = tiny_params(weights, folder(weights.parent / "images", {"a": 40, "b": 12, "c": 4}), changes)
    for stage in stages:
        stage.run(ready)
    return ready


def record():
    return json.loads((STUDENT / "config.json").read_text())["memory"]


def mixture(features, classes, tau, weight):
    """Compute the memory's logits of features [N,D] with numpy, from the stored features of the training images."""
    stored = safetensors.torch.load_file(STUDENT / "model.safetensors")
    rows, row_class = stored["memory.rows"].double().numpy(), stored["memory.row_class"].numpy()
    cosines = F.normalize(features.double(), dim=1).numpy() @ rows.T
    scores = [
        logsumexp(cosines[:, row_class == c] / tau, axis=1) - np.log((row_class == c).sum()) for c in range(classes)
    ]
    return weight * np.stack(scores, 1)


def test_a_student_with_a_memory_adds_its_logits_to_those_of_the_trained_network(weights):
    plain = until((*BEFORE, pipeline.student), weights, {"student.queue_total": 64})
    prior, test = load_prior(), load_features(plain, "test")
    without = network_logits(STUDENT, "student", test, plain.image, prior, CPU)
    trained = safetensors.torch.load_file(STUDENT / "model.safetensors")

    done = pipeline.student.run(tiny_params(weights, weights.parent / "images", BOTH))
    stored = safetensors.torch.load_file(STUDENT / "model.safetensors")
    assert all(torch.equal(trained[name], stored[name]) for name in trained)
    train, memory = load_features(plain, "train"), record()
    assert stored["memory.row_class"].tolist() == sorted(train.labels.tolist())
    assert (memory["rows"], memory["images"]) == (len(train), len(train))
    assert f"memory of {len(train)} rows, tau" in str(done)

    logits = network_logits(STUDENT, "student", test, plain.image, prior, CPU)
    features = test.images[:, 0]
    expected = without + mixture(features, 3, memory["tau"], memory["weight"])
    assert np.allclose(logits, expected, atol=2e-3)
    parts = student_parts(STUDENT, test, plain.image, prior, CPU)
    assert np.array_equal(parts["student_cosine_alone"], without)
    assert np.allclose(parts["student_memory_alone"], mixture(features, 3, **memory["alone"]), atol=2e-3)
    assert load_model(STUDENT / BEST, "student")[0].memory is not None


def test_a_weight_of_0_gives_the_logits_of_the_trained_network_bit_for_bit(weights):
    plain = until((*BEFORE, pipeline.student), weights, {"student.queue_total": 64})
    prior, test = load_prior(), load_features(plain, "test")
    without = network_logits(STUDENT, "student", test, plain.image, prior, CPU)
    pipeline.student.run(tiny_params(weights, weights.parent / "images", BOTH))
    path = STUDENT / "config.json"
    changed = json.loads(path.read_text())
    changed["memory"]["weight"] = 0.0
    path.write_text(json.dumps(changed))
    assert np.array_equal(network_logits(STUDENT, "student", test, plain.image, prior, CPU), without)


def test_a_memory_alone_needs_no_training_and_new_images_are_embedded_and_added(weights, monkeypatch):
    def trained(*_):
        raise AssertionError("a memory alone must not train")

    monkeypatch.setattr("pipeline.training.engine.Training.run", trained)
    before = (pipeline.split, pipeline.prior, pipeline.embed, pipeline.student)
    ready = until(before, weights, ALONE)
    first = safetensors.torch.load_file(STUDENT / "model.safetensors")
    assert set(first) == {"memory.rows", "memory.log_share", "memory.row_class"}
    test, memory = load_features(ready, "test"), record()
    logits = network_logits(STUDENT, "student", test, ready.image, load_prior(), CPU)
    assert np.allclose(logits, mixture(test.images[:, 0], 3, memory["tau"], memory["weight"]), atol=2e-3)

    write(weights.parent / "images/a/100.png", png(1000))
    for stage in (pipeline.split, pipeline.prior):
        stage.run(ready)
    assert pipeline.embed.run(ready).computed == 1
    assert str(pipeline.student.run(ready)).startswith("nothing trained, memory of ")
    images = len(load_features(ready, "train"))
    assert record()["rows"] == images == len(first["memory.row_class"]) + 1


@pytest.mark.parametrize("changes", [BOTH, ALONE])
def test_with_few_validation_images_the_memory_has_the_default_numbers_and_a_warning_is_printed(
    weights, changes, capsys
):
    ready = until(BEFORE, weights, changes)
    images = len(load_features(ready, "validation"))
    assert 0 < images < 30
    done = pipeline.student.run(ready)
    why = f"(defaults: {images} validation images, fewer than 30)"
    assert f"tau 0.07, weight 1 {why}" in str(done)
    line = f"warning: tau and weight of student.memory are not fitted {why}; raise data.validation_per_class"
    assert line in " ".join(capsys.readouterr().err.split())
    fits = (0.07, 1.0, images, {"tau": 0.07, "weight": 1.0})
    assert tuple(record()[key] for key in ("tau", "weight", "validation_images", "alone")) == fits


def test_enough_validation_images_fit_the_numbers_and_a_memory_alone_that_does_not_help_keeps_a_weight(weights, capsys):
    """The images are noise, so the memory cannot predict classes."""
    sizes = {"a": 60, "b": 60}
    given = {"data.validation_per_class": 20, **ALONE}
    ready = tiny_params(weights, folder(weights.parent / "images", sizes), given)
    for stage in (pipeline.split, pipeline.prior, pipeline.embed):
        stage.run(ready)
    assert "(fitted on 40 validation images)" in str(pipeline.student.run(ready))
    assert "not fitted" not in capsys.readouterr().err
    memory = record()
    assert memory["alone"] == {"tau": memory["tau"], "weight": memory["weight"]} and memory["weight"] >= 0.1
    test = load_features(ready, "test")
    logits = network_logits(STUDENT, "student", test, ready.image, load_prior(), CPU)
    assert (logits != 0).all()


def test_a_limit_of_rows_keeps_every_class_and_too_low_a_limit_is_refused(weights):
    ready = until(BEFORE, weights, {"student.memory": {"classifier": "memory", "rows": 12}})
    pipeline.student.run(ready)
    rows = torch.bincount(safetensors.torch.load_file(STUDENT / "model.safetensors")["memory.row_class"])
    assert rows.sum() <= 12 and (rows > 0).all()
    assert record()["images"] > 12
    low = tiny_params(weights, weights.parent / "images", {"student.memory": {"classifier": "memory", "rows": 2}})
    with pytest.raises(ParamsError, match=r"^student\.memory\.rows is 2; expected at least 3, one row for each class"):
        pipeline.student.run(low)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [BOTH, ALONE, {**BOTH, "student.adapter": 0, "export.precision": "float16"}])
def test_encoder_and_memory_are_exported_as_one_graph_and_all_three_classifiers_are_evaluated(weights, changes):
    ready = until((*BEFORE, pipeline.student, pipeline.evaluate), weights, changes)
    done = pipeline.export.run(ready)
    pixels = load_images(ready.data, ready.image, "test").images
    encoder = load_encoder(ready.encoder, ready.image).network
    features = encoder((pixels / 255 - 0.5) / 0.5).detach()
    model, _ = load_model(STUDENT, "student")
    expected = model(features)[1].detach().numpy()
    strength = np.zeros((len(pixels), 1), np.float32)
    session = open_session(EXPORT / "student.onnx")
    for size in (1, len(pixels)):
        inputs = {"image": pixels[:size].numpy(), "strength": strength[:size]}
        logits = session.run(["logits"], inputs)[0]
        assert np.allclose(logits, expected[:size], atol=1e-3 if done.half is None else 0.1)
    manifest, memory = json.loads((EXPORT / "manifest.json").read_text()), record()
    assert manifest["memory"] == memory
    card = (EXPORT / "model_card.md").read_text()
    assert f"**Memory of training features**: memory of {memory['rows']} rows, tau {memory['tau']:.3g}" in card
    metrics = json.loads((EVALUATION / "metrics.json").read_text())
    alone = {"student_cosine_alone", "student_memory_alone"} & set(metrics)
    assert len(alone) == (2 if memory["classifier"] == "both" else 0)
    assert "student memory alone, balanced" in (EVALUATION / "report.html").read_text() or not alone


def test_a_memory_without_an_encoder_is_refused():
    with pytest.raises(
        ParamsError,
        match=r"^params\.yaml: student\.memory is set, but section encoder is null; a memory holds features",
    ):
        params({"student.memory": {"classifier": "both"}})


def test_a_memory_with_a_tuned_encoder_is_refused(weights):
    with pytest.raises(
        ParamsError, match=r"student: memory is set, but tune is all, and a memory holds features of a frozen"
    ):
        until((), weights, {**BOTH, "student.tune": "all"})
