"""Reliability diagram and calibration error, before and after temperature scaling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.prior import calibrate_logits, softmax
from pipeline.evaluation.intervals import Estimate, bootstrap
from pipeline.evaluation.metrics import (
    confidence_bins,
    expected_calibration_error,
    negative_log_likelihood,
    resampled_ece,
)

ECE_RESAMPLES = 500


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions whose confidence is in (low, high]: their number, mean confidence and accuracy."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class ReliabilityCurve:
    """Calibration of one set of probabilities: the bins that are not empty, ECE, NLL in nats."""

    bins: list[ReliabilityBin]
    ece: Estimate
    nll: float


@dataclass(frozen=True)
class Reliability:
    """Calibration of the balanced logits and of logits / temperature.

    after, temperature: None without a temperature.
    """

    before: ReliabilityCurve
    after: ReliabilityCurve | None
    temperature: float | None


def reliability(logits: np.ndarray, labels: np.ndarray, temperature: float | None, bins: int) -> Reliability:
    """Calibration on the test split: logits [N,C], labels [N]. temperature: fitted on validation. bins: number of bins."""
    before = _calibration(softmax(logits), labels, bins)
    after = None
    if temperature is not None:
        after = _calibration(softmax(calibrate_logits(logits, temperature)), labels, bins)
    return Reliability(before, after, temperature)


def _calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> ReliabilityCurve:
    index, confidence, correct = confidence_bins(probabilities, labels, bins)
    counts = np.bincount(index, minlength=bins)
    sums = [np.bincount(index, weights=values, minlength=bins) for values in (confidence, correct)]
    nonempty = [
        ReliabilityBin(b / bins, (b + 1) / bins, int(n), *(float(total[b] / n) for total in sums))
        for b, n in enumerate(counts)
        if n
    ]
    value = expected_calibration_error(probabilities, labels, bins)
    ece = Estimate(value, *bootstrap(resampled_ece(probabilities, labels, bins), len(labels), ECE_RESAMPLES))
    return ReliabilityCurve(nonempty, ece, negative_log_likelihood(probabilities, labels))
