"""Time of training teacher and student on stored features, and of scikit-learn's LogisticRegression to the same loss.

The features are generated: 21,549 of width 1,280 in 200 classes with the sizes of Tiny-ImageNet-LT. A feature is the mean of
its class plus noise, and not negative, like those of an EfficientNet. Sections teacher and student are those of a recipe, the
teacher with the batch size and the learning rate that `tailor init` proposes for the number of images; the student has
GML_STUDENT if the recipe has no contrast term. The loss is the cross-entropy of balanced logits on the training
features, with equal weight for each class; LogisticRegression with class_weight="balanced" minimises the same loss. It runs
with a growing number of iterations until its loss is at most that of the teacher; the time is that of the last run. Accuracy is
the mean of per-class accuracies on other features of the same distribution.
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from benchmarks.accuracy import merged
from benchmarks.encoder_projects import gml_params
from models.networks.cosine_classifier import ImageClassifier
from models.prior import class_prior, shot_group
from pipeline.data.class_prior import Prior
from pipeline.features.stored import FeatureImages
from pipeline.model_io.checkpoint import build_model
from pipeline.model_io.inference import balanced_logits
from pipeline.params import Params, TrainingParams, parse_params
from pipeline.params.recipe import apply_recipe
from pipeline.preparation.encoder_choice import proposed_batch
from pipeline.training.engine import Training
from pipeline.training.run import model_config, teacher_objective
from pipeline.training.student_setup import student_objective, weights_of

ROOT = Path(__file__).parents[1]
CLASSES, WIDTH, TEST_PER_CLASS = 200, 1280, 20
COUNTS = [int(500 * 0.01 ** (c / (CLASSES - 1))) for c in range(CLASSES)]  # as in Tiny-ImageNet-LT: 21,549
ITERATIONS = (5, 10, 20, 40, 80, 160, 320, 640)
GOALS = {"teacher": 8.0, "student": 90.0}  # seconds on two idle cores
ENCODER: dict[str, Any] = {"name": "generated", "sha256": "0" * 64, "width": WIDTH}


def generated(counts: list[int], generator: torch.Generator, means: Tensor) -> FeatureImages:
    """Generate features around `means` [C,D], with `counts` images per class."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    features = (means[labels] + torch.randn(len(labels), means.shape[1], generator=generator)).relu().half()
    names = [str(number) for number in range(len(labels))]
    return FeatureImages(features[:, None], labels, names, names, None, ENCODER)


def prior_of(counts: list[int]) -> Prior:
    """Return the class prior of the counts."""
    p = class_prior(counts, 0.0)
    names = [f"class {c}" for c in range(len(counts))]
    return Prior(names, counts, p.tolist(), np.log(p).tolist(), [shot_group(count) for count in counts])


