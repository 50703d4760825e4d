"""Students with several experts: trained by stage `student`, then evaluated, exported and checked as any other student."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import pipeline.classifier
import pipeline.evaluate
import pipeline.export
import pipeline.prior
import pipeline.split
import pipeline.student
import pipeline.teacher
from models.objectives.experts import expert_logits
from pipeline.data.class_prior import Prior
from pipeline.model_io.checkpoint import load_model
from pipeline.preparation.gpu_memory import estimate_memory
from pipeline.shared.artifacts import EVALUATION, EXPORT, STUDENT, TEACHER
from pipeline.shared.errors import ParamsError
from tests.support.making import data_params, folder, params

LDAM = {"kind": "ldam", "class_balance": 0.9999, "after": 0.5, "average": "weights"}
KINDS = {
    "ride": {"experts": {"kind": "ride", "count": 2}, "loss": LDAM, "adjustment": 0.0},
    "sade": {"experts": {"kind": "sade"}},
    "ncl": {"experts": {"kind": "ncl", "count": 2}},
    "reslt": {"experts": {"kind": "reslt"}, "classifier": {"kind": "linear"}},
    "bbn": {"experts": {"kind": "bbn"}, "classifier": {"kind": "linear"}},
}


def recipe(data=None, **student):
    """Return params of a short student with experts."""
    short = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01}
    chosen = {f"student.{key}": value for key, value in {**short, "beta": 0.0, "alpha": 0.0, **student}.items()}
    teacher = {f"teacher.{key}": value for key, value in {**short, "epochs": 1}.items()}
    return params({**(data or {}), **teacher, **chosen, "export.golden": 2, "evaluate.samples": 2})


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Data keys for a folder of 39 images in three classes; split and prior are finished."""
    monkeypatch.chdir(tmp_path)
    source = folder(tmp_path / "images", {"a": 18, "b": 12, "c": 9})
    data = {f"data.{key}": value for key, value in data_params(source).model_dump(mode="json")["data"].items()}
    pipeline.split.run(recipe(data))
    pipeline.prior.run(recipe(data))
    return data


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_with_experts_is_trained_without_a_teacher_and_loaded(made, kind):
    pipeline.student.run(recipe(made, **KINDS[kind]))
    assert not TEACHER.exists()
    model, config = load_model(STUDENT, "student")
    images = torch.rand(2, 3, 16, 16)
    if kind != "bbn":
        experts = expert_logits(model, images)
        assert experts.shape == (2, 2 if kind in ("ride", "ncl") else 3, 3)
        together = experts.sum(1) if kind == "reslt" else experts.mean(1)
        assert torch.allclose(model(images)[1], together, atol=1e-4)
    assert config.adjustment == (1.0 if kind == "ncl" else None)
    losses = [json.loads(line)["loss"] for line in (STUDENT / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "second_stage"), [("ride", "none"), ("sade", "crt"), ("reslt", "none"), ("bbn", "lws")]
)
def test_second_stage_evaluation_and_export_take_a_student_with_experts(made, kind, second_stage):
    chosen = recipe({**made, "classifier.kind": second_stage}, **KINDS[kind])
    for stage in (pipeline.teacher, pipeline.student, pipeline.classifier, pipeline.evaluate, pipeline.export):
        stage.run(chosen)
    manifest = json.loads((EXPORT / "manifest.json").read_text())
    assert manifest["feature_dim"] == {"ride": 2 * 48, "sade": 3 * 48, "reslt": 64, "bbn": 2 * 64}[kind]
    card = (EVALUATION / "model_card.md").read_text()
    assert re.search(r"resnet20 with [23] experts (on|after) one (trunk|feature map)", card)
    assert {"ride": "RIDE", "sade": "SADE", "reslt": "ResLT", "bbn": "BBN"}[kind] in card


def test_the_memory_estimate_counts_every_expert():
    prior = Prior(["a", "b", "c"], [18, 12, 9], [0.5, 0.3, 0.2], [-0.7, -1.2, -1.6], ["few"] * 3)
    one = estimate_memory(recipe(), "student", prior)
    three = estimate_memory(recipe(experts={"kind": "ncl", "count": 3}), "student", prior)
    assert 2.5 * one.largest["weights"] < three.largest["weights"] < 3.5 * one.largest["weights"]
    assert three.peak > 2 * one.peak
    for kind in ("ride", "sade", "reslt", "bbn"):
        assert estimate_memory(recipe(**KINDS[kind]), "student", prior).peak > one.peak


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("ride", {"alpha": 1.0}, "alpha is 1.0, but experts are set; set alpha: 0"),
        ("sade", {"beta": 1.0}, "beta is 1.0, but experts are set; set beta: 0"),
        ("ncl", {"augment.mix": "cutmix"}, "augment.mix is cutmix, but experts need one label per image"),
        ("ride", {"classifier": {"kind": "linear"}, "loss": {"kind": "focal"}}, r"set classifier: \{kind: cosine\}"),
        ("reslt", {"classifier": {"kind": "cosine"}}, r"set classifier: \{kind: linear\}"),
        ("sade", {"loss": LDAM, "adjustment": 0.0}, "experts.kind is sade, which has its own loss"),
        ("ncl", {"adjustment": 0.0}, "adjustment 0, but experts.kind is ncl, which has its own loss"),
        ("reslt", {"accumulate": 2}, "accumulate is 2, but experts.kind is reslt, whose loss divides by a sum"),
        ("ride", {"accumulate": 2}, "loss.average is weights, a sum over the whole batch"),
        ("ride", {"experts": {"kind": "ride", "count": 1}}, "student.experts.count is 1; .* greater than or equal to 2"),
        ("ride", {"experts": {"kind": "ride", "diversty": 1}}, r"did you mean student\.experts\.diversity\?"),
        ("reslt", {"experts": {"kind": "reslt", "leave_out": [0.7, 0.3]}}, "expected two rising shares below 1"),
    ],
)  # fmt: skip
def test_params_that_do_not_fit_experts_are_refused(kind, changes, message):
    with pytest.raises(ParamsError, match=message):
        recipe(**{**KINDS[kind], **changes})


def test_experts_on_the_stored_features_of_an_encoder_are_refused():
    encoder = {"encoder": {"name": "efficientnet_lite0"}, "teacher.backbone": "encoder"}
    with pytest.raises(ParamsError, match="backbone is encoder, whose features are stored, but experts are branches"):
        recipe(encoder, **KINDS["sade"], backbone="encoder")


def test_a_backbone_that_cannot_be_split_is_refused_before_the_teacher_is_trained(made):
    chosen = recipe(made, **KINDS["sade"], backbone="torchvision/mobilenet_v2")
    with pytest.raises(ParamsError, match=r"torchvision/mobilenet_v2 cannot be split .* student\.experts\.kind: ncl"):
        pipeline.teacher.run(chosen)


def test_a_branch_without_classes_is_refused(made):
    chosen = recipe(made, **{**KINDS["reslt"], "experts": {"kind": "reslt", "leave_out": [0.3, 0.9]}})
    with pytest.raises(ParamsError, match="leaves no class of 3 to the third branch"):
        pipeline.student.run(chosen)
    assert not Path("artifacts/student").exists()


@pytest.mark.slow
def test_a_second_batch_is_refused_for_a_stream(made):
    chosen = recipe({**made, "stream.mode": "on"}, **KINDS["bbn"])
    with pytest.raises(ParamsError, match=r"student draws a second batch in each step; set stream\.mode: off"):
        pipeline.student.run(chosen)
