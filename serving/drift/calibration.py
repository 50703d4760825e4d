"""Calibration of a served student, fitted on the test predictions that evaluation stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models.calibration import Calibration, fit_calibration
from models.prior import softmax
from serving.repository.manifest import Manifest
from serving.shared.bounded_parquet import read_predictions
from serving.shared.errors import ServingError

NLL_TOL = 1e-6  # nats; largest difference from the manifest's nll, which evaluation computed from the same predictions


def calibration_from(predictions: Path, manifest: Manifest) -> Calibration:
    """Fit temperature and biases on evaluation's predictions.parquet (label, balanced logits) of this release.

    Raises ServingError naming the file: missing, damaged, of another student than the manifest's, a class without test
    predictions, or predictions on which no calibration can be fitted.
    """
    classes = len(manifest.classes)
    try:
        labels, logits, _ = read_predictions(predictions)
    except FileNotFoundError:
        raise ServingError(f"{predictions}: no such file; run `dvc repro evaluate`, or give --calibration") from None
    usable = logits.ndim == 2 and len(logits) and logits.shape[1] == classes and labels.dtype.kind in "iu"
    if not usable or not np.isfinite(logits).all() or labels.min() < 0 or labels.max() >= classes:
        raise ServingError(f"{predictions}: is not of the {classes} classes of version {manifest.version}")
    absent = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if absent.size:  # only the penalty would determine the bias of such a class, and it would never be predicted
        name = manifest.classes[absent[0]]
        raise ServingError(f"{predictions}: class {name!r} has no test prediction to calibrate by")
    nll = -np.log(np.maximum(softmax(logits)[np.arange(len(labels)), labels], 1e-12)).mean()
    recorded = manifest.balanced_metric("nll")
    if recorded is None or not abs(nll - recorded) <= NLL_TOL:
        raise ServingError(f"{predictions}: is of another student than version {manifest.version}")
    try:
        return fit_calibration(logits, labels)
    except ValueError as error:
        raise ServingError(f"{predictions}: {error}") from None