class Heads:
    """Trains teacher and student of a recipe on one set of features."""

    def __init__(self, recipe: Path) -> None:
        text, _ = apply_recipe([recipe], ROOT / "params.yaml")
        self.params: Params = gml_params(parse_params(yaml.safe_load(text), recipe))
        generator = torch.Generator().manual_seed(0)
        means = 0.35 * torch.randn(CLASSES, WIDTH, generator=generator)
        self.train = generated(COUNTS, generator, means)
        self.test = generated([TEST_PER_CLASS] * CLASSES, generator, means)
        self.prior = prior_of(COUNTS)
        listed = self.params.teacher
        batch = proposed_batch(len(self.train) // 8, listed.batch_size)
        rate = listed.learning_rate * batch / listed.batch_size
        self.params = merged(self.params, {"teacher": {"batch_size": batch, "learning_rate": rate}})

    def teacher(self) -> ImageClassifier:
        """Train the teacher."""
        section = self.params.teacher
        config = model_config(section, self.params.image, CLASSES, ENCODER)
        return self._fit("teacher", section, teacher_objective(section, config, self.prior, 0))

    def student(self, teacher: ImageClassifier) -> ImageClassifier:
        """Train the student."""
        section = self.params.student
        network = build_model(model_config(section, self.params.image, CLASSES, ENCODER), "student.backbone")
        weights = weights_of(section)
        frozen = teacher if weights.needs_teacher(section.contrast_encoder) else None
        return self._fit("student", section, student_objective(section, weights, self.prior, network, frozen, 1.0))

    def _fit(self, name: str, section: TrainingParams, objective: Any) -> ImageClassifier:
        training = Training(name, objective, section, self.params.image, 0, torch.device("cpu"))
        none = generated([0] * CLASSES, torch.Generator(), torch.zeros(CLASSES, WIDTH))
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            training.run(self.train, none)
        return training.model

    def score(self, model: ImageClassifier) -> tuple[float, float]:
        """Return the balanced loss on the training features, and the accuracy on the test features."""
        device = torch.device("cpu")
        logits = [balanced_logits(model, split.images[:, 0], self.params.image, device) for split in self._splits]
        return self.balanced_loss(logits[0]), self.accuracy(logits[1])

    @property
    def _splits(self) -> tuple[FeatureImages, FeatureImages]:
        return self.train, self.test

    def balanced_loss(self, logits: Tensor) -> float:
        """Return the cross-entropy of balanced logits [N,C] of the training features, with equal weight for each class."""
        losses = F.cross_entropy(logits.double(), self.train.labels, reduction="none")
        weight = 1 / (torch.tensor(COUNTS)[self.train.labels] * CLASSES)
        return float((losses * weight).sum())

    def accuracy(self, logits: Tensor) -> float:
        """Return the share of correct predictions on the test features. All classes have the same number of them."""
        return float((logits.argmax(1) == self.test.labels).double().mean())

    def logistic_regression(self, loss: float) -> tuple[float, int, float, float]:
        """Return seconds and iterations until the balanced loss is at most `loss`, the loss reached, and the accuracy."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        mean, deviation = self.train.images[:, 0].float().mean(0), self.train.images[:, 0].float().std(0) + 1e-6
        train, test = (((split.images[:, 0].float() - mean) / deviation).numpy() for split in self._splits)
        for iterations in ITERATIONS:
            model = LogisticRegression(C=1.0, class_weight="balanced", max_iter=iterations)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                took, _ = timed(lambda model=model: model.fit(train, self.train.labels.numpy()))
            reached = self.balanced_loss(torch.from_numpy(model.decision_function(train)))
            if reached <= loss:
                break
        return took, iterations, reached, self.accuracy(torch.from_numpy(model.decision_function(test)))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall-clock seconds of a call, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def report(recipe: Path) -> bool:
    """Print the times and losses; returns whether the goals are met."""
    heads = Heads(recipe)
    # The first optimiser of a process imports PyTorch's compiler, once per training stage.
    started, _ = timed(lambda: torch.optim.SGD([torch.zeros(1, requires_grad=True)]))
    teacher_seconds, teacher = timed(heads.teacher)
    student_seconds, student = timed(lambda: heads.student(teacher))
    print(f"{len(heads.train):,} features of {WIDTH:,} values, {CLASSES} classes; {torch.get_num_threads()} threads")
    rows = {"teacher": (teacher_seconds, teacher), "student": (student_seconds, student)}
    for name, (seconds, model) in rows.items():
        section: TrainingParams = getattr(heads.params, name)
        loss, right = heads.score(model)
        print(
            f"{name}: {seconds:.1f} s for {section.epochs} epochs in batches of {section.batch_size}, goal "
            f"{GOALS[name]:g} s; balanced loss {loss:.4f}, accuracy {right:.1%}"
        )
    goal, right = heads.score(teacher)
    seconds, iterations, loss, other = heads.logistic_regression(goal)
    print(
        f"LogisticRegression: {seconds:.1f} s for {iterations} iterations; balanced loss {loss:.4f}, accuracy {other:.1%}"
    )
    print(f"import of the first optimiser: {started:.1f} s")
    return all(rows[name][0] <= seconds for name, seconds in GOALS.items()) and teacher_seconds <= seconds
