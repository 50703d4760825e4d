"""Reasons of wrong answers for the report: most similar training images and activation maps of the most confident mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.networks.memory import choose_rows
from pipeline.data.dataset import AnyImages

SHOWN, NEAREST = 8, 4  # mistakes, and training images of each


@dataclass(frozen=True)
class Neighbour:
    """A training image: its row in the training split, its label, and the cosine of its feature."""

    row: int
    label: str
    cosine: float


@dataclass(frozen=True)
class Mistake:
    """A test image with a wrong answer: its row in the test split, both classes, the probability of the wrong one.

    map: class-activation map of the wrong class, float32 [h,w]; None without one.
    """

    row: int
    actual: str
    predicted: str
    probability: float
    nearest: list[Neighbour]
    map: np.ndarray | None = None


def confident_mistakes(
    features: Callable[[AnyImages, Tensor], Tensor],
    test: AnyImages,
    probabilities: np.ndarray,
    train: AnyImages | None,
    classes: list[str],
    most: int,
    maps: Callable[[Tensor, np.ndarray], np.ndarray | None] | None = None,
) -> list[Mistake]:
    """The SHOWN wrong answers of highest probability, each with its NEAREST training images, most similar first.

    features: from images and their rows to features [n,D] of the student. probabilities: [N,C] of the test images, as served.
    most: training images that are compared (serving.explain.images), at least one of each class; all classes have the same
    largest number of them, as in the feature index of a release. train: None for mistakes without training images. maps: from
    rows of the test images and a class for each to activation maps [n,h,w], or to None for a network without them.
    """
    labels, predicted = test.labels.numpy(), probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:SHOWN]
    if not len(wrong):
        return []
    nearest = _nearest(features, test, wrong, train, classes, most) if train else [[] for _ in wrong]
    wrong_maps = maps(torch.from_numpy(wrong), predicted[wrong]) if maps else None
    return [
        Mistake(
            int(row), classes[labels[row]], classes[predicted[row]], float(probabilities[row, predicted[row]]), near,
            None if wrong_maps is None else wrong_maps[index],
        )
        for index, (row, near) in enumerate(zip(wrong, nearest, strict=True))
    ]  # fmt: skip


def _nearest(
    features: Callable[[AnyImages, Tensor], Tensor],
    test: AnyImages,
    wrong: np.ndarray,
    train: AnyImages,
    classes: list[str],
    most: int,
) -> list[list[Neighbour]]:
    """The nearest training images of each row of `wrong`; arguments as of `confident_mistakes`."""
    chosen = choose_rows(train.labels, len(classes), max(most, len(classes)))
    ours, theirs = (
        F.normalize(features(images, rows), dim=1)
        for images, rows in ((test, torch.from_numpy(wrong)), (train, chosen))
    )
    cosines, nearest = (ours @ theirs.T).topk(min(NEAREST, len(chosen)), dim=1)
    return [
        [
            Neighbour(int(chosen[index]), classes[int(train.labels[chosen[index]])], float(cosine))
            for index, cosine in zip(indexes, values, strict=True)
        ]
        for indexes, values in zip(nearest.tolist(), cosines.tolist(), strict=True)
    ]
