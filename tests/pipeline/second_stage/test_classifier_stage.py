"""Stage `classifier` on a frozen encoder and on a network for images: its output, what it reads, evaluation, export, errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from models.networks.cosine_classifier import linear_head
from models.prior import log_class_prior
from models.second_stage.tau_norm import TAUS, tau_normalised
from pipeline import classifier, embed, evaluate, export, prior, split, student, teacher
from pipeline.data.class_prior import load_prior
from pipeline.data.dataset import load_images
from pipeline.evaluation.network_metrics import network_logits
from pipeline.features.stored import load_features
from pipeline.labels.features import FeatureNetwork, labelled_images
from pipeline.model_io.checkpoint import load_model
from pipeline.onnx_export.release import open_session
from pipeline.second_stage import features, refit
from pipeline.second_stage.held_out import HeldOut
from pipeline.shared.artifacts import CLASSIFIER, EVALUATION, EXPORT, SPLIT, STUDENT, sha256_of
from pipeline.shared.errors import ParamsError, StageError
from tests.support.making import data_params, folder, params
from tests.support.small_encoder import tiny_encoder, tiny_params

CPU = torch.device("cpu")
KINDS = ("ncm", "tau_norm", "crt", "balanced_softmax", "lws", "disalign", "mislas", "los", "balms", "metasaug")
# Products of the features and a matrix [D,C] in a step: forward, and the gradient of the weight if it is trained. BALMS has
# three forward passes and the gradients of each, of which one is differentiated twice.
PRODUCTS = {"tau_norm": 2, "crt": 2, "balanced_softmax": 2, "lws": 1, "mislas": 2, "los": 2, "balms": 7}
SIZES = {"a": 60, "b": 24, "c": 15}
BASE = {"student.queue_total": 64, "data.validation_per_class": 20, "teacher.epochs": 1, "student.epochs": 2}
SHORT = {
    "image.size": 8, "image.resize_to": 8, "teacher.epochs": 1, "teacher.batch_size": 8, "student.epochs": 1,
    "student.batch_size": 8, "student.queue_total": 9, "student.queue_minimum": 2, "student.projection_dim": 4,
}  # fmt: skip


@pytest.fixture(name="trained", scope="module")
def _trained(tmp_path_factory):
    """A folder with a student on a frozen encoder, and its weights. Tests work in copies of it."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        weights = tiny_encoder(root, patch)
        made = tiny_params(weights, folder(root / "images", SIZES), BASE)
        for stage in (split, prior, embed, teacher, student):
            stage.run(made)
    return root


