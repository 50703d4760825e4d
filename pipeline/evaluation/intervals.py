"""Confidence intervals of accuracies and of the calibration error: Wilson's, stratified and percentile bootstrap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from models.label_shift import interval

CONFIDENCE = 0.95
RESAMPLES = 2000
MAX_VALUES = 4_000_000  # largest number of resampled rows, or classes, in memory


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval; all three are None if there are no samples."""

    value: float | None
    low: float | None
    high: float | None


NO_ESTIMATE = Estimate(None, None, None)


def wilson(correct: int, total: int) -> Estimate:
    """A proportion and its score interval (Wilson 1927), whose coverage holds for few samples and near 0 and 1."""
    if not total:
        return NO_ESTIMATE
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, scale = correct / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * np.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / scale
    # The bounds at 0 and 1 are exact; rounding would move them.
    low, high = float(centre - half), float(centre + half)
    return Estimate(share, 0.0 if correct == 0 else low, 1.0 if correct == total else high)


def weighted_accuracy(correct: np.ndarray, tested: np.ndarray, weights: np.ndarray, *, seed: int = 0) -> Estimate:
    """Σ weight · accuracy over the classes, with its bootstrap interval; the weights are normalised to sum to 1.

    correct, tested: int [C], correct and all test samples of each class. weights: [C]; equal weights give the mean of
    class accuracies, a prior gives the accuracy at that target prior. Test sets have a fixed number of samples per
    class, so resampling is stratified by class, and the number of correct samples of a class is binomial. A class with
    few samples often has accuracy 0 or 1, and its resamples would have no variance. Each class is therefore drawn as if
    it had one more sample, correct with the probability of the mean accuracy, and the deviation of a draw from its
    expectation is added to the value. Classes without samples are excluded. If all samples are correct, or none, the
    interval is Wilson's, of all samples together.
    """
    included = (tested > 0) & (weights > 0)
    if not included.any():
        return NO_ESTIMATE
    r, n, w = correct[included], tested[included], weights[included] / weights[included].sum()
    if r.sum() in (0, n.sum()):
        return wilson(int(r.sum()), int(n.sum()))
    value = float((r / n) @ w)
    p = (r + value) / (n + 1)
    generator = np.random.default_rng(seed)

    def draw(count: int) -> np.ndarray:
        return np.clip((generator.binomial(n, p, (count, len(n))) / n - p) @ w + value, 0, 1)

    return Estimate(value, *_percentiles(draw, len(n), RESAMPLES, CONFIDENCE))


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    samples: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of samples; statistic: sample indices int [B,N] → [B]."""
    generator = np.random.default_rng(seed)
    return _percentiles(
        lambda count: statistic(generator.integers(0, samples, (count, samples))), samples, resamples, confidence
    )


def _percentiles(
    draw: Callable[[int], np.ndarray], width: int, resamples: int, confidence: float
) -> tuple[float, float]:
    """Bounds of the central share `confidence` of `resamples` draws.

    draw: count → float [count]; each value uses `width` numbers, which bounds the count of one call.
    """
    most = max(1, MAX_VALUES // width)
    values = [draw(min(most, resamples - start)) for start in range(0, resamples, most)]
    low, high = interval(np.concatenate(values), confidence)
    return float(low), float(high)
