"""Calibration of the probabilities, before and after temperature scaling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.calibration import fit_temperature
from models.prior import softmax
from pipeline.evaluation.intervals import Estimate, bootstrap
from pipeline.evaluation.metrics import (
    calibration_of,
    confidence_bins,
    expected_calibration_error,
    negative_log_likelihood,
)

ECE_RESAMPLES = 500


@dataclass(frozen=True)
class ReliabilityBin:
    """Answers whose probability of the first class is in (low, high]: how many, that probability's mean, the share right."""

    low: float
    high: float
    answers: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibrated:
    """One side of the diagram: the bins that hold answers, the calibration error, NLL in nats."""

    bins: list[ReliabilityBin]
    ece: Estimate
    nll: float


@dataclass(frozen=True)
class Reliability:
    """Balanced answers as they are, and of logits / temperature; after and temperature are None without validation data."""

    before: Calibrated
    after: Calibrated | None
    temperature: float | None


def reliability(
    logits: np.ndarray, labels: np.ndarray, validation: tuple[np.ndarray, np.ndarray] | None, bins: int
) -> Reliability:
    """The test split's diagram. validation: logits [M,C] and labels [M] that the temperature is fitted on (Guo 2017)."""
    before = _side(softmax(logits), labels, bins)
    try:
        temperature = fit_temperature(*validation) if validation and len(validation[1]) else None
    except ValueError:  # a network that learnt nothing has no temperature
        temperature = None
    after = None if temperature is None else _side(softmax(logits / temperature), labels, bins)
    return Reliability(before, after, temperature)


def _side(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> Calibrated:
    index, confidence, right = confidence_bins(probabilities, labels, bins)
    counts = np.bincount(index, minlength=bins)
    sums = [np.bincount(index, weights=values, minlength=bins) for values in (confidence, right)]
    found = [
        ReliabilityBin(b / bins, (b + 1) / bins, int(n), *(float(total[b] / n) for total in sums))
        for b, n in enumerate(counts)
        if n
    ]
    value = expected_calibration_error(probabilities, labels, bins)
    ece = Estimate(value, *bootstrap(calibration_of(probabilities, labels, bins), len(labels), ECE_RESAMPLES))
    return Calibrated(found, ece, negative_log_likelihood(probabilities, labels))
