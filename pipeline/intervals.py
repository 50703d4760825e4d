"""How much of a figure may be chance: intervals of accuracies and of the calibration error. numpy and the standard library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
AT_ONCE = 4_000_000  # resampled rows, or classes, in memory at a time


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval; all None where there is nothing to measure."""

    value: float | None
    low: float | None
    high: float | None


NOTHING = Estimate(None, None, None)


def wilson(right: int, total: int, confidence: float = CONFIDENCE) -> Estimate:
    """A share and its score interval (Wilson 1927), which keeps its promise for few samples and near 0 and 1."""
    if not total:
        return NOTHING
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = right / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * np.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / scale
    # The bounds of 0 and of 1 are exact; rounding would put them beside.
    low, high = float(centre - half), float(centre + half)
    return Estimate(share, 0.0 if right == 0 else low, 1.0 if right == total else high)


def weighted_accuracy(
    right: np.ndarray, tested: np.ndarray, weights: np.ndarray, *, seed: int = 0, confidence: float = CONFIDENCE
) -> Estimate:
    """Σ weight · accuracy over the classes, with its bootstrap interval; the weights are made to sum to 1.

    right, tested: int [C], samples of each class that were right, and that there are. weights: [C]; equal ones give the
    mean of class accuracies, a prior gives the accuracy at that target prior. Test sets have a fixed number of samples a
    class, so samples are drawn anew within each class, and a class's right ones among them are then a binomial number.
    A class of few samples is often all right or all wrong, and would then never be drawn otherwise: each is drawn as if it
    had one sample more, right to the share of the mean, and what is drawn beyond its expectation is added to the figure.
    Classes without samples are left out. Where every sample is right, or none, no draw differs: the interval is then
    Wilson's, of all samples together.
    """
    there = (tested > 0) & (weights > 0)
    if not there.any():
        return NOTHING
    r, n, w = right[there], tested[there], weights[there] / weights[there].sum()
    if r.sum() in (0, n.sum()):
        return wilson(int(r.sum()), int(n.sum()), confidence)
    value = float((r / n) @ w)
    p = (r + value) / (n + 1)
    generator, found = np.random.default_rng(seed), []
    at_once = max(1, AT_ONCE // len(n))
    for first in range(0, RESAMPLES, at_once):
        drawn = generator.binomial(n, p, (min(at_once, RESAMPLES - first), len(n)))
        found.append(np.clip((drawn / n - p) @ w + value, 0, 1))
    return Estimate(value, *percentiles(np.concatenate(found), confidence))


def resampled(
    statistic: Callable[[np.ndarray], np.ndarray], samples: int, value: float, resamples: int = 500
) -> Estimate:
    """A figure of samples with its percentile bootstrap interval; statistic: rows int [B,N] → [B]."""
    generator, found = np.random.default_rng(0), []
    at_once = max(1, AT_ONCE // samples)
    for first in range(0, resamples, at_once):
        found.append(statistic(generator.integers(0, samples, (min(at_once, resamples - first), samples))))
    return Estimate(value, *percentiles(np.concatenate(found)))


def percentiles(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The central share `confidence` of bootstrap values [B]: its bounds."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
