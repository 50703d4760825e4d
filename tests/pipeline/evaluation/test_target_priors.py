"""Target priors `balanced` and `train` are independent of the loss's prior and strength: test on three Gaussians.

The network is constructed, not trained: its logits are the minimum of L_cls, log p(c | x) - strength * log_prior.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch import Tensor, nn

import pipeline.evaluate
import pipeline.export
import pipeline.prior
import pipeline.split
import pipeline.student
import pipeline.teacher
from models.networks.cosine_classifier import ImageClassifier
from models.objectives.student import StudentObjective
from models.objectives.student_weights import StudentWeights
from models.prior import effective_number, log_class_prior
from pipeline.data.class_prior import Prior
from pipeline.data.dataset import Images, load_images, normalise
from pipeline.evaluation.network_metrics import network_metrics
from pipeline.model_io.checkpoint import load_model
from pipeline.model_io.inference import accuracy, balanced_logits
from pipeline.onnx_export.graph import ServedStudent
from pipeline.onnx_export.release import open_session
from pipeline.shared.artifacts import EVALUATION, EXPORT, PRIOR, STUDENT
from serving.repository.manifest import read_manifest
from tests.support.making import data_params, folder, params

COUNTS = [9000, 900, 100]
MEANS = torch.tensor([-1.5, 0.0, 1.5])  # of unit variance
P = torch.tensor(COUNTS) / sum(COUNTS)
TAU_S = 1 / 200  # so small that all logits lie within ±1/tau_s
IMAGE = params({"image.size": 8, "image.resize_to": 8}).image
POINTS = 500  # per class
PRIORS = {
    "frequency": log_class_prior(COUNTS).tolist(),
    "effective_number": log_class_prior(effective_number(COUNTS, 0.999)).tolist(),
}


def phi(z: float) -> float:
    """Return the standard normal distribution function."""
    return (1 + math.erf(z / math.sqrt(2))) / 2


# Decision boundaries: -0.75 and 0.75 by likelihood; with the prior they shift by log p1/p2 / 1.5.
BALANCED = (2 * phi(0.75) + (phi(0.75) - phi(-0.75))) / 3
BORDERS = -0.75 + math.log(10) / 1.5, 0.75 + math.log(9) / 1.5
BAYES_BY_CLASS = [phi(BORDERS[0] + 1.5), phi(BORDERS[1]) - phi(BORDERS[0]), 1 - phi(BORDERS[1] - 1.5)]


def points() -> tuple[Tensor, Tensor]:
    """Return quantiles of each class as images uint8 [N,3,8,8] with x as 16 bits in two channels, and labels [N]."""
    quantiles = torch.special.ndtri((torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS)
    x = (MEANS[:, None] + quantiles).flatten()
    code = ((x + 8) * 4000).round().long()
    images = torch.stack([code // 256, code % 256, torch.zeros_like(code)], 1).to(torch.uint8)
    return images[:, :, None, None].expand(-1, -1, 8, 8).contiguous(), torch.arange(3).repeat_interleave(POINTS)


class Minimum(nn.Module):
    """Backbone whose features have cosines with the three unit class vectors of tau_s times the minimum of L_cls."""

    def __init__(self, log_prior: list[float], strength: float) -> None:
        super().__init__()
        self.offset = P.log() - strength * torch.tensor(log_prior)

    def forward(self, image: Tensor) -> Tensor:
        pixels = (image[:, :, 0, 0] * torch.tensor(IMAGE.std) + torch.tensor(IMAGE.mean)) * 255
        x = (pixels[:, :1] * 256 + pixels[:, 1:2]) / 4000 - 8
        logits = x * MEANS - MEANS**2 / 2 + self.offset
        logits = (logits - logits.mean(1, keepdim=True)) * TAU_S
        return torch.cat([logits, (1 - logits.square().sum(1, keepdim=True)).sqrt()], 1)


def network(log_prior: list[float], strength: float) -> ImageClassifier:
    model = ImageClassifier("resnet20", 3, TAU_S)
    model.backbone = Minimum(log_prior, strength)
    model.classifier.weight = nn.Parameter(torch.eye(3, 4))
    return model.eval()


def by_class(logits: Tensor) -> list[float]:
    right = (logits.argmax(1).view(3, POINTS) == torch.arange(3)[:, None]).double()
    return right.mean(1).tolist()


@pytest.mark.parametrize("weighting", PRIORS)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
def test_balanced_and_train_mean_the_same_for_every_strength_and_prior_in_the_loss(strength, weighting):
    images, labels = points()
    inside = PRIORS[weighting]
    prior = Prior(list("abc"), COUNTS, P.tolist(), P.log().tolist(), ["many"] * 3, inside)
    model, shift = network(inside, strength), prior.balanced_shift(strength)
    cpu = torch.device("cpu")

    served = ServedStudent(model, IMAGE.mean, IMAGE.std, prior.log_prior, shift.tolist()).eval()
    with torch.inference_mode():
        answered = {s: served(images, torch.full((len(images), 1), s))[0] for s in (0.0, 1.0)}
    assert np.mean(by_class(answered[0.0])) == pytest.approx(BALANCED, abs=2e-3)  # 69.8 %
    assert by_class(answered[1.0]) == pytest.approx(BAYES_BY_CLASS, abs=3e-3)

    evaluated = balanced_logits(model, images, IMAGE, cpu, shift).numpy()
    metrics = network_metrics(evaluated, labels.numpy(), prior, params().evaluate)
    assert metrics["balanced"]["balanced_accuracy"] == pytest.approx(BALANCED, abs=2e-3)
    assert metrics["train"]["at_target_prior"]["all"] == pytest.approx(float(np.dot(P, BAYES_BY_CLASS)), abs=3e-3)
    assert np.allclose(evaluated, answered[0.0], rtol=0, atol=1e-3)

    data = Images(images, labels, ["-"] * len(images), ["-"] * len(images), source=None)
    assert accuracy(model, data, IMAGE, cpu, shift) == pytest.approx(BALANCED, abs=2e-3)


@pytest.mark.parametrize(("taught", "learnt"), [(0.0, 1.0), (1.0, 0.0), (1.0, 2.0), (0.5, 0.5)])
def test_the_minimum_of_l_cls_minimises_distillation_for_every_adjustment_of_the_teacher(taught, learnt):
    images, labels = points()
    inside = PRIORS["effective_number"]
    objective = StudentObjective(
        network(inside, learnt), network(inside, taught), torch.tensor(inside), COUNTS,
        StudentWeights(1.0, 0.0, 1.0, 4.0, 1.0, learnt), tau_g=0.1, train_tau_g=True, queue_total=9, queue_minimum=3,
        projection_dim=2, teacher_adjustment=taught,
    )  # fmt: skip
    parts = objective(normalise(images, IMAGE)[None], labels, torch.arange(len(labels)))
    assert parts["distillation"] == pytest.approx(0, abs=1e-6)


def test_the_balanced_shift_of_eq_6_is_exactly_zero():
    prior = Prior(list("abc"), COUNTS, P.tolist(), PRIORS["frequency"], ["many"] * 3)
    assert prior.balanced_shift(1.0).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.slow
def test_evaluation_and_exported_graph_give_balanced_logits_after_plain_cross_entropy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = folder(tmp_path / "images", {"a": 18, "b": 12, "c": 9})
    keys = {f"data.{key}": value for key, value in data_params(source).model_dump(mode="json")["data"].items()}
    short = {"epochs": 1, "batch_size": 8, "learning_rate": 0.01, "adjustment": 0.0}
    keys |= {f"{stage}.{key}": value for stage in ("teacher", "student") for key, value in short.items()}
    recipe = params({**keys, "student.queue_total": 24, "prior.weighting": "effective_number", "serving.top_k": 3})
    for stage in (
        pipeline.split,
        pipeline.prior,
        pipeline.teacher,
        pipeline.student,
        pipeline.evaluate,
        pipeline.export,
    ):
        stage.run(recipe)

    counts = np.array(json.loads(PRIOR.read_text())["counts"])
    log_p = np.log(counts / counts.sum())
    model, _ = load_model(STUDENT, "student")
    test = load_images(recipe.data, recipe.image, "test")
    with torch.inference_mode():
        cosines = model(normalise(test.images, recipe.image))[1].numpy()
    session = open_session(EXPORT / "student.onnx")
    served = [
        session.run(["logits"], {"image": test.images.numpy(), "strength": np.full((len(test), 1), s, np.float32)})[0]
        for s in (0.0, 1.0)
    ]
    evaluated = np.array(pyarrow.parquet.read_table(EVALUATION / "predictions.parquet")["logits"].to_pylist())
    assert np.allclose(evaluated, cosines - log_p, rtol=0, atol=1e-4)
    assert np.allclose(served[0], cosines - log_p, rtol=0, atol=2e-4)
    assert np.allclose(served[1], cosines, rtol=0, atol=2e-4)
    assert read_manifest(EXPORT).log_prior == pytest.approx(log_p.tolist())
