"""Class prior of the training split: counts, probabilities and shot groups, read from prior.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from models.prior import GROUPS, balanced_shift
from pipeline.data.split_tables import read_batches
from pipeline.shared.artifacts import PRIOR
from pipeline.shared.errors import DataError, ParamsError, StageError
from serving.shared.terminal import counted

BATCH_ROWS = 1 << 20  # 8 MB of labels at a time


@dataclass(frozen=True)
class Prior:
    """Content of prior.json, one entry per class: name, training samples, p, log_prior, shot group.

    log_prior is log p, which is added to balanced logits to get logits for the training prior. loss_log_prior replaces
    it in the losses if params weight the classes by their effective number; None: log_prior.
    """

    classes: list[str]
    counts: list[int]
    p: list[float]
    log_prior: list[float]
    groups: list[str]
    loss_log_prior: list[float] | None = None

    @property
    def in_losses(self) -> list[float]:
        """The log prior that the losses add to the logits, [C]."""
        return self.log_prior if self.loss_log_prior is None else self.loss_log_prior

    def balanced_shift(self, adjustment: float | None) -> np.ndarray:
        """Return the shift [C] that converts logits of a network trained with `adjustment` in L_cls to the balanced prior.

        adjustment: None if the logits are balanced already, for example the logits of a memory alone.
        """
        if adjustment is None:
            return np.zeros(len(self.classes))
        shift: np.ndarray = balanced_shift(np.array(self.log_prior), np.array(self.in_losses), adjustment)
        return shift

    def sampled(self, power: float) -> Prior:
        """Prior whose losses use the log of sampled class shares, in proportion to p ** power; 1: this prior.

        p is n_c / sum(n) and the shares are those of ClassSampler; with prior.smoothing above 0 a class without images has the
        share of its smoothed p, as without sampling.
        """
        if power == 1:
            return self
        shares = power * np.array(self.log_prior)
        return replace(self, loss_log_prior=(shares - np.logaddexp.reduce(shares)).tolist())

    def __str__(self) -> str:
        groups = ", ".join(f"{self.groups.count(group)} {group}" for group in GROUPS)
        return (
            f"{counted(len(self.classes), 'class')} of {max(self.counts):,} to {min(self.counts):,} samples "
            f"({groups}) → {PRIOR}"
        )


def count_labels(path: Path, classes: int, column: str = "label") -> np.ndarray:
    """Count the rows of each class in a Parquet file: int64 [classes], in one pass with bounded memory.

    Raises ParamsError when the file does not exist, StageError when it is damaged, DataError for a label that is null
    or not in 0..classes-1.
    """
    counts = np.zeros(classes, dtype=np.int64)
    for labels in read_batches(path, column, BATCH_ROWS):
        if labels.null_count:
            raise DataError(f"{path}: column {column!r} has {counted(labels.null_count, 'row')} without a label")
        values = labels.to_numpy()
        wrong = values[(values < 0) | (values >= classes)]
        if len(wrong):
            raise DataError(f"{path}: has label {wrong[0]}; expected 0 to {classes - 1}")
        counts += np.bincount(values, minlength=classes)
    return counts


def count_pixels(path: Path, classes: int) -> np.ndarray:
    """Sum the pixels of each class over the label maps of a split table: int64 [classes]. Raises as `count_labels` does."""
    counts = np.zeros(classes, dtype=np.int64)
    for pixels in read_batches(path, "pixels", 1024):
        values = pixels.flatten().to_numpy()
        if pixels.null_count or len(values) != classes * len(pixels):
            raise StageError(f"{path}: column 'pixels' is not of {classes} classes; run `dvc repro -f split`")
        counts += values.reshape(len(pixels), classes).sum(0)
    return counts


class PixelPrior(Prior):
    """Class prior of task segmentation: counts are pixels, and groups are terciles of their shares."""

    def __str__(self) -> str:
        return (
            f"{counted(len(self.classes), 'class')} with {max(self.p):.2%} to {min(self.p):.2%} of "
            f"{sum(self.counts):,} labelled pixels → {PRIOR}"
        )


def load_prior(path: Path = PRIOR) -> Prior:
    """Read prior.json. Raises ParamsError when the stage has not run, StageError when the file is damaged."""
    try:
        return Prior(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ParamsError(f"{path}: {error.strerror}; run `dvc repro prior` first") from None
    except (ValueError, TypeError) as error:
        raise StageError(f"{path}: damaged ({error}); run `dvc repro -f prior`") from None
