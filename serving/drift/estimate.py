"""How far the classes that are asked about have moved from those that were trained on: label shift, with its uncertainty."""

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
BOOTSTRAP_STEPS = 20_000  # only the few resamples that have not settled take them


@dataclass(frozen=True)
class Bounded:
    """An estimated share or distance with the bounds of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Drift:
    """A live class prior against the training prior.

    training, prior, low, high: float64 [C]. em, map: both estimates, of which `prior` is the one of `method`. groups:
    the live share of many, medium and few. distance: total variation of prior from training, 0 to 1.
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
        """Whether the distance is above a threshold beyond noise: its whole interval is."""
        return self.distance.low > threshold

    def most_shifted(self, number: int) -> list[int]:
        """Classes by how much their share changed, the most first."""
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

    logits: balanced, [N,C]. counts: training samples per class. calibration: None takes the
    logits as they are. method `em` is Saerens's maximum likelihood, `map` adds pseudo_samples (None: one for
    ten classes) that follow the training prior: with little data it stays near that, and no class gets nothing. Bounds
    are the bootstrap's percentiles. The distance's are not, because noise alone makes a distance: the bootstrap says how
    far an estimate lies from the truth, and by the triangle inequality the true distance is at most that much off. They
    reach no less far than images of the training prior, as many and each told apart, would lie from it.
    Raises InputError naming an unusable argument, ServingError when the estimate has not settled.
    """
    classes = len(counts)
    # A class without training samples, where the recipe smooths, has a share of next to nothing.
    training = class_prior(counts, 1e-9)
    pseudo = classes / 10 if pseudo_samples is None else pseudo_samples
    if method not in ("em", "map"):
        raise InputError(f"method is {method!r}; expected em or map")
    if not 0 <= pseudo < np.inf:
        raise InputError(f"pseudo-samples are {pseudo:g}; expected a number of at least 0")
    concentrations = {"em": None, "map": 1 + pseudo * training}
    try:
        answered = softmax(logits if calibration is None else calibrate(logits, calibration))
        found = {name: estimate_prior(answered, concentration=c) for name, c in concentrations.items()}
        if not all(estimate.converged for estimate in found.values()):
            raise ServingError("the estimate has not settled; give more images, or fewer at once with --samples")
        draws = bootstrap_priors(
            answered,
            found[method],
            concentration=concentrations[method],
            resamples=resamples,
            seed=seed,
            max_iterations=BOOTSTRAP_STEPS,
        )
        low, high = interval(draws, confidence)
        reach = float(np.quantile(total_variation(draws, found[method].prior), confidence))
        # With few images a class, resamples of them miss most classes alike, and so lie too near to one another.
        pull = pseudo if method == "map" else 0.0
        drawn = np.random.default_rng(seed).multinomial(len(logits), training, resamples)
        unshifted = (drawn + pull * training) / (len(logits) + pull)
        reach = max(reach, float(np.quantile(total_variation(unshifted, training), confidence)))
    except ValueError as error:
        raise InputError(str(error)) from None
    prior = found[method].prior
    members = np.array([shot_group(count) for count in counts])
    groups = {name: _share(prior, draws, members == name, confidence) for name in GROUPS if (members == name).any()}
    apart = float(total_variation(prior, training))
    distance = Bounded(apart, max(0.0, apart - reach), min(1.0, apart + reach))
    em, map_ = found["em"].prior, found["map"].prior
    return Drift(method, confidence, len(logits), training, prior, low, high, em, map_, groups, distance)


def _share(prior: np.ndarray, draws: np.ndarray, members: np.ndarray, confidence: float) -> Bounded:
    low, high = interval(draws[:, members].sum(axis=1), confidence)
    return Bounded(float(prior[members].sum()), float(low), float(high))


def write_live_prior(root: Path, manifest: Manifest, prior: np.ndarray, estimated: Mapping[str, Any]) -> Path:
    """Make a prior the one that requests to the repository's servers name `live`; returns its file.

    estimated: what the numbers rest on, kept in the file. The servers use it from their next request on.
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