@pytest.fixture(name="on_features")
def _on_features(trained, tmp_path, monkeypatch):
    """Function from changes of the params to params, in a copy of the trained project."""
    for name in ("data", "artifacts"):
        shutil.copytree(trained / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    weights = tiny_encoder(tmp_path, monkeypatch)
    return lambda changes: tiny_params(weights, trained / "images", {**BASE, **changes})


@pytest.fixture(name="images", scope="module")
def _images(tmp_path_factory):
    """A folder with a student of images."""
    root = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        made = image_params(root, {})
        folder(root / "images", {"a": 20, "b": 12, "c": 8})
        for stage in (split, prior, teacher, student):
            stage.run(made)
    return root


def image_params(root, changes):
    data = {
        f"data.{key}": value
        for key, value in data_params(root / "images", validation_per_class=2).model_dump(mode="json")["data"].items()
    }
    return params({**data, **SHORT, **changes})


def record():
    return json.loads((CLASSIFIER / "config.json").read_text())["second_stage"]


def student_logits(made, folder_, stage, which="test"):
    return network_logits(folder_, stage, load_features(made, which), made.image, load_prior(), CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_writes_a_student_with_another_classifier_on_the_same_network(on_features, kind, capsys):
    made = on_features({"classifier.kind": kind})
    before = sha256_of(STUDENT / "model.safetensors")
    done = classifier.run(made)
    assert sha256_of(STUDENT / "model.safetensors") == before
    printed = capsys.readouterr().out
    assert ("classifier  batches of 16 images instead of " in printed) == (kind != "ncm")
    assert all(fit["steps"] >= 1000 and fit["batch_size"] == 16 for fit in record()["fits"])
    assert len(record()["fits"]) == (kind != "ncm")
    if kind in PRODUCTS:
        width = load_model(STUDENT, "student")[0].feature_dim
        assert record()["fits"][0]["step_macs"] == PRODUCTS[kind] * 16 * width * len(SIZES)
    assert record()["kind"] == kind and str(done).startswith(kind) and str(done).endswith("→ artifacts/classifier")
    first, second = (safetensors.torch.load_file(path / "model.safetensors") for path in (STUDENT, CLASSIFIER))
    assert all(torch.equal(second[name], first[name]) for name in first if name.startswith("backbone."))
    logits = student_logits(made, CLASSIFIER, "classifier")
    assert np.isfinite(logits).all() and not np.allclose(logits, student_logits(made, STUDENT, "student"))
    classifier.run(made)
    assert all(
        torch.equal(second[name], value)
        for name, value in safetensors.torch.load_file(CLASSIFIER / "model.safetensors").items()
    )


def test_lws_multiplies_the_logits_of_a_class_by_one_factor(on_features):
    made = on_features({"classifier.kind": "lws"})
    classifier.run(made)
    ratio = student_logits(made, CLASSIFIER, "classifier") / student_logits(made, STUDENT, "student")
    assert np.allclose(ratio, ratio[:1], rtol=1e-2) and not np.allclose(ratio[0], 1, atol=0.01)


def test_tau_has_the_best_balanced_accuracy_on_validation_images_and_the_test_split_is_not_read(
    on_features, monkeypatch
):
    made, heads = on_features({"classifier.kind": "tau_norm"}), []
    train = refit.methods.train_linear
    monkeypatch.setattr(refit.methods, "train_linear", lambda *given: heads.append(train(*given)) or heads[-1])
    (SPLIT / "test.parquet").unlink()
    classifier.run(made)
    held, model = load_features(made, "validation"), load_model(STUDENT, "student")[0]
    unit = torch.nn.functional.normalize(model.backbone(held.images[:, 0].float()), dim=1).detach()
    accuracies = []
    for tau in TAUS:
        predicted = (unit @ tau_normalised(heads[0].weight, tau).T).argmax(1)
        accuracies.append(np.mean([(predicted[held.labels == c] == c).float().mean() for c in range(3)]))
    assert record()["tau"] == TAUS[int(np.argmax(accuracies))]
    assert record()["balanced_accuracy"]["after"] == pytest.approx(max(accuracies))


def test_a_tau_of_params_is_used(on_features):
    made = on_features({"classifier.kind": "tau_norm", "classifier.tau": 0.7})
    classifier.run(made)
    assert record()["tau"] == 0.7


def test_the_scale_of_logits_has_the_least_balanced_cross_entropy_on_validation_images():
    draw = torch.Generator().manual_seed(0)
    means, labels = torch.randn(3, 8, generator=draw), torch.tensor([0] * 60 + [1] * 25 + [2] * 15)
    held = HeldOut(means[labels] + 1.5 * torch.randn(100, 8, generator=draw), labels)
    head = linear_head(means, torch.zeros(3))
    scale, logits = held.fit_scale(head), head(held.features).double()

    def loss(factor):
        losses = torch.nn.functional.cross_entropy(factor * logits, labels, reduction="none")
        return np.mean([losses[labels == c].mean() for c in range(3)])

    assert loss(scale) < min(loss(0.95 * scale), loss(1.05 * scale))
    assert HeldOut(held.features[:29], labels[:29]).fit_scale(head) == 1.0


def test_without_a_second_stage_the_stage_writes_one_file_and_loads_no_pytorch(on_features):
    made = on_features({})
    Path("params.json").write_text(made.model_dump_json())
    code = (
        "import sys; from pathlib import Path; from pipeline.params import load_params; import pipeline.classifier as c; "
        "print(c.run(load_params(Path('params.json')))); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "no second stage in params.yaml, the student keeps its classifier → artifacts/classifier\n"
    assert [path.name for path in CLASSIFIER.iterdir()] == ["second_stage.json"]


@pytest.mark.parametrize(
    ("kind", "precision", "adjustment"),
    [("ncm", "float32", None), ("disalign", "float32", 1.2), ("lws", "float16", None)],
)
@pytest.mark.slow
def test_evaluation_and_export_take_the_refitted_student_at_every_strength(on_features, kind, precision, adjustment):
    made = on_features({"classifier.kind": kind, "export.precision": precision})
    for stage in (classifier, evaluate, export):
        stage.run(made)
    metrics = json.loads((EVALUATION / "metrics.json").read_text())
    assert {"student", "student_first_stage"} <= set(metrics)
    assert "student first stage, balanced" in (EVALUATION / "report.html").read_text()
    assert f"; second stage: {kind}" in (EXPORT / "model_card.md").read_text()
    config = json.loads((CLASSIFIER / "config.json").read_text())
    assert config["adjustment"] == adjustment

    model, counts = load_model(CLASSIFIER, "classifier")[0], load_prior().counts
    log_prior = log_class_prior(counts)
    raw = model(load_features(made, "test").images[:, 0].float())[1].detach().numpy()
    # DisAlign's loss is least at log p(c|x) - 1.2 log p(c).
    balanced = raw if adjustment is None else raw + 0.2 * log_prior
    assert np.allclose(student_logits(made, CLASSIFIER, "classifier"), balanced, atol=1e-4)
    pixels = load_images(made.data, made.image, "test").images.numpy()
    session = open_session(EXPORT / "student.onnx")
    for strength in (0.0, 0.4, 1.0):
        inputs = {"image": pixels, "strength": np.full((len(pixels), 1), strength, np.float32)}
        served = session.run(["logits"], inputs)[0]
        assert np.allclose(served, balanced + strength * log_prior, atol=2e-2 if precision == "float32" else 0.3)


def test_features_of_image_views_are_stored_and_used_again_for_another_kind(images, tmp_path, monkeypatch):
    shutil.copytree(images, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    passes, whole = [], features._features
    monkeypatch.setattr(features, "_features", lambda *given: passes.append(1) or whole(*given))
    classifier.run(image_params(tmp_path, {"classifier.kind": "crt", "classifier.views": 3}))
    assert record()["views"] == len(passes) == 3
    stored = safetensors.torch.load_file("artifacts/.student.features/train.safetensors")["features"]
    assert stored.shape[1] == 3 and not torch.equal(stored[:, 0], stored[:, 1])
    classifier.run(image_params(tmp_path, {"classifier.kind": "mislas", "classifier.views": 3}))
    assert len(passes) == 3
    classifier.run(image_params(tmp_path, {"classifier.kind": "mislas", "classifier.views": 0}))
    assert len(passes) == 4 and record()["views"] == 1


def test_shifted_batch_norm_changes_its_statistics_to_those_of_class_balanced_batches(images, tmp_path, monkeypatch):
    shutil.copytree(images, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    changes = {"classifier.kind": "mislas", "classifier.shift_batch_norm": True, "classifier.views": 0}
    classifier.run(image_params(tmp_path, changes))
    first, second = (safetensors.torch.load_file(path / "model.safetensors") for path in (STUDENT, CLASSIFIER))
    changed = {name for name in first if name in second and not torch.equal(first[name], second[name])} - {
        "classifier.weight"
    }
    assert changed and all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in changed)
    # Reference: the mean of the first convolution's output over the images, with equal weights of the classes.
    model = load_model(STUDENT, "student")[0]
    conv = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    split_images = load_images(image_params(tmp_path, {}).data, image_params(tmp_path, {}).image, "train")
    outputs = conv((split_images.images / 255 - 0.5) / 0.5).mean((2, 3)).detach()
    balanced = torch.stack([outputs[split_images.labels == c].mean(0) for c in range(3)]).mean(0)
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    name = f"{norms[0]}.running_mean"
    shifted, trained = ((balanced - state[name]).norm() for state in (second, first))
    assert shifted < 0.2 * balanced.norm() and shifted < trained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classifier.kind": "knn"}, r"classifier\.kind is 'knn'; input should be 'none', 'ncm', 'tau_norm'"),
        (
            {"classifier.kind": "tau_norm", "classifier.tau": 3},
            r"classifier\.tau is 3; input should be less than",
        ),
        (
            {"classifier.kind": "tau_norm", "classifier.tau": -0.1},
            r"classifier\.tau is -0\.1; input should be greater than",
        ),
        (
            {"classifier.kind": "crt", "classifier.tau": 0.5},
            r"classifier: tau is 0\.5, which kind crt does not use \(only tau_norm\); set tau: null",
        ),
        (
            {"classifier.kind": "ncm", "classifier.start": "linear"},
            r"classifier: start is linear, which kind ncm does not use "
            r"\(only lws, disalign, mislas, los, balms, metasaug\); set start: student",
        ),
        (
            {"classifier.kind": "lws", "classifier.smoothing": [0.3, 0.0]},
            r"classifier: smoothing is \[0\.3, 0\.0\], which kind lws does not use \(only mislas\); set smoothing: \[0\.4",
        ),
    ],
)
def test_params_of_a_second_stage_that_do_not_fit_are_refused_in_one_line(changes, message):
    with pytest.raises(ParamsError, match=message) as caught:
        params(changes)
    assert "\n" not in str(caught.value)


def test_a_memory_and_a_shift_of_batch_norm_on_stored_features_are_refused(on_features):
    with pytest.raises(ParamsError, match=r"classifier\.kind is crt, but student\.memory is set"):
        on_features({"classifier.kind": "crt", "student.memory": {"classifier": "both"}})
    with pytest.raises(
        ParamsError, match=r"classifier\.shift_batch_norm is true, but the features of a frozen encoder"
    ):
        on_features({"classifier.kind": "crt", "classifier.shift_batch_norm": True})


def test_a_second_stage_needs_a_trained_student_and_evaluation_needs_the_second_stage(on_features):
    made = on_features({"classifier.kind": "crt"})
    with pytest.raises(ParamsError, match=r"classifier/config\.json: no such file; run `dvc repro classifier` first"):
        evaluate.run(made)
    shutil.rmtree(STUDENT)
    with pytest.raises(ParamsError, match=r"student/config\.json: no such file; run `dvc repro student` first"):
        classifier.run(made)
    assert not CLASSIFIER.exists()


def test_tau_cannot_be_chosen_without_validation_images_of_a_class(on_features, monkeypatch):
    made = on_features({"classifier.kind": "tau_norm"})
    whole = refit.evaluation_inputs

    def without_b(*given):
        held = whole(*given)
        labels = held["student"].labels
        labels[labels == 1] = 0
        return held

    monkeypatch.setattr(refit, "evaluation_inputs", without_b)
    with pytest.raises(
        ParamsError,
        match=r"tau is null, but class 'b' has no validation images to choose it on \(such classes: 1\)",
    ):
        classifier.run(made)
    classifier.run(on_features({"classifier.kind": "tau_norm", "classifier.tau": 1.0}))


def test_few_validation_images_give_a_warning_and_a_fixed_scale(images, tmp_path, monkeypatch, capsys):
    shutil.copytree(images, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    classifier.run(image_params(tmp_path, {"classifier.kind": "ncm"}))
    assert record()["scale"] == 1.0
    printed = " ".join(capsys.readouterr().err.split())
    assert "warning: the scale of the logits is not fitted (6 validation images, fewer than 30)" in printed


def test_training_that_diverges_is_reported_with_the_key_to_change(on_features):
    with pytest.raises(StageError, match=r"not finite; lower classifier\.learning_rate"):
        classifier.run(on_features({"classifier.kind": "crt", "classifier.learning_rate": 1e38}))
    assert not CLASSIFIER.exists()


def test_a_student_that_diverged_is_named_by_the_second_stage_and_by_the_search_for_wrong_labels(
    images, tmp_path, monkeypatch
):
    for name in ("data", "artifacts"):
        shutil.copytree(images / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    path = STUDENT / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    name = next(name for name, tensor in weights.items() if tensor.ndim == 4)
    weights[name] = torch.full_like(weights[name], 1e38)  # finite, as save_model checks, but not the logits
    safetensors.torch.save_file(weights, path)
    made = image_params(images, {"classifier.kind": "crt"})
    expected = (
        r"artifacts/student: its logits are not finite for .* images: training diverged; lower student.learning_rate"
    )
    with pytest.raises(StageError, match=expected):
        classifier.run(made)
    with pytest.raises(StageError, match=expected):
        labelled_images(FeatureNetwork(made))
