"""Confusion pairs, confusion matrix, and the least and most accurate classes, with example test images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.class_prior import Prior
from pipeline.evaluation.intervals import Estimate, wilson
from pipeline.evaluation.metrics import count_correct

PAIRS, CLASSES, IMAGES = 12, 6, 4  # shown: confusion pairs, least and most accurate classes, images of each
MATRIX = 30  # largest number of classes in the confusion matrix


@dataclass(frozen=True)
class ConfusionPair:
    """Test images of class `actual` predicted as `predicted`: count, share of the class, and rows of some of them."""

    actual: str
    predicted: str
    count: int
    share: float
    rows: list[int]


@dataclass(frozen=True)
class ConfusionMatrix:
    """counts[i][j]: test images of class i that were predicted as class j; tested[i]: all test images of class i."""

    classes: list[str]
    counts: list[list[int]]
    tested: list[int]


@dataclass(frozen=True)
class ClassResult:
    """A class with its accuracy and Wilson interval; rows of some test images and their predicted classes, errors first."""

    name: str
    group: str
    train_count: int
    test_count: int
    accuracy: Estimate
    rows: list[int]
    predicted: list[str]


def confusion_pairs(predicted: np.ndarray, labels: np.ndarray, prior: Prior) -> list[ConfusionPair]:
    """At most PAIRS pairs of confused classes, sorted by count / sqrt(test images of the actual class)."""
    wrong = np.flatnonzero(predicted != labels)
    classes = len(prior.classes)
    tested = np.bincount(labels, minlength=classes)
    codes, counts = np.unique(labels[wrong].astype(np.int64) * classes + predicted[wrong], return_counts=True)
    actual, confused = codes // classes, codes % classes
    # The share alone would put classes with few test images first: one mistake of two images is a share of 0.5.
    order = np.lexsort((codes, -counts / np.sqrt(tested[actual])))[:PAIRS]
    return [
        ConfusionPair(
            prior.classes[a], prior.classes[b], int(n), float(n / tested[a]),
            wrong[(labels[wrong] == a) & (predicted[wrong] == b)][:IMAGES].tolist(),
        )
        for a, b, n in zip(actual[order], confused[order], counts[order], strict=True)
    ]  # fmt: skip


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, prior: Prior) -> ConfusionMatrix:
    """Counts of test images by actual and predicted class; the class with the most training images is first.

    With more than MATRIX classes, only those with the most mistakes.
    """
    classes = len(prior.classes)
    wrong = predicted != labels
    mistakes = np.bincount(labels[wrong], minlength=classes) + np.bincount(predicted[wrong], minlength=classes)
    order = np.argsort(-np.array(prior.counts), kind="stable")
    shown = order if classes <= MATRIX else order[np.isin(order, np.argsort(-mistakes, kind="stable")[:MATRIX])]
    index = np.full(classes, -1)
    index[shown] = np.arange(len(shown))
    included = (index[labels] >= 0) & (index[predicted] >= 0)
    counts = np.zeros((len(shown), len(shown)), dtype=np.int64)
    np.add.at(counts, (index[labels[included]], index[predicted[included]]), 1)
    tested = np.bincount(labels, minlength=classes)[shown]
    return ConfusionMatrix([prior.classes[c] for c in shown], counts.tolist(), tested.tolist())


def extreme_classes(
    predicted: np.ndarray, labels: np.ndarray, prior: Prior
) -> tuple[list[ClassResult], list[ClassResult]]:
    """The classes with the lowest and the highest accuracy, at most CLASSES each, disjoint; ties by training images."""
    correct, tested = count_correct(predicted, labels, len(prior.classes))
    accuracy, counts, classes = correct / np.maximum(tested, 1), np.array(prior.counts), np.flatnonzero(tested)
    order = classes[np.lexsort((counts[classes], accuracy[classes]))]
    shown = min(CLASSES, len(order) // 2)

    def result(c: int) -> ClassResult:
        rows = np.flatnonzero(labels == c)
        rows = rows[np.argsort(predicted[rows] == c, kind="stable")][:IMAGES]
        return ClassResult(
            prior.classes[c], prior.groups[c], prior.counts[c], int(tested[c]), wilson(int(correct[c]), int(tested[c])),
            rows.tolist(), [prior.classes[p] for p in predicted[rows]],
        )  # fmt: skip

    return [result(c) for c in order[:shown]], [result(c) for c in order[::-1][:shown]]
