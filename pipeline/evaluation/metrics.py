"""Classification metrics for one target prior: accuracy, top-k, NLL, ECE. A group without samples has None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from models.prior import GROUPS, adjust_logits, softmax
from models.sample_size import as_json, sample_sizes

MAX_VALUES = 4_000_000  # largest number of probabilities compared in one step


def adjusted_probabilities(logits: np.ndarray, log_prior: np.ndarray, strength: float) -> np.ndarray:
    """Probabilities [N,C] of the adjusted logits; strength 0 is the balanced target prior, 1 the training prior."""
    return softmax(adjust_logits(logits, log_prior, strength))


def count_correct(predicted: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of correct predictions and of samples of each class, int [C] each."""
    return np.bincount(labels[predicted == labels], minlength=classes), np.bincount(labels, minlength=classes)


def per_class_accuracy(predicted: np.ndarray, labels: np.ndarray, classes: int) -> list[float | None]:
    """Share of correct predictions of each class; None for a class without samples."""
    correct, tested = count_correct(predicted, labels, classes)
    return [float(c / t) if t else None for c, t in zip(correct, tested, strict=True)]


def mean_of(values: list[float | None]) -> float | None:
    """Mean of the values that are not None; None if there are none."""
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None


def top_k_accuracy(probabilities: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of samples whose label is among the k most probable classes; k above C counts all.

    Of equal probabilities the lower class index comes first. The rank of the label is counted instead of sorting, which
    takes a tenth of the time at ten thousand classes.
    """
    ranks = np.empty(len(labels), dtype=np.int64)
    rows = max(1, MAX_VALUES // probabilities.shape[1])
    for start in range(0, len(labels), rows):
        p, y = probabilities[start : start + rows], labels[start : start + rows]
        label_p = p[np.arange(len(y)), y][:, None]
        equal_before = (p == label_p) & (np.arange(p.shape[1]) < y[:, None])
        ranks[start : start + rows] = ((p > label_p) | equal_before).sum(axis=1)
    return float((ranks < k).mean())


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Weighted mean of -log p(label), in nats; p is at least 1e-12, so that a p of 0 does not make it infinite."""
    p = probabilities[np.arange(len(labels)), labels]
    return float(np.average(-np.log(np.maximum(p, 1e-12)), weights=weights))


def confidence_bins(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> tuple[np.ndarray, ...]:
    """Equal-width confidence bin (a, b], confidence, and 1.0 if correct else 0.0, of each prediction; all [N]."""
    confidence = probabilities.max(axis=1)
    correct = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1), confidence, correct


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, bins: int, weights: np.ndarray | None = None
) -> float:
    """ECE (Naeini 2015, Guo 2017): weighted mean over the confidence bins of |accuracy - confidence|."""
    weights = np.ones(len(labels)) if weights is None else weights
    index, confidence, correct = confidence_bins(probabilities, labels, bins)
    gap = np.bincount(index, weights * (correct - confidence), minlength=bins)
    return float(np.abs(gap).sum() / weights.sum())


def prediction_metrics(
    probabilities: np.ndarray, labels: np.ndarray, groups: list[str], target_prior: np.ndarray, *, bins: int, top_k: int
) -> dict[str, Any]:
    """Compute all metrics of one set of predictions.

    probabilities [N,C], labels [N], groups: shot group of each class, target_prior [C]. `many`, `medium` and `few` are
    means of per-class accuracies. `at_target_prior` weighs the samples as if the test set followed the target prior,
    for which the logits were adjusted; the other metrics weigh all test samples equally. `test_images`: for all classes
    and for each group that has classes, the number of test images and whether it is too small.
    """
    classes = len(groups)
    predicted = probabilities.argmax(axis=1)
    by_class = per_class_accuracy(predicted, labels, classes)
    in_group = {group: [by_class[c] for c in range(classes) if groups[c] == group] for group in GROUPS}
    tested = np.bincount(labels, minlength=classes)
    weights = target_prior[labels] / tested[labels]
    return {
        "all": float((predicted == labels).mean()),
        **{group: mean_of(values) for group, values in in_group.items()},
        "balanced_accuracy": mean_of(by_class),
        f"top{top_k}": top_k_accuracy(probabilities, labels, top_k),
        "nll": negative_log_likelihood(probabilities, labels),
        "ece": expected_calibration_error(probabilities, labels, bins),
        "at_target_prior": {
            "all": float(np.average(predicted == labels, weights=weights)),
            "nll": negative_log_likelihood(probabilities, labels, weights),
            "ece": expected_calibration_error(probabilities, labels, bins, weights),
        },
        "test_images": as_json(sample_sizes(tested, groups)),
    }


def resampled_ece(
    probabilities: np.ndarray, labels: np.ndarray, bins: int, weights: np.ndarray | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """Function that maps resampled row indices [..., N] to ECE [...]; equal to `expected_calibration_error`."""
    weights = np.ones(len(labels)) if weights is None else weights
    bin_index, confidence, correct = confidence_bins(probabilities, labels, bins)
    gap = weights * (correct - confidence)

    def ece(index: np.ndarray) -> np.ndarray:
        rows = np.atleast_2d(index)
        cells = bin_index[rows] + bins * np.arange(len(rows))[:, None]
        sums = np.bincount(cells.ravel(), gap[rows].ravel(), minlength=bins * len(rows)).reshape(len(rows), bins)
        return (np.abs(sums).sum(axis=1) / weights[rows].sum(axis=1)).reshape(index.shape[:-1])

    return ece
