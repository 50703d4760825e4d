"""How much of a figure may be chance: intervals of accuracies and of the calibration error. numpy and the standard library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from models.label_shift import interval

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
    class, so samples are drawn again within each class, and the number of a class's right ones among them is binomial.
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
    generator = np.random.default_rng(seed)

    def draw(count: int) -> np.ndarray:
        return np.clip((generator.binomial(n, p, (count, len(n))) / n - p) @ w + value, 0, 1)

    return Estimate(value, *_percentiles(draw, len(n), RESAMPLES, confidence))


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
    """Bounds of the central share `confidence` of so many draws; draw: count → [count], from `width` numbers each."""
    at_once = max(1, AT_ONCE // width)
    values = [draw(min(at_once, resamples - first)) for first in range(0, resamples, at_once)]
    low, high = interval(np.concatenate(values), confidence)
    return float(low), float(high)
