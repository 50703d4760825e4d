"""Read a run's test predictions from predictions.parquet, and check that two runs are comparable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.prior import calibrate_logits, class_key
from pipeline.data.class_prior import Prior, load_prior
from pipeline.evaluation.metrics import adjusted_probabilities
from pipeline.shared.errors import StageError, TailorError
from serving.shared.bounded_parquet import read_note, read_predictions

# Keys of the schema of predictions.parquet; COVERAGE_NOTE: the wanted coverage of the prediction sets in its columns covered_*.
CALIBRATION_NOTE, COVERAGE_NOTE = "tailor_calibration", "tailor_coverage"


class GateError(StageError):
    """The gate cannot be computed; the decision is then a refusal."""


@dataclass(frozen=True)
class Contender:
    """A model that is compared: its predictions.parquet and prior.json, and its latency.

    latency_ms: milliseconds per image in ONNX Runtime; None if not measured.
    """

    predictions: Path
    prior: Path
    latency_ms: float | None = None


def load_predictions(contender: Contender, target_prior: str = "balanced") -> Predictions:
    """Read the predictions of a contender, adjusted for the target prior, in the order of the sample ids.

    The probabilities are those that a server returns: calibrated if the release has a temperature. Raises GateError, or
    StageError for the prior, with the file and the problem.
    """
    path, prior = contender.predictions, load_prior(contender.prior)
    try:
        calibration, coverage = read_note(path, CALIBRATION_NOTE), read_note(path, COVERAGE_NOTE)
        sets = [] if coverage is None else [f"covered_{target_prior}"]
        labels, logits, (ids, *covered) = read_predictions(path, "sample_id", *sets)
    except FileNotFoundError:
        raise GateError(f"{path}: no such file; run `dvc repro evaluate` first") from None
    except TailorError as error:
        raise GateError(str(error)) from None
    classes = len(prior.classes)
    if logits.ndim != 2 or not len(logits) or logits.shape[1] != classes:
        raise GateError(f"{path}: logits have shape {list(logits.shape)}; {contender.prior} has {classes} classes")
    if not np.all(np.isfinite(logits)):
        raise GateError(f"{path}: has a logit that is not finite")
    if len(set(ids)) != len(ids):
        raise GateError(f"{path}: has a sample id in more than one row; expected unique sample ids")
    if labels.min() < 0 or labels.max() >= classes:
        raise GateError(f"{path}: has the label {labels.max()}; expected 0 to {classes - 1}")
    order = np.argsort(np.array(ids))
    strength = 1.0 if target_prior == "train" else 0.0
    served = calibrate_logits(logits[order], _served_temperature(path, calibration))
    probabilities = adjusted_probabilities(served, np.array(prior.log_prior), strength)
    sets_of = _served_sets(path, coverage, covered[0], order) if covered else None
    return Predictions([ids[i] for i in order], labels[order], probabilities, prior, calibration, sets_of)


def _served_sets(path: Path, coverage: Any, covered: list[Any], order: np.ndarray) -> Sets:
    """The prediction sets of a release. Raises GateError for a coverage outside 0 to 1, or a column with other values."""
    if not isinstance(coverage, float) or not 0 < coverage < 1 or not all(isinstance(each, bool) for each in covered):
        raise GateError(f"{path}: has a damaged note {COVERAGE_NOTE} or column covered_*; run `dvc repro -f evaluate`")
    return Sets(coverage, np.array(covered, dtype=bool)[order])


def _served_temperature(path: Path, calibration: Any) -> float:
    """The temperature of a release's answers; 1 if it has none, or does not apply it."""
    if calibration is None:
        return 1.0
    try:
        temperature = float(calibration["temperature"]) if calibration["served"] else 1.0
    except (KeyError, TypeError, ValueError):
        temperature = 0.0
    if not 0 < temperature < np.inf:
        raise GateError(f"{path}: has a damaged note {CALIBRATION_NOTE}; run `dvc repro -f evaluate`")
    return temperature


def check_comparable(challenger: Predictions, champion: Predictions, names: str = "challenger and champion") -> None:
    """Raise GateError unless both have the same classes in the same order and the same samples with the same labels."""
    classes, other_classes = ([class_key(name) for name in run.prior.classes] for run in (challenger, champion))
    if classes != other_classes:
        unshared = sorted(set(classes) ^ set(other_classes))
        reason = f"only one has {unshared[0]!r}" if unshared else "their order differs"
        raise GateError(f"{names} have different classes: {reason}; compare models of the same classes")
    if challenger.sample_ids != champion.sample_ids:
        unshared = sorted(set(challenger.sample_ids) ^ set(champion.sample_ids))
        raise GateError(
            f"{names} were tested on different samples ({len(unshared)} are in only one test set, first {unshared[0]!r}); "
            "evaluate both on the same frozen test set"
        )
    if np.any(challenger.labels != champion.labels):
        first = int(np.flatnonzero(challenger.labels != champion.labels)[0])
        raise GateError(f"sample {challenger.sample_ids[first]!r} has two labels; evaluate both on the same test set")


@dataclass(frozen=True)
class Sets:
    """Prediction sets on the test set. coverage: wanted share. covered: whether the set has the right class, bool [N]."""

    coverage: float
    covered: np.ndarray


@dataclass(frozen=True)
class Predictions:
    """Predictions of a contender on the test set, in the order of the sample ids.

    labels: int [N]; probabilities: float [N,C], for one target prior. calibration: of `calibration_record`; None without one.
    sets: None where the release has no prediction sets.
    """

    sample_ids: list[str]
    labels: np.ndarray
    probabilities: np.ndarray
    prior: Prior
    calibration: dict[str, Any] | None = None
    sets: Sets | None = None
