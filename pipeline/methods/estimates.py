"""Intervals of accuracies and paired differences that include the spread between seeds and that of the test images."""

from __future__ import annotations

import numpy as np

from models.prior import GROUPS
from pipeline.evaluation.intervals import CONFIDENCE, NO_ESTIMATE, Estimate

MEASURES = ("all", *GROUPS)


def class_weights(groups: list[str], tested: np.ndarray) -> dict[str, np.ndarray]:
    """Weights [C] of the classes in each measure: equal over the classes with test images, of all or of a shot group.

    groups: shot group of each class. tested: int [C], test images of each class.
    """
    members = {name: (tested > 0) & ((np.array(groups) == name) | (name == "all")) for name in MEASURES}
    return {name: member / max(member.sum(), 1) for name, member in members.items()}


def estimate(values: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> Estimate:
    """Mean over seeds of the weighted mean of class means, with its interval of Student's t at CONFIDENCE.

    values: float [S,N] for S seeds and N test images: 1 where the prediction is correct, or the difference of two methods.
    labels: int [N]. weights: float [C] with the sum 1; 0 leaves a class out. The variance is that of the seeds over S plus
    that of the mean over seeds for other images of the same classes; its degrees of freedom are Satterthwaite's. Each class
    is given one more image with the moments of all images, as in `weighted_accuracy`. With one seed the interval leaves the
    spread of seeds out. All three are None without test images.
    """
    included = weights[labels] > 0
    if not included.any():
        return NO_ESTIMATE
    by_seed = seed_values(values, labels, weights)
    values, labels = values[:, included], labels[included]
    seeds, images = values.shape
    tested = np.bincount(labels, minlength=len(weights))
    value = float(by_seed.mean())
    between = float(by_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    within = _variance_of_images(values.mean(0), labels, weights, tested)
    total = between + within
    if total == 0:
        return Estimate(value, value, value)
    import scipy.stats  # in the extra `pipeline`

    freedom = total**2 / ((between**2 / (seeds - 1) if seeds > 1 else 0.0) + within**2 / max(images - 1, 1))
    half = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * total**0.5
    return Estimate(value, value - half, value + half)


def seed_values(values: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean of class means of each seed, float64 [S]. Arguments as in `estimate`."""
    tested = np.bincount(labels, minlength=len(weights))
    sums = np.stack([np.bincount(labels, row, len(weights)) for row in values])
    return np.asarray((sums / np.maximum(tested, 1)) @ weights)


def _variance_of_images(values: np.ndarray, labels: np.ndarray, weights: np.ndarray, tested: np.ndarray) -> float:
    """Variance of the weighted mean of class means of `values` [N] when the images of each class are drawn again."""
    share = weights[labels] / tested[labels]
    first, second = float(share @ values), float(share @ values**2)
    used = tested > 0
    means = (np.bincount(labels, values, len(weights))[used] + first) / (tested[used] + 1)
    squares = (np.bincount(labels, values**2, len(weights))[used] + second) / (tested[used] + 1)
    return max(0.0, float((weights[used] ** 2 * (squares - means**2) / tested[used]).sum()))


def accuracy_estimate(correct: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> Estimate:
    """`estimate` of an accuracy, whose interval ends at 0 and 1. correct: float [S,N], 0 or 1.

    Where all images are right or all wrong, the variance is 0. The other end of the interval is then that of Clopper and
    Pearson for as many images as have the variance of the weighted mean, 1 / sum of squared shares.
    """
    made = estimate(correct, labels, weights)
    if made.value is None or made.low is None or made.high is None:
        return made
    if made.high - made.low < 1e-9:
        share = (weights / np.maximum(np.bincount(labels, minlength=len(weights)), 1))[labels]
        bound = 1 - ((1 - CONFIDENCE) / 2) ** float((share**2).sum())
        return Estimate(made.value, *((0.0, bound) if made.value < 0.5 else (1 - bound, 1.0)))
    return Estimate(made.value, max(made.low, 0.0), min(made.high, 1.0))
