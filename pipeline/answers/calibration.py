"""Calibration of the served probabilities: the temperature of a release, NLL and ECE before and after, per shot group."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.calibration import Calibration
from models.prior import GROUPS, adjust_logits, calibrate_logits, softmax
from pipeline.data.class_prior import Prior
from pipeline.evaluation.metrics import expected_calibration_error, negative_log_likelihood
from pipeline.evaluation.network_metrics import TARGET_PRIORS

ALL = "all"


def calibration_tables(
    logits: np.ndarray, labels: np.ndarray, prior: Prior, temperature: float, bins: int
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Target prior → `before` and `after` → group → accuracy, nll and ece of balanced logits [N,C] with labels [N].

    after: of the logits divided by the temperature before the prior is added, as the server does. `all` and the shot groups
    weigh an image of class c by p(c) / n_c, with the target prior p, so they hold for test data that follows it. A group
    without test images is left out.
    """
    classes = len(prior.classes)
    targets = {"balanced": np.full(classes, 1 / classes), "train": np.array(prior.p)}
    log_prior = np.array(prior.log_prior)
    weights = {name: p[labels] / np.bincount(labels, minlength=classes)[labels] for name, p in targets.items()}
    return {
        name: {
            side: _by_group(
                softmax(adjust_logits(calibrate_logits(logits, factor), log_prior, strength)),
                labels, prior.groups, weights[name], bins,
            )
            for side, factor in (("before", 1.0), ("after", temperature))
        }
        for name, strength in TARGET_PRIORS.items()
    }  # fmt: skip


def calibration_record(
    calibration: Calibration | None, served: bool, logits: np.ndarray, labels: np.ndarray, prior: Prior, bins: int
) -> dict[str, Any] | None:
    """The JSON content that evaluation writes for export, report and gate; None if no temperature was fitted.

    served: whether the release applies the temperature (serving.calibration). images, effective: size of the validation
    split. tables: of `calibration_tables`, on the test split.
    """
    if calibration is None or calibration.size is None:
        return None
    return {
        "temperature": calibration.temperature,
        "images": calibration.size.images,
        "effective": calibration.size.effective,
        "served": served,
        "tables": calibration_tables(logits, labels, prior, calibration.temperature, bins),
    }


def _by_group(
    probabilities: np.ndarray, labels: np.ndarray, groups: list[str], weights: np.ndarray, bins: int
) -> dict[str, dict[str, float]]:
    members = {ALL: np.ones(len(labels), dtype=bool)}
    members |= {group: np.array([name == group for name in groups])[labels] for group in GROUPS}
    return {
        group: {
            "accuracy": float(np.average(probabilities[rows].argmax(1) == labels[rows], weights=weights[rows])),
            "nll": negative_log_likelihood(probabilities[rows], labels[rows], weights[rows]),
            "ece": expected_calibration_error(probabilities[rows], labels[rows], bins, weights[rows]),
        }
        for group, rows in members.items()
        if rows.any()
    }
