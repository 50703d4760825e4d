"""Estimate label shift: class prior of live requests, its distance from the training prior, confidence intervals."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from models.calibration import Calibration, calibrate
from models.label_shift import bootstrap_priors, estimate_prior, interval, total_variation
from models.prior import GROUPS, check_target_prior, class_prior, shot_group, softmax
from serving.repository.manifest import Manifest
from serving.shared.atomic import write_file
from serving.shared.errors import InputError, ServingError
from serving.triton.live_prior import FORMAT, NAME

Method = Literal["em", "map"]
CONFIDENCE = 0.95
BOOTSTRAP_STEPS = 20_000  # iterations; few resamples need as many to converge


@dataclass(frozen=True)
class Bounded:
    """An estimated share or distance with its confidence interval, low to high."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Drift:
    """An estimated live class prior compared with the training prior.

    training, prior, low, high: float64 [C]; low and high bound the confidence interval of prior. em, map: both
    estimates, float64 [C]; `prior` is the one of `method`. groups: the live shares of the many-, medium- and few-shot
    classes. distance: total variation distance of prior from training, 0 to 1. images: number of images used.
    """

    method: Method
    confidence: float
    images: int
    training: np.ndarray
    prior: np.ndarray
    low: np.ndarray
    high: np.ndarray
    em: np.ndarray
    map: np.ndarray
    groups: dict[str, Bounded]
    distance: Bounded

    def exceeds(self, threshold: float) -> bool:
        """Whether the distance is significantly above a threshold: the lower bound of its interval is above it."""
        return self.distance.low > threshold

    def most_shifted(self, number: int) -> list[int]:
        """The indexes of the classes whose share changed most, largest change first."""
        return np.argsort(-np.abs(self.prior - self.training), kind="stable")[:number].tolist()


def estimate_drift(
    logits: np.ndarray,
    counts: Sequence[int],
    calibration: Calibration | None = None,
    *,
    method: Method = "map",
    pseudo_samples: float | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = 200,
    seed: int = 0,
) -> Drift:
    """Estimate the class prior of unlabelled data and its distance from the training prior.

    logits: balanced, [N,C]. counts: training samples per class. calibration: applied to the logits; None for no
    calibration. method: `em` is the maximum likelihood of Saerens et al.; `map` adds pseudo_samples (None: one for ten
    classes) that follow the training prior, so that the estimate stays near it with little data and no class gets share
    0. confidence: of the intervals. resamples, seed: of the bootstrap.

    Intervals of shares are percentiles of the bootstrap. The interval of the distance is not, because noise alone makes
    a distance above 0. It is the distance plus and minus a radius: the quantile of the bootstrap's distances from the
    estimate (by the triangle inequality the true distance differs by at most the error of the estimate). The radius is
    at least the quantile of the distance that the same number of correctly classified images of the training prior has.
    Raises InputError naming an unusable argument, ServingError if the estimate has not converged.
    """
    classes = len(counts)
    # 1e-9: a class without training samples, which a recipe with smoothing allows, gets a share just above 0.
    training = class_prior(counts, 1e-9)
    pseudo = classes / 10 if pseudo_samples is None else pseudo_samples
    if method not in ("em", "map"):
        raise InputError(f"method is {method!r}; expected em or map")
    if not 0 <= pseudo < np.inf:
        raise InputError(f"pseudo-samples are {pseudo:g}; expected a number of at least 0")
    concentrations = {"em": None, "map": 1 + pseudo * training}
    try:
        probabilities = softmax(logits if calibration is None else calibrate(logits, calibration))
        estimates = {name: estimate_prior(probabilities, concentration=c) for name, c in concentrations.items()}
        if not all(estimate.converged for estimate in estimates.values()):
            raise ServingError(
                f"the prior estimate has not converged on {len(logits):,} images; give more of them, or change --samples"
            )
        draws = bootstrap_priors(
            probabilities,
            estimates[method],
            concentration=concentrations[method],
            resamples=resamples,
            seed=seed,
            max_iterations=BOOTSTRAP_STEPS,
        )
        low, high = interval(draws, confidence)
        radius = float(np.quantile(total_variation(draws, estimates[method].prior), confidence))
        # With few images per class all resamples lack the same classes, so the bootstrap alone gives too small a
        # radius.
        prior_weight = pseudo if method == "map" else 0.0
        drawn = np.random.default_rng(seed).multinomial(len(logits), training, resamples)
        unshifted = (drawn + prior_weight * training) / (len(logits) + prior_weight)
        radius = max(radius, float(np.quantile(total_variation(unshifted, training), confidence)))
    except ValueError as error:
        raise InputError(str(error)) from None
    prior = estimates[method].prior
    members = np.array([shot_group(count) for count in counts])
    groups = {name: _share(prior, draws, members == name, confidence) for name in GROUPS if (members == name).any()}
    distance_value = float(total_variation(prior, training))
    distance = Bounded(distance_value, max(0.0, distance_value - radius), min(1.0, distance_value + radius))
    em, map_ = estimates["em"].prior, estimates["map"].prior
    return Drift(method, confidence, len(logits), training, prior, low, high, em, map_, groups, distance)


def _share(prior: np.ndarray, draws: np.ndarray, members: np.ndarray, confidence: float) -> Bounded:
    low, high = interval(draws[:, members].sum(axis=1), confidence)
    return Bounded(float(prior[members].sum()), float(low), float(high))


def write_live_prior(root: Path, manifest: Manifest, prior: np.ndarray, estimated: Mapping[str, Any]) -> Path:
    """Write the live prior of a repository, for requests with prior `live`; returns its file.

    prior: [C], checked. estimated: the basis of the estimate, stored in the file. The servers use it from the next
    request.
    """
    checked = check_target_prior(prior, len(manifest.classes))
    content = {
        "format": FORMAT,
        "classes": manifest.classes,
        "prior": checked.tolist(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "estimated": dict(estimated),
    }
    path = root / NAME
    write_file(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path
