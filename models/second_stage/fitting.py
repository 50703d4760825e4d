"""Train a few tensors on stored features: stochastic gradient descent with a balanced or a plain sampler."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.class_sampler import ClassSampler

NORM = 30.0  # length of the features that the classifier is trained on; pooled features of a ResNet-50 have about this length
REFERENCE_CLASSES = 1000
MOMENTUM = 0.9
LEAST_STEPS = 1000  # in all; the recipes of the papers, for a hundred thousand images, have as many
STEPS_OF_AN_EPOCH = 20  # at least: a batch is smaller where images are few
LEAST_BATCH = 16

Trained = Sequence[tuple[Tensor, float]]  # tensors, each with its learning rate as a multiple of the recipe's
Loss = Callable[[Tensor, Tensor], Tensor]  # features [B,D] of length NORM and labels [B] → scalar


class NotFiniteError(ValueError):
    """A trained value is not finite."""


@dataclass(frozen=True)
class Recipe:
    """How a head is trained: SGD with momentum 0.9 and a cosine learning rate.

    epochs: of N / batch_size steps; more of them if these are fewer than least_steps steps in all. learning_rate: as papers
    give it for 1,000 classes and features of length 30; see `rate_of`. balanced: an image is drawn by its class, each of which
    is equally likely; otherwise each image is drawn once an epoch.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    balanced: bool = False
    least_steps: int = LEAST_STEPS


Watch = Callable[[int, int, int], None]  # number of the step from 1, all steps, images of a batch


@dataclass(frozen=True)
class Fit:
    """A fit of one head: its recipe, its seed, the device, and what is called after each step."""

    recipe: Recipe
    seed: int
    device: torch.device
    watch: Watch | None = None


class TrainingFeatures(NamedTuple):
    """features: [N,V,D] of V views of each training image, any float type; labels: [N] int64; classes: C."""

    features: Tensor
    labels: Tensor
    classes: int

    def batch(self, rows: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
        """Features [B,D] of the images `rows` on the device: one view of each, drawn at random, of length NORM."""
        views = torch.randint(self.features.shape[1], (len(rows),), generator=generator)
        return scaled(self.features[rows, views].to(device))


def scaled(features: Tensor) -> Tensor:
    """Features [...,D] in float32 at the length NORM."""
    return NORM * F.normalize(features.float(), dim=-1)


@dataclass(frozen=True)
class Head:
    """A linear classifier: weight [C,D] for features of length NORM, and bias [C]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Logits [B,C] of features [B,D]."""
        return F.linear(features, self.weight, self.bias)

    def stepped(self, loss: Tensor, rate: float) -> Head:
        """The head after a virtual step of gradient descent; differentiable with respect to what `loss` depends on."""
        weight, bias = torch.autograd.grad(loss, (self.weight, self.bias), create_graph=True)
        return Head(self.weight - rate * weight, self.bias - rate * bias)


@dataclass(frozen=True)
class Length:
    """How long a fit is: epochs of `steps` steps of `batch` images."""

    epochs: int
    steps: int
    batch: int

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.epochs * self.steps


def length_of(recipe: Recipe, images: int) -> Length:
    """Length of a fit: batches are smaller where images are few, and epochs more until there are least_steps steps."""
    batch = min(recipe.batch_size, max(LEAST_BATCH, images // STEPS_OF_AN_EPOCH), images)
    steps = images // batch
    return Length(max(recipe.epochs, math.ceil(recipe.least_steps / steps)), steps, batch)


def rate_of(recipe: Recipe, classes: int) -> float:
    """Learning rate of a fit.

    The gradient of a class's row is the mean over the batch, of which the class is a share of 1/C: the rate is the recipe's
    times C / 1000, so that one recipe fits ten classes and ten thousand.
    """
    return recipe.learning_rate * classes / REFERENCE_CLASSES


def fit(trained: Trained, loss: Loss, data: TrainingFeatures, how: Fit) -> None:
    """Minimise `loss` over the tensors of `trained`, which are changed in place; on their device, in float32.

    In a step, each image has one of its views, drawn at random, scaled to the length NORM. Images of an epoch that do not
    fill a batch are left out. Raises NotFiniteError.
    """
    generator, count, recipe = torch.Generator().manual_seed(how.seed), len(data.labels), how.recipe
    length, rate = length_of(recipe, count), rate_of(recipe, data.classes)
    groups = [{"params": [tensor.requires_grad_()], "lr": rate * factor} for tensor, factor in trained]
    optimiser = torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=recipe.weight_decay)
    total, device = length.total, trained[0][0].device
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (1 + math.cos(math.pi * step / total)) / 2)
    balanced = ClassSampler(data.labels, data.classes) if recipe.balanced else None
    used = length.steps * length.batch
    for epoch in range(length.epochs):
        order = balanced.draw(used, generator) if balanced else torch.randperm(count, generator=generator)
        for step, rows in enumerate(order[:used].view(length.steps, length.batch), epoch * length.steps + 1):
            features = data.batch(rows, device, generator)
            optimiser.zero_grad()
            loss(features, data.labels[rows].to(device)).backward()
            optimiser.step()
            schedule.step()
            if how.watch:
                how.watch(step, total, length.batch)
    for tensor, _ in trained:
        tensor.requires_grad_(False)
        if not tensor.isfinite().all():
            raise NotFiniteError("a trained value is not finite")
