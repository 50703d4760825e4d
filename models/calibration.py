"""Calibration of logits by bias-corrected temperature scaling, as the estimation of label shift requires.

Imports only numpy, like models/prior.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.prior import Floats, calibrate_logits, check_target_prior, softmax
from models.sample_size import SampleSize, sample_size

Labels = NDArray[np.integer[Any]]
MINIMUM_IMAGES = (
    30  # validation images for a temperature; its standard error is then .25 (10 classes, accuracy 66 %), with 100 .13
)


@dataclass(frozen=True)
class Calibration:
    """Calibration parameters: logits / temperature + bias; bias float64 [C] with mean 0.

    size: of the samples used for the fit.
    """

    temperature: float
    bias: Floats
    size: SampleSize | None = None


def calibrate(logits: Any, calibration: Calibration) -> Floats:
    """Calibrated logits, float64 [N,C]: logits / temperature + bias."""
    calibrated: Floats = calibrate_logits(
        np.asarray(logits, dtype=np.float64), calibration.temperature, calibration.bias
    )
    return calibrated


def fit_calibration(
    logits: Any, labels: Any, source_prior: Any = None, *, ridge: float = 1e-3, max_iterations: int = 100
) -> Calibration:
    """Fit temperature and biases by least cross-entropy on labelled held-out logits (BCTS, Alexandari 2020).

    logits: [N,C], not used in training; labels: [N] in 0..C-1. source_prior: [C], the class prior of the calibrated
    logits; None is uniform. Samples are weighted as if the labels followed source_prior, so that a long-tailed
    validation set does not add its own prior to the biases. ridge: penalty on half the squared biases; it keeps the
    bias finite for a class without samples or without errors. The objective is convex in 1/temperature and bias; it is
    minimised by Newton's method with step halving. Raises ValueError for invalid arguments, for logits that carry no
    information about the labels (no positive temperature is optimal), and when the search has not converged after
    max_iterations.
    """
    scores, y = _check(logits, labels)
    if not ridge > 0:
        raise ValueError(f"ridge is {ridge}; expected a number above 0")
    weights = _weights(y, scores.shape[1], source_prior)
    # An offset of a row does not change softmax, but it changes the products in the Hessian.
    scores = scores - scores.max(axis=1, keepdims=True)
    unit = float(np.abs(scores).mean()) or 1.0  # so that the slope is about 1 at any scale of the logits
    slope, bias = _newton(scores / unit, y, weights, ridge, max_iterations)
    if slope <= 1e-6:
        raise ValueError("logits do not grow with the labels' probability; no temperature calibrates them")
    return Calibration(unit / slope, bias - bias.mean(), sample_size(np.bincount(y)))


def fit_temperature(
    logits: Any, labels: Any, source_prior: Any = None, *, shrinkage: float = 0.0, max_iterations: int = 100
) -> float:
    """Fit only the temperature by least cross-entropy on labelled logits (Guo et al. 2017); predictions do not change.

    Method of Sec. 4.2. Arguments as in `fit_calibration`, without biases. With one parameter no Hessian over the
    classes is needed, so the fit is also cheap for ten thousand classes. shrinkage: factor of the penalty
    (1/temperature - 1)^2 / 2; with few images or without an error in them it keeps the temperature near 1. The objective is
    convex in 1/temperature; it is minimised by Newton's method with step halving. Raises ValueError as `fit_calibration` does.
    """
    scores, y = _check(logits, labels)
    weights = _weights(y, scores.shape[1], source_prior)
    scores = scores - scores.max(axis=1, keepdims=True)
    unit = float(np.abs(scores).mean()) or 1.0
    scores /= unit
    none = np.zeros(scores.shape[1])

    def loss(slope: float) -> float:
        penalty = shrinkage / 2 * (slope / unit - 1) ** 2
        return _loss(scores, y, weights, 0.0, np.concatenate([[slope], none])) + penalty

    slope, value = 1.0, loss(1.0)
    for _ in range(max_iterations):
        p = softmax(slope * scores)
        expected = (p * scores).sum(axis=1)
        gradient = float(weights @ (expected - scores[np.arange(len(y)), y])) + shrinkage * (slope / unit - 1) / unit
        curvature = float(weights @ (p * (scores - expected[:, None]) ** 2).sum(axis=1)) + shrinkage / unit**2 + 1e-9
        step, size = gradient / curvature, 1.0
        if gradient * step < 1e-12:
            break
        while True:
            new_slope = slope - size * step
            candidate = loss(new_slope)
            if candidate <= value - 1e-4 * size * gradient * step or size < 1e-10:
                break
            size /= 2
        slope, value = new_slope, candidate
    if slope <= 1e-6:
        raise ValueError("logits do not grow with the labels' probability; no temperature calibrates them")
    return unit / slope


def fit_served_temperature(logits: Any, labels: Any) -> Calibration | None:
    """Fit the temperature that a release applies to its balanced logits, without biases; None if no useful one exists.

    logits: [N,C] balanced, of validation images; labels: [N]. Only a temperature: it has one parameter for any number of
    classes, and it changes no class under the balanced prior. Images are weighted as if their classes were equally frequent.
    The penalty of `fit_temperature` counts as one image. None with fewer than MINIMUM_IMAGES images, and for logits that
    carry no information about the labels.
    """
    if len(labels) < MINIMUM_IMAGES:
        return None
    classes = np.asarray(logits).shape[1]
    size = sample_size(np.bincount(labels, minlength=classes))
    try:
        temperature = fit_temperature(logits, labels, shrinkage=1 / size.effective)
    except ValueError:  # no temperature calibrates an untrained network
        return None
    return Calibration(temperature, np.zeros(classes), size)


def _check(logits: Any, labels: Any) -> tuple[Floats, Labels]:
    scores, y = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 2 or scores.shape[1] < 2 or y.shape != scores.shape[:1] or not len(y):
        raise ValueError(f"logits has shape {list(scores.shape)} and labels {list(y.shape)}; expected [N, C] and [N]")
    if not np.all(np.isfinite(scores)):
        raise ValueError("logits has an entry that is not finite")
    if y.min() < 0 or y.max() >= scores.shape[1]:
        raise ValueError(f"labels has {y.min()} to {y.max()}; expected 0 to {scores.shape[1] - 1}")
    return scores, y


def _weights(labels: Labels, classes: int, source_prior: Any) -> Floats:
    source = np.full(classes, 1 / classes) if source_prior is None else check_target_prior(source_prior, classes)
    counts = np.bincount(labels, minlength=classes)
    weights: Floats = source[labels] / counts[labels]
    weights /= weights.sum()
    return weights


def _loss(scores: Floats, y: Labels, weights: Floats, ridge: float, theta: Floats) -> float:
    z = theta[0] * scores + theta[1:]
    top = z.max(axis=1)
    nll = top + np.log(np.exp(z - top[:, None]).sum(axis=1)) - z[np.arange(len(y)), y]
    return float(weights @ nll + ridge / 2 * (theta[1:] ** 2).sum())


def _newton(scores: Floats, y: Labels, weights: Floats, ridge: float, max_iterations: int) -> tuple[float, Floats]:
    classes = scores.shape[1]
    theta = np.concatenate([[1.0], np.zeros(classes)])
    value = _loss(scores, y, weights, ridge, theta)
    for _ in range(max_iterations):
        gradient, hessian = _derivatives(scores, y, weights, ridge, theta)
        step = np.linalg.solve(hessian, gradient)
        decrement = float(gradient @ step)
        if decrement < 1e-12:
            return float(theta[0]), theta[1:]
        size = 1.0
        while (candidate := _loss(scores, y, weights, ridge, theta - size * step)) > value - 1e-4 * size * decrement:
            size /= 2
            if size < 1e-10:  # only rounding errors remain
                return float(theta[0]), theta[1:]
        theta, value = theta - size * step, candidate
    raise ValueError(f"max_iterations is {max_iterations}, too few for this calibration; raise it or ridge ({ridge})")


def _derivatives(scores: Floats, y: Labels, weights: Floats, ridge: float, theta: Floats) -> tuple[Floats, Floats]:
    p = softmax(theta[0] * scores + theta[1:])
    error = p.copy()
    error[np.arange(len(y)), y] -= 1
    expected = (p * scores).sum(axis=1, keepdims=True)
    weighted = weights[:, None] * p
    gradient = np.concatenate([[weights @ (error * scores).sum(axis=1)], weights @ error + ridge * theta[1:]])
    across = (weighted * (scores - expected)).sum(axis=0)
    hessian = np.empty((len(theta), len(theta)))
    # For separable data the optimal slope is infinite; the added constant keeps the step finite.
    hessian[0, 0] = (weighted * (scores - expected) ** 2).sum() + 1e-9
    hessian[0, 1:] = hessian[1:, 0] = across
    hessian[1:, 1:] = np.diag(weighted.sum(axis=0) + ridge) - p.T @ weighted
    return gradient, hessian
