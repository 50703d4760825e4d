"""What the answers of a release need from validation images: temperature, scores of prediction sets and of unknown images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from models.calibration import MINIMUM_IMAGES, fit_served_temperature
from models.decisions import Typicality, familiarity, images_needed
from models.prior import GROUPS, calibrate_logits
from pipeline.answers.calibration import calibration_record
from pipeline.answers.prediction_sets import DIGITS, MAX_SCORES, set_record, set_scores
from pipeline.data.class_prior import Prior
from pipeline.params import EvaluateParams, ServingParams

REPORTED = 0.05  # false alarms in the report if params name none
Labelled = tuple[np.ndarray, np.ndarray]  # balanced logits [N,C] and labels [N]


@dataclass(frozen=True)
class Answers:
    """Content of answers.json; a part is None if validation has too few images for it.

    temperature: fitted, also if it is not served; None without one. calibration: of `calibration_record`; sets: of
    `set_record`; unknown: of `unknown_record`.
    """

    temperature: float | None
    calibration: dict[str, Any] | None
    sets: dict[str, Any] | None
    unknown: dict[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        """The parts as JSON values."""
        return asdict(self)


def fit_answers(
    validation: Labelled | None, test: Labelled, prior: Prior, evaluate: EvaluateParams, serving: ServingParams
) -> Answers:
    """Fit everything on the validation images, and measure it on the test images. validation: None without images."""
    if validation is None:
        return Answers(None, None, None, None)
    served = serving.calibration == "temperature"
    fitted = fit_served_temperature(*validation)
    temperature = fitted.temperature if fitted and served else 1.0
    (held, known), (tested, labels) = (
        (calibrate_logits(logits, temperature), labels) for logits, labels in (validation, test)
    )
    return Answers(
        fitted and fitted.temperature,
        calibration_record(fitted, served, test[0], labels, prior, evaluate.ece_bins),
        set_record(set_scores(held, known), tested, labels, prior, serving.coverage),
        unknown_record(held, tested, labels, prior, serving.false_alarms),
    )


def unknown_record(
    held: np.ndarray, tested: np.ndarray, labels: np.ndarray, prior: Prior, false_alarms: float | None
) -> dict[str, Any] | None:
    """Familiarity of the validation images by the shot group of their prediction; and false alarms on the test split.

    held, tested: calibrated balanced logits [N,C] of both splits; labels: of the test split. false_alarms: wanted rate. The
    test images are all of known classes, so each one that is unknown is a false alarm: `measured` has their rate by the
    group of the true class. `images`: validation images by predicted group; a group with fewer than `needed` has no alarms.
    None with fewer than MINIMUM_IMAGES images.
    """
    if len(held) < MINIMUM_IMAGES:
        return None
    log_prior, groups = np.array(prior.log_prior), np.array(prior.groups)
    density, predicted = familiarity(held, log_prior), groups[held.argmax(1)]
    random = np.random.default_rng(0)
    scores = {
        group: [float(f"{each:.{DIGITS}g}") for each in random.permutation(density[predicted == group])[:MAX_SCORES]]
        for group in GROUPS
        if group in prior.groups
    }
    rate = false_alarms or REPORTED
    alarm = Typicality(scores, prior.groups)(familiarity(tested, log_prior), tested.argmax(1)) <= rate
    true = groups[labels]
    measured = {group: float(alarm[true == group].mean()) for group in GROUPS if (true == group).any()}
    return {
        "scores": scores, "rate": rate, "needed": images_needed(1 - rate), "measured": {"all": float(alarm.mean()), **measured},
        "images": {group: int((predicted == group).sum()) for group in scores},
    }  # fmt: skip
