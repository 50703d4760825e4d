"""Segmentation metrics (Eq. 11, 12) from areas that are summed over the whole set before any division; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.prior import GROUPS

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass
class Areas:
    """Pixels of each class, summed over images: int64 [C] each.

    intersection: predicted and labelled as the class; predicted and labelled: all pixels of the class in either. Ignored
    pixels are in none of them.
    """

    intersection: Counts
    predicted: Counts
    labelled: Counts

    @classmethod
    def zero(cls, classes: int) -> Areas:
        """Areas of an empty set of images."""
        return cls(*(np.zeros(classes, dtype=np.int64) for _ in range(3)))

    def add(self, prediction: NDArray[Any], labels: NDArray[Any], ignored: int = 255) -> None:
        """Add images: prediction and labels have the same shape, any integer dtype.

        Raises ValueError if the shapes differ, or if a prediction or a label is neither a class nor `ignored`.
        """
        classes = len(self.labelled)
        if prediction.shape != labels.shape:
            raise ValueError(f"prediction has shape {list(prediction.shape)}; its label map has {list(labels.shape)}")
        valid = labels != ignored
        predicted, labelled = prediction[valid], labels[valid]
        for name, values in (("prediction", predicted), ("label map", labelled)):
            if values.size and not 0 <= int(values.min()) <= int(values.max()) < classes:
                raise ValueError(f"{name} has the value {int(values.max())}; expected 0 to {classes - 1}")
        self.intersection += np.bincount(labelled[predicted == labelled], minlength=classes)
        self.predicted += np.bincount(predicted, minlength=classes)
        self.labelled += np.bincount(labelled, minlength=classes)

    def iou(self) -> Floats:
        """Intersection over union of each class, float64 [C]; nan for a class in neither prediction nor labels."""
        return _ratio(self.intersection, self.predicted + self.labelled - self.intersection)

    def accuracy(self) -> Floats:
        """Share of the labelled pixels of each class that are predicted, float64 [C]; nan for a class without labels."""
        return _ratio(self.intersection, self.labelled)

    def metrics(self, groups: list[str] | None = None) -> dict[str, float | None]:
        """Return mIoU, mAcc and aAcc, in 0..1; with the group of each class also mIoU and mAcc of each group.

        A mean is over the classes whose value is not nan; None if there is none.
        """
        iou, accuracy = self.iou(), self.accuracy()
        total = int(self.labelled.sum())
        values = {
            "miou": _mean(iou),
            "macc": _mean(accuracy),
            "aacc": int(self.intersection.sum()) / total if total else None,
        }
        for group in GROUPS if groups else ():
            members = np.array([entry == group for entry in groups or ()])
            values[f"miou_{group}"], values[f"macc_{group}"] = _mean(iou[members]), _mean(accuracy[members])
        return values


def _ratio(part: Counts, whole: Counts) -> Floats:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _mean(values: Floats) -> float | None:
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if numbers.size else None
