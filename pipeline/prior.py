"""Stage `prior`: the class prior of the training split; writes artifacts/prior.json."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from models.prior import GROUPS, balanced_shift, class_prior, effective_number, log_class_prior, shot_group
from pipeline.artifacts import PRIOR, SPLIT, write_json
from pipeline.errors import DataError, ParamsError, StageError
from pipeline.params import Params
from pipeline.splits import load_classes, read_batches
from pipeline.stage import stage_main
from serving.terminal import counted

BATCH_ROWS = 1 << 20  # 8 MB of labels at a time


@dataclass(frozen=True)
class Prior:
    """Content of prior.json, one entry per class: name, training samples, p, log_prior, shot group.

    log_prior is log p, what is added to balanced logits to answer for the training prior. loss_log_prior is what the
    losses add in its place where params weight the classes by their effective number; None: log_prior.
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

    def balanced_shift(self, adjustment: float) -> np.ndarray:
        """What to add to the logits of a network trained with `adjustment` in L_cls, so that they answer `balanced`: [C]."""
        shift: np.ndarray = balanced_shift(np.array(self.log_prior), np.array(self.in_losses), adjustment)
        return shift

    def __str__(self) -> str:
        sizes = {group: self.groups.count(group) for group in GROUPS}
        groups = ", ".join(f"{number} {group}" for group, number in sizes.items())
        return (
            f"{counted(len(self.classes), 'class')} of {max(self.counts):,} to {min(self.counts):,} samples "
            f"({groups}) → {PRIOR}"
        )


def run(params: Params, split: Path = SPLIT, output: Path = PRIOR) -> Prior:
    """Count the training labels and write counts, p, log_prior and groups. Raises DataError on a class without samples."""
    classes = load_classes(split)
    counts = count_labels(split / "train.parquet", len(classes)).tolist()
    smoothing = params.prior.smoothing
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty and smoothing == 0:
        raise DataError(
            f"class {empty[0]!r} has no training samples (such classes: {len(empty)}); add samples, remove the class, or "
            "set prior.smoothing above 0"
        )
    p = class_prior(counts, smoothing)
    in_losses = None
    if params.prior.weighting == "effective_number":
        in_losses = log_class_prior(effective_number(counts, params.prior.beta), smoothing).tolist()
    groups = [shot_group(count) for count in counts]
    prior = Prior(classes, counts, p.tolist(), np.log(p).tolist(), groups, in_losses)
    write_json(output, asdict(prior))
    return prior


def count_labels(path: Path, classes: int, column: str = "label") -> np.ndarray:
    """Rows of each class in a Parquet file: int64 [classes], in one pass and memory that the rows do not add to.

    Raises ParamsError when there is no such file, StageError when it is damaged, DataError for a label that is null or
    not in 0..classes-1.
    """
    counts = np.zeros(classes, dtype=np.int64)
    for labels in read_batches(path, column, BATCH_ROWS):
        if labels.null_count:
            raise DataError(f"{path}: column {column!r} has {counted(labels.null_count, 'row')} without a label")
        values = labels.to_numpy()
        try:
            found = np.bincount(values, minlength=classes)
        except ValueError:  # numpy refuses negative numbers
            raise DataError(f"{path}: has label {values.min()}; expected 0 to {classes - 1}") from None
        if len(found) > classes:
            raise DataError(f"{path}: has label {len(found) - 1}; expected 0 to {classes - 1}")
        counts += found
    return counts


def load_prior(path: Path = PRIOR) -> Prior:
    """Read prior.json. Raises ParamsError when the stage has not run, StageError when the file is damaged."""
    try:
        return Prior(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ParamsError(f"{path}: {error.strerror}; run `dvc repro prior` first") from None
    except (ValueError, TypeError) as error:
        raise StageError(f"{path}: damaged ({error}); run `dvc repro -f prior`") from None


if __name__ == "__main__":
    sys.exit(stage_main(run, "Count the training labels and write the class prior."))
