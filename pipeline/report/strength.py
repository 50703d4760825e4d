"""Accuracy by strength of the logit adjustment, for balanced test data and for test data with the training prior."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.prior import adjust_logits
from pipeline.data.class_prior import Prior
from pipeline.evaluation.metrics import GROUPS

STRENGTHS = np.round(np.arange(-0.5, 1.5001, 0.05), 2)
ROWS = 4_000_000  # largest number of logits adjusted in one step


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
    there = tested > 0
    p = np.where(there, np.array(prior.p), 0)
    groups = {name: there & (np.array(prior.groups) == name) for name in GROUPS}
    rows = []
    for strength, right in zip(STRENGTHS, right_by_strength(logits, labels, prior), strict=True):
        accuracy = right / np.maximum(tested, 1)
        by_group = {name: float(accuracy[of].mean()) if of.any() else None for name, of in groups.items()}
        rows.append(
            StrengthRow(float(strength), float(accuracy[there].mean()), float(accuracy @ p / p.sum()), **by_group)
        )
    return rows


def right_by_strength(logits: np.ndarray, labels: np.ndarray, prior: Prior) -> np.ndarray:
    """Number of correct predictions of each class at each of STRENGTHS: int [S,C]. Chunked, to bound memory."""
    classes, log_prior = len(prior.classes), np.array(prior.log_prior, dtype=np.float32)
    right = np.zeros((len(STRENGTHS), classes), dtype=np.int64)
    at_once = max(1, ROWS // classes)
    for first in range(0, len(labels), at_once):
        part, wanted = logits[first : first + at_once].astype(np.float32), labels[first : first + at_once]
        for place, strength in enumerate(STRENGTHS.astype(np.float32)):
            found = adjust_logits(part, log_prior, strength).argmax(axis=1)
            right[place] += np.bincount(wanted[found == wanted], minlength=classes)
    return right
