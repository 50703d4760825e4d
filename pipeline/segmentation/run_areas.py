"""Areas of a run on each test image, as the gate compares them: read, check, mean IoU of resampled images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from pipeline.data.class_prior import Prior, load_prior
from pipeline.shared.errors import StageError

PARTS = ("intersection", "predicted", "labelled")


@dataclass(frozen=True)
class RunAreas:
    """Areas of the student on the test images, sorted by id. areas: int64 [3,N,C], in the order of PARTS."""

    sample_ids: list[str]
    areas: np.ndarray
    prior: Prior

    def mean_iou(self, classes: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Function from image indices int [B,N] to the mIoU [B] of these images over `classes`, bool [C].

        Classes in neither prediction nor labels are left out of a mean; 0 if no class is left.
        """
        parts = self.areas[:, :, classes].astype(np.float64)

        def measure(index: np.ndarray) -> np.ndarray:
            images = parts.shape[1]
            weights = np.stack([np.bincount(row, minlength=images) for row in index]).astype(np.float64)
            inside, predicted, labelled = (weights @ part for part in parts)
            union = predicted + labelled - inside
            iou = np.divide(inside, union, out=np.zeros_like(inside), where=union > 0)
            return iou.sum(1) / np.maximum((union > 0).sum(1), 1)

        return measure


def has_areas(predictions: Path) -> bool:
    """Whether a predictions.parquet is of task segmentation; False for a file that cannot be read."""
    try:
        return "intersection_balanced" in pyarrow.parquet.read_schema(predictions).names
    except (OSError, pa.ArrowException):
        return False


def load_areas(predictions: Path, prior: Path, target_prior: str) -> RunAreas:
    """Read the areas of a run for a target prior. Raises StageError with the file."""
    try:
        names = ["sample_id", *(f"{part}_{target_prior}" for part in PARTS)]
        table = pyarrow.parquet.ParquetFile(predictions).read(names, use_threads=False)
        ids = np.array(table.column("sample_id").to_pylist())
        areas = np.array([table.column(name).to_pylist() for name in names[1:]], dtype=np.int64)
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise StageError(
            f"{predictions}: has no areas ({str(error).splitlines()[0]}); run `dvc repro evaluate`"
        ) from None
    run_prior = load_prior(prior)
    if areas.shape != (len(PARTS), len(ids), len(run_prior.classes)) or not len(ids):
        raise StageError(f"{predictions}: areas have shape {list(areas.shape)}; expected one per class of {prior}")
    order = np.argsort(ids)
    return RunAreas(ids[order].tolist(), areas[:, order], run_prior)


def check_comparable(challenger: RunAreas, champion: RunAreas) -> None:
    """Raise StageError unless both have the same classes and test images with the same label maps."""
    if challenger.prior.classes != champion.prior.classes:
        raise StageError("challenger and champion have different classes; compare models of the same classes")
    if challenger.sample_ids != champion.sample_ids or not np.array_equal(challenger.areas[2], champion.areas[2]):
        raise StageError(
            "challenger and champion were tested on different images or label maps; evaluate both on the same test set"
        )
