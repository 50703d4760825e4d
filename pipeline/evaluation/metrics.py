"""Classification metrics for one target prior: accuracy, top-k, NLL, ECE. A group without samples has None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from models.prior import GROUPS, adjust_logits, softmax
from models.sample_size import as_json, sample_sizes

AT_ONCE = 4_000_000  # largest number of probabilities compared in one step


def answers(logits: np.ndarray, log_prior: np.ndarray, strength: float) -> np.ndarray:
    """Probabilities [N,C] of the adjusted logits; strength 0 is the balanced target prior, 1 the training prior."""
    return softmax(adjust_logits(logits, log_prior, strength))


def per_class_accuracy(predicted: np.ndarray, labels: np.ndarray, classes: int) -> list[float | None]:
    """Share of correct predictions of each class; None for a class without samples."""
    total = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[predicted == labels], minlength=classes)
    return [float(r / t) if t else None for r, t in zip(right, total, strict=True)]


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
    at_once = max(1, AT_ONCE // probabilities.shape[1])
    for first in range(0, len(labels), at_once):
        p, y = probabilities[first : first + at_once], labels[first : first + at_once]
        of_label = p[np.arange(len(y)), y][:, None]
        before = (p == of_label) & (np.arange(p.shape[1]) < y[:, None])
        ranks[first : first + at_once] = ((p > of_label) | before).sum(axis=1)
    return float((ranks < k).mean())


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Weighted mean of -log p(label), in nats; p is at least 1e-12, so that a p of 0 does not make it infinite."""
    p = probabilities[np.arange(len(labels)), labels]
    return float(np.average(-np.log(np.maximum(p, 1e-12)), weights=weights))


def confidence_bins(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> tuple[np.ndarray, ...]:
    """Equal-width confidence bin (a, b], confidence, and 1.0 if correct else 0.0, of each prediction; all [N]."""
    confidence = probabilities.max(axis=1)
    right = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1), confidence, right


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, bins: int, weights: np.ndarray | None = None
) -> float:
    """ECE (Naeini 2015, Guo 2017): weighted mean over the confidence bins of |accuracy - confidence|."""
    weights = np.ones(len(labels)) if weights is None else weights
    index, confidence, right = confidence_bins(probabilities, labels, bins)
    gap = np.bincount(index, weights * (right - confidence), minlength=bins)
    return float(np.abs(gap).sum() / weights.sum())


def evaluate_answers(
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


def calibration_of(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> Callable[[np.ndarray], np.ndarray]:
    """Function that maps resampled row indices [..., N] to ECE [...]; equal to `expected_calibration_error`."""
    bin_index, confidence, right = confidence_bins(probabilities, labels, bins)
    gap = right - confidence

    def error(index: np.ndarray) -> np.ndarray:
        rows = np.atleast_2d(index)
        bin_of = bin_index[rows] + bins * np.arange(len(rows))[:, None]
        sums = np.bincount(bin_of.ravel(), gap[rows].ravel(), minlength=bins * len(rows)).reshape(len(rows), bins)
        return (np.abs(sums).sum(axis=1) / rows.shape[1]).reshape(index.shape[:-1])

    return error
