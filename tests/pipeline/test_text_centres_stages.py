"""Stage `student` with text features as centres: frozen and tuned encoder, errors, sampling, second stages, export."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from models.class_sampler import ClassSampler
from pipeline import classifier, embed, prior, split, student, teacher
from pipeline.data.class_prior import load_prior
from pipeline.features.stored import load_features
from pipeline.model_io.checkpoint import attach_encoder, load_model
from pipeline.onnx_export.graph import ServedStudent, to_onnx
from pipeline.preparation.gpu_memory import estimate_memory
from pipeline.shared.artifacts import CLASSIFIER, STUDENT, TEACHER, TEXT
from pipeline.shared.errors import ParamsError
from pipeline.text.stored import TextFeatures, write_text_features
from pipeline.training.engine import Training
from pipeline.training.method_setup import text_centres
from tests.support.making import folder
from tests.support.small_encoder import tiny_encoder, tiny_params

SIZES = {"a": 40, "b": 12, "c": 8}
ALONE = {
    "text": {"encoder": "features", "file": "own.safetensors"}, "student.contrast_encoder": "text", "student.alpha": 0.0,
    "student.projection_dim": 8,
}  # fmt: skip
RAW = {"student.contrast": {"kind": "gml", "centres": "raw", "sentences": "mean"}}
TUNED = {"student.tune": "last_blocks", "student.optimizer": "adamw", "student.learning_rate": 0.001}
WIDTH = 24


def write_text(width=WIDTH, names=tuple(SIZES)):
    rows = F.normalize(torch.randn(5, width, generator=torch.Generator().manual_seed(1)), dim=1).numpy()
    text = TextFeatures(rows, np.array([0, 0, 0, 1, 2]), names, (), {"encoder": "made", "sha256": "", "templates": []})
    write_text_features(TEXT, text)
    return text


@pytest.fixture(name="project", scope="module")
def _project(tmp_path_factory):
    """A folder with split, prior, features of a frozen encoder and text features. Tests work in copies of it."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        made = tiny_params(tiny_encoder(root, patch), folder(root / "images", SIZES))
        for stage in (split, prior, embed):
            stage.run(made)
        write_text()
    return root


