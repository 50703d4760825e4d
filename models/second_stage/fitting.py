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
    give it for 1,000 classes and features of length 30; see `fit`. balanced: an image is drawn by its class, each of which is
    equally likely; otherwise each image is drawn once an epoch.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    balanced: bool = False
    least_steps: int = LEAST_STEPS


class TrainingFeatures(NamedTuple):
    """features: [N,V,D] of V views of each training image, any float type; labels: [N] int64; classes: C."""

    features: Tensor
    labels: Tensor
    classes: int


def fit(trained: Trained, loss: Loss, data: TrainingFeatures, recipe: Recipe, seed: int) -> None:
    """Minimise `loss` over the tensors of `trained`, which are changed in place; on their device, in float32.

    In a step, each image has one of its views, drawn at random, scaled to the length NORM. The gradient of a class's row is
    the mean over the batch, of which the class is a share of 1/C: the learning rate is the recipe's times C / 1000, so that
    one recipe fits ten classes and ten thousand. Images of an epoch that do not fill a batch are left out. Raises
    NotFiniteError.
    """
    generator, count = torch.Generator().manual_seed(seed), len(data.labels)
    batch = min(recipe.batch_size, max(LEAST_BATCH, count // STEPS_OF_AN_EPOCH), count)
    steps = count // batch
    rate = recipe.learning_rate * data.classes / REFERENCE_CLASSES
    groups = [{"params": [tensor.requires_grad_()], "lr": rate * factor} for tensor, factor in trained]
    optimiser = torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=recipe.weight_decay)
    epochs = max(recipe.epochs, math.ceil(recipe.least_steps / steps))
    total, device = epochs * steps, trained[0][0].device
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (1 + math.cos(math.pi * step / total)) / 2)
    balanced = ClassSampler(data.labels, data.classes) if recipe.balanced else None
    for _ in range(epochs):
        order = balanced.draw(steps * batch, generator) if balanced else torch.randperm(count, generator=generator)
        for rows in order[: steps * batch].view(steps, batch):
            views = torch.randint(data.features.shape[1], (batch,), generator=generator)
            features = data.features[rows, views].to(device).float()
            optimiser.zero_grad()
            loss(NORM * F.normalize(features, dim=1), data.labels[rows].to(device)).backward()
            optimiser.step()
            schedule.step()
    for tensor, _ in trained:
        tensor.requires_grad_(False)
        if not tensor.isfinite().all():
            raise NotFiniteError("a trained value is not finite")
