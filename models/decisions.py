"""Decisions from logits: the class of least expected cost, prediction sets that hold for every prior, unknown images, maps.

Imports only numpy, because the served classifier imports a copy of this file.

Prediction sets. The score of class y for an image x is its probability under the balanced prior, p(x | y) divided by the sum
over the classes. It is prevalence-adjusted softmax, p(y | x) / p(y), up to a constant (Ding et al. 2025, arXiv 2507.06867),
and it does not depend on the prior of a request. A set has the classes whose score reaches their threshold. A threshold is a
weighted mean of the quantile of the class's own validation scores and a quantile over all classes (Interp-Q of the same
paper); the weight of the own quantile grows with its images. Under label shift only the frequencies of the classes change, so a
class's own quantile is valid for every prior; the quantile over all classes weighs the scores of class y by q(y) / n_y for the
prior q of the request (Podkopaev and Ramdas 2021), so it is valid for q. Each of the two alone gives coverage 1 - a, and their
mean at least 1 - 2a for every prior; the report lists the measured coverage.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ASK = -1  # decision of `cheapest` that asks a person
ROUNDING = 1e-12  # of a sum of weights
LEAST_LENGTH = 1e-12  # a shorter feature is not divided by its length, as in torch.nn.functional.normalize
LARGEST_COST = float(np.finfo(np.float32).max)  # the expected cost in a response is float32


def check_costs(costs: Any, classes: int) -> Floats:
    """Check costs: float64 [C], of missing each class, or [C,C], of answering column k if row y is true.

    Raises ValueError that names the fault: another shape, a negative entry, one above LARGEST_COST or that is not finite.
    """
    c: Floats = np.asarray(costs, dtype=np.float64)
    if c.shape not in ((classes,), (classes, classes)):
        expected = f"{classes} numbers, one per class, or {classes} rows of {classes}"
        raise ValueError(f"costs has shape {list(c.shape)}; expected {expected}")
    valid = (c >= 0) & (c <= LARGEST_COST)  # False for NaN
    if not valid.all():
        raise ValueError(f"costs has {float(c[~valid][0]):g}; expected finite numbers >= 0, at most {LARGEST_COST:.4g}")
    return c


def cheapest(
    probabilities: Floats, costs: Floats | None, ask: float | Floats | None
) -> tuple[NDArray[np.int64], Floats]:
    """The class of least expected cost of each row, int [N], and that cost, float64 [N].

    probabilities: [N,C]. costs: of `check_costs`; None: 1 for every wrong class. ask: the price of asking a person, who knows
    the class, or one for each row; the decision is ASK where it is below the cost of every class (Chow 1970). None: never ask.
    """
    if costs is None:
        expected = 1 - probabilities
    elif costs.ndim == 1:
        missed = probabilities * costs
        expected = missed.sum(axis=1, keepdims=True) - missed
    else:
        expected = probabilities @ costs
    best = expected.argmin(axis=1)
    cost: Floats = np.maximum(expected.min(axis=1), 0)
    if ask is not None:
        best, cost = np.where(ask < cost, ASK, best), np.minimum(cost, ask)
    return best, cost


def largest_coverage(images: int) -> float:
    """The largest coverage that a quantile of n validation images can give, n / (n + 1): 0.9 needs 9 images, 0.99 needs 99."""
    return images / (images + 1)


def images_needed(coverage: float) -> int:
    """The least number of validation images with which a quantile gives a coverage above 0 and below 1."""
    return max(1, int(np.ceil(coverage / (1 - coverage) - 1e-6)))


class SetThresholds:
    """Validation scores of a release, from which thresholds follow for any coverage and prior.

    scores: for each class, the scores of its validation images, in any order. interpolation: least weight of a class's own
    quantile, 0 to 1. With n images where the quantile needs m, the weight is n / (n + m) if that is more.
    """

    def __init__(self, scores: Sequence[Sequence[float]], interpolation: float) -> None:
        self.by_class = [np.sort(np.asarray(values, dtype=np.float64)) for values in scores]
        self.counts = np.array([len(values) for values in scores])
        self.images, self.interpolation = int(self.counts.sum()), interpolation
        label = np.repeat(np.arange(len(scores)), self.counts)
        pooled = np.concatenate(self.by_class)
        order = np.argsort(pooled, kind="stable")
        self.pooled, self.label = pooled[order], label[order]

    def thresholds(self, coverage: float, prior: Floats, weight: float | None = None) -> Floats:
        """The least score with which each class is in the set, float64 [C]; infinite for a class of prior 0.

        coverage: above 0, at most `largest_coverage(images)`. prior: q, [C], sums to 1. A class with fewer images than its
        own quantile needs, 1 / (1 - coverage) - 1, has the own quantile 0, so it is in more sets and not in fewer. A class
        without images has no guarantee. weight: of every own quantile, to compare; None: as the class describes.
        """
        own, shared = self._own(1 - coverage), self._shared(1 - coverage, prior)
        by_images = np.maximum(self.interpolation, self.counts / (self.counts + images_needed(coverage)))
        part = by_images if weight is None else np.full(len(own), weight)
        mixed: Floats = part * own + (1 - part) * shared
        mixed[prior <= 0] = np.inf
        return mixed

    def _own(self, miss: float) -> Floats:
        """Quantile of each class's own scores (split conformal prediction, Vovk's class-conditional form)."""
        # At most n: a coverage below ROUNDING would name the score after the last one.
        rank = np.minimum(np.floor(miss * (self.counts + 1) + ROUNDING).astype(int), self.counts)
        return np.array([values[k - 1] if k else 0.0 for values, k in zip(self.by_class, rank, strict=True)])

    def _shared(self, miss: float, prior: Floats) -> Floats:
        """Weighted quantile over all scores for each class as that of the new image, [C]."""
        covered = prior[self.counts > 0].sum()
        if covered <= 0:
            return np.zeros(len(prior))
        # The new image counts as one more of its class; a class without images counts as if it had one.
        weight = prior / np.maximum(self.counts, 1) / covered
        below = np.concatenate([[0.0], np.cumsum(weight[self.label])[:-1]])  # weight of the scores below each one
        budget = miss - (1 - miss) * weight
        rank = np.searchsorted(below, budget + ROUNDING, side="right") - 1
        return np.where(budget >= -ROUNDING, self.pooled[np.maximum(rank, 0)], 0.0)


def prediction_set(balanced: Floats, probabilities: Floats, thresholds: Floats) -> list[NDArray[np.int64]]:
    """The classes in the set of each row, most probable first; at least the most probable one.

    balanced: probabilities [N,C] under the balanced prior, the scores. probabilities: [N,C] under the prior of the request.
    thresholds: [C], or [N,C] for one prior per row.
    """
    inside, order = members_of(balanced, probabilities, thresholds)
    return [row[members[row]] for row, members in zip(order, inside, strict=True)]


def members_of(
    balanced: Floats, probabilities: Floats, thresholds: Floats, order: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """The sets of `prediction_set` as a mask [N,C], and the order of the classes by probability, [N,C], if it is not given."""
    inside = balanced >= thresholds
    if order is None:
        order = np.argsort(-probabilities, axis=1, kind="stable")
    inside[np.arange(len(inside)), order[:, 0]] = True
    return inside, order


def familiarity(balanced_logits: Floats, log_prior: Floats) -> Floats:
    """log sum_c p(c) exp(logit_c) of each row, [N]: the log-density of the image up to a constant, low for unknown ones.

    balanced_logits: calibrated, [N,C]; log_prior: of the training data, [C], whatever prior a request names. It is the
    negative energy of Liu et al. 2020 with the training prior: rare classes add little to the density of an image that
    resembles none.
    """
    adjusted = balanced_logits + log_prior
    top = adjusted.max(axis=1)
    density: Floats = top + np.log(np.exp(adjusted - top[:, None]).sum(axis=1))
    return density


class Typicality:
    """Compares an image's familiarity with that of the validation images whose predicted class has the same shot group.

    scores: group → familiarity of its validation images, in any order. groups: shot group of each class, [C].
    """

    def __init__(self, scores: Mapping[str, Sequence[float]], groups: Sequence[str]) -> None:
        self.groups = np.asarray(groups)
        # Lists and bisect: a request has few images, and each numpy call has a fixed cost.
        self.sorted = {
            group: np.sort(np.asarray(values, dtype=np.float64)).tolist() for group, values in scores.items()
        }

    def __call__(self, density: Floats, predicted: NDArray[np.integer[Any]]) -> Floats:
        """Share of the validation images that are at most as familiar, (1 + rank) / (1 + n), float64 [N].

        density: of `familiarity`, [N]; predicted: class under the balanced prior, [N]. For known images it is at most f with
        a probability of at most f (a conformal p-value), so f is the rate of false alarms. In a group with fewer than
        1 / f - 1 validation images it is never at most f.
        """
        share = np.ones(len(density))
        for row, (group, value) in enumerate(zip(self.groups[predicted].tolist(), density.tolist(), strict=True)):
            if values := self.sorted.get(group):
                share[row] = (1 + bisect_right(values, value)) / (1 + len(values))
        return share


def activation_maps(
    matrix: NDArray[np.floating[Any]], cells: NDArray[np.floating[Any]], chosen: NDArray[np.integer[Any]], unit: bool
) -> NDArray[np.float32]:
    """Class-activation map of class chosen[i] for each image i, float32 [n,h,w]: M_c·f_p / |f| at position p.

    matrix: the class matrix M [C,D]. cells: the map f_p of features [n,D,h,w], with the mean f, the feature. unit: whether the
    classifier is a cosine one; a linear one has M_c·f_p (CAM, Zhou et al., CVPR 2016). The mean over the positions is the
    balanced logit of the class without calibration and bias. A map of zeros stays zero.
    """
    values: Floats = np.einsum("nd,ndhw->nhw", matrix[chosen], cells.astype(np.float64))
    if unit:
        lengths = np.linalg.norm(cells.mean(axis=(2, 3), dtype=np.float64), axis=1)
        values /= np.maximum(lengths, LEAST_LENGTH)[:, None, None]
    return values.astype(np.float32)
