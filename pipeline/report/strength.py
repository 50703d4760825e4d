"""Accuracy by strength of the logit adjustment, for balanced test data and for test data with the training prior."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.prior import adjust_logits
from pipeline.data.class_prior import Prior
from pipeline.evaluation.metrics import GROUPS, count_correct

STRENGTHS = np.round(np.arange(-0.5, 1.5001, 0.05), 2)
MAX_LOGITS = 4_000_000  # largest number of logits adjusted in one step


@dataclass(frozen=True)
class StrengthRow:
    """Accuracies at one strength. balanced, train: over all test images, weighted by that prior."""

    strength: float
    balanced: float
    train: float
    many: float | None
    medium: float | None
    few: float | None


def strength_sweep(logits: np.ndarray, labels: np.ndarray, prior: Prior) -> list[StrengthRow]:
    """One row per strength. logits: balanced, [N,C]; labels: [N]. Classes without test images are excluded."""
    classes = len(prior.classes)
    tested = np.bincount(labels, minlength=classes)
    included = tested > 0
    p = np.where(included, np.array(prior.p), 0)
    groups = {name: included & (np.array(prior.groups) == name) for name in GROUPS}
    rows = []
    for strength, correct in zip(STRENGTHS, _correct_by_strength(logits, labels, prior), strict=True):
        accuracy = correct / np.maximum(tested, 1)
        by_group = {name: float(accuracy[of].mean()) if of.any() else None for name, of in groups.items()}
        balanced, train = accuracy[included].mean(), accuracy @ p / p.sum()
        rows.append(StrengthRow(float(strength), float(balanced), float(train), **by_group))
    return rows


def _correct_by_strength(logits: np.ndarray, labels: np.ndarray, prior: Prior) -> np.ndarray:
    """Number of correct predictions of each class at each of STRENGTHS: int [S,C]. Chunked, to bound memory."""
    classes, log_prior = len(prior.classes), np.array(prior.log_prior, dtype=np.float32)
    correct = np.zeros((len(STRENGTHS), classes), dtype=np.int64)
    rows = max(1, MAX_LOGITS // classes)
    for start in range(0, len(labels), rows):
        part, expected = logits[start : start + rows].astype(np.float32), labels[start : start + rows]
        for index, strength in enumerate(STRENGTHS.astype(np.float32)):
            predicted = adjust_logits(part, log_prior, strength).argmax(axis=1)
            correct[index] += count_correct(predicted, expected, classes)[0]
    return correct