@pytest.fixture(name="with_changes")
def _with_changes(project, tmp_path, monkeypatch):
    """Function from changes of the params to params, in a copy of the project. The student uses text features alone."""
    for name in ("data", "artifacts"):
        shutil.copytree(project / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    weights = tiny_encoder(tmp_path, monkeypatch)
    return lambda changes: tiny_params(weights, project / "images", {**ALONE, **changes})


def names_of(path):
    return set(safetensors.torch.load_file(path / "model.safetensors"))


def test_a_student_trains_on_cached_embeddings_with_text_alone_and_saves_nothing_of_text(with_changes):
    done = student.run(with_changes({}))
    assert {"classification", "gml", "tau", "tau_g"} <= set(done.last) and "queue_fill" not in done.last
    assert not TEACHER.exists()
    trained = names_of(STUDENT)
    student.run(with_changes({"student.beta": 0.0}))
    assert trained == names_of(STUDENT)


def test_image_and_text_centres_train_together_on_a_tuned_encoder(with_changes, monkeypatch):
    monkeypatch.setattr(student, "check_tuned_export", lambda *_: None)  # tests/pipeline/preparation has it
    made = with_changes({**TUNED, "student.contrast_encoder": "teacher_and_text", "student.queue_total": 64})
    with pytest.raises(
        ParamsError, match=r"artifacts/teacher/config\.json: no such file; run `dvc repro teacher` first"
    ):
        student.run(made)
    teacher.run(made)
    record = student.run(made).last
    assert {"gml", "tau", "tau_g", "queue_fill", "text_gml", "text_tau", "text_tau_g"} <= set(record)
    alone = student.run(with_changes(TUNED)).last
    assert "gml" in alone and "queue_fill" not in alone


def test_raw_centres_print_the_zero_shot_accuracy_of_the_mean_of_each_class(with_changes, capsys):
    text, made = write_text(width=64), with_changes(RAW)
    student.run(made)
    validation = load_features(made, "validation")
    means = np.stack([text.features[text.row_class == c].mean(0) for c in range(3)])
    cosines = (
        F.normalize(validation.images[:, 0].double(), dim=1).numpy()
        @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    )
    expected = (cosines.argmax(1) == validation.labels.numpy()).mean()
    assert f"zero-shot, without training: {expected:.1%} of the validation images" in capsys.readouterr().out


def test_the_keys_are_all_sentences_or_the_mean_of_each_class_and_each_side_has_its_head(with_changes):
    text = write_text(width=64)
    means = np.stack([text.features[text.row_class == c].mean(0) for c in range(3)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    for sentences, rows, lengths in (("all", text.features, [3, 1, 1]), ("mean", means, [1, 1, 1])):
        section = with_changes({"student.contrast": {"kind": "gml", "sentences": sentences}}).student
        term = text_centres(section, load_prior(), 64, text)
        assert term.lengths.tolist() == lengths and term.features.numpy() == pytest.approx(rows, abs=1e-6)
        heads = [dict(head.named_parameters()) for head in (term.query_head, term.key_head)]
        for name, weight in heads[0].items():  # equal at the start, but not shared
            assert torch.equal(weight, heads[1][name]) and weight is not heads[1][name]


def test_raw_centres_of_another_width_than_the_image_features_are_refused(with_changes):
    with pytest.raises(
        ParamsError, match=r"centres is raw, but the text features of artifacts/text have 24 values and .* 64;"
    ):
        student.run(with_changes(RAW))


def test_missing_text_features_are_named_with_the_stage_to_run(with_changes):
    shutil.rmtree(TEXT)
    with pytest.raises(ParamsError, match=r"artifacts/text: .*run `dvc repro"):
        student.run(with_changes({}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text": None},
            "student.contrast_encoder is text, but section text is null; set it, such as to {encoder: features",
        ),
        (
            {"student.adapter": 0},
            "student.contrast_encoder is text, but student.adapter is 0 and the encoder is frozen",
        ),
        (
            {**RAW, "student.contrast_encoder": "teacher"},
            "student: contrast.centres is raw and contrast.sentences is mean",
        ),
        (
            {"student.contrast": {"kind": "supcon"}},
            "student: contrast_encoder is text, but contrast.kind supcon takes self",
        ),
        ({"student.sampling": 0.5, "student.adjustment": 0.0}, "student: sampling is 0.5, but adjustment is 0"),
        (
            {"student.sampling": 0.5, "student.alpha": 1.0, "teacher.adjustment": 0.0},
            "student.sampling is 0.5, but student.alpha is 1 and teacher.adjustment 0",
        ),
        (
            {"student.sampling": 0.5, "prior.weighting": "effective_number"},
            "student.sampling is 0.5, but prior.weighting",
        ),
    ],
)
def test_params_that_cannot_use_text_features_or_sampling_are_refused(with_changes, changes, message):
    with pytest.raises(ParamsError) as raised:
        with_changes(changes)
    assert message in str(raised.value)


def test_square_root_sampling_changes_the_drawn_images_and_the_prior_of_the_losses_with_them(with_changes, monkeypatch):
    orders, log_priors, whole = [], [], Training._order

    def recorded(self, images):
        objective = self.objective
        log_priors[:] = objective.log_prior, objective.loss.log_prior, objective.term.log_prior
        orders.append(self._train.labels[whole(self, images)])
        return torch.arange(images)

    monkeypatch.setattr(Training, "_order", recorded)
    made = with_changes({"student.sampling": 0.5, "student.epochs": 20})
    student.run(made)
    counts = np.array(load_prior().counts)
    shares = np.sqrt(counts) / np.sqrt(counts).sum()
    assert [log_prior.exp().numpy() for log_prior in log_priors] == [pytest.approx(shares, rel=1e-5)] * 3
    drawn = torch.cat(orders)
    assert ClassSampler(drawn, 3, 1.0).shares.numpy() == pytest.approx(shares, abs=4 * np.sqrt(0.25 / len(drawn)))
    # The adjusted logits are balanced, as those of Eq. 6 with every image once.
    assert json.loads((STUDENT / "config.json").read_text())["adjustment"] is None


@pytest.mark.parametrize("kind", ["ncm", "crt", "tau_norm", "lws"])
def test_second_stages_refit_the_classifier_of_a_student_with_text_centres(with_changes, kind):
    changes = {} if kind == "ncm" else {"classifier.epochs": 1}
    made = with_changes({**changes, "classifier.kind": kind, "data.validation_per_class": 10, "student.epochs": 1})
    student.run(made)
    classifier.run(made)
    assert (CLASSIFIER / "model.safetensors").is_file()


def test_the_memory_of_a_step_is_estimated_before_the_text_features_exist(with_changes):
    shutil.rmtree(TEXT)
    images = {"encoder": None, "teacher.backbone": "resnet20", "student.backbone": "resnet20", "student.adapter": 0}
    assert estimate_memory(with_changes(images), "student", load_prior()).peak > 0


def test_the_exported_graph_has_the_student_without_a_tensor_of_text(with_changes):
    made = with_changes({})
    student.run(made)
    model, config = load_model(STUDENT, "student")
    attach_encoder(model, config, made, STUDENT)
    served = ServedStudent(model, config.mean, config.std, load_prior().log_prior, [0.0] * 3).eval()
    graph = onnx.load_from_string(to_onnx(served, made.image.size, made.export.opset)).graph
    shapes = [tuple(tensor.dims) for tensor in graph.initializer]
    assert (3, 64) in shapes and [each.name for each in graph.output] == ["logits", "feature"]
    assert not any({WIDTH, made.student.projection_dim} & set(shape) for shape in shapes)
