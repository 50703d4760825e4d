"""`tailor init`: count and measure the images of a user's folder, and compute the sizes of the splits."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from models.image_names import NOT_UTF8, is_utf8
from models.preprocess import ImageError, decode
from models.prior import GROUPS, shot_group
from models.sample_size import SampleSize, sample_sizes
from pipeline.data.profiles import test_size, validation_size
from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources.folder import FolderSource
from serving.shared.terminal import counted

DECODED_IMAGES = 300  # approximate limit
LIGHT, NEAR = 160, 32  # levels: a light background, and a difference that is not seen as another colour
TEST_SHARE, MOST_TESTED = 0.2, 50  # per class; 50 at most, because all classes have equal weight in the metrics
VALIDATION_SHARE, MOST_VALIDATED = 0.1, 20


@dataclass(frozen=True)
class FolderSummary:
    """Summary of a folder of images. counts: training images of each class; shorter: median shorter side in pixels.

    tested: images of each class in a test folder; None if there is no test folder. source: the folder that was read.
    background: the colour of the images' borders, if most have one light colour; else None.
    """

    classes: list[str]
    counts: list[int]
    tested: list[int] | None
    own_validation: bool
    shorter: int
    unreadable: list[str]
    remarks: list[str] = field(default_factory=list)
    background: list[int] | None = None
    source: FolderSource | None = field(default=None, repr=False, compare=False)

    @property
    def imbalance(self) -> float:
        """Images of the largest class / images of the smallest class."""
        return max(self.counts) / min(self.counts)

    def split_sizes(self) -> tuple[list[int], list[int]]:
        """Return the training and test images of each class, after the test images that `suggest_params` holds out."""
        training, tested = self.counts, self.tested
        if tested is None:
            tested = [test_size(count, MOST_TESTED, TEST_SHARE) for count in training]
            training = [count - size for count, size in zip(training, tested, strict=True)]
        if not self.own_validation:
            held = [validation_size(count, 0, MOST_VALIDATED, VALIDATION_SHARE) for count in training]
            training = [count - size for count, size in zip(training, held, strict=True)]
        return training, tested

    def __str__(self) -> str:
        groups = [shot_group(count) for count in self.counts]
        shots = ", ".join(f"{groups.count(group)} {group}" for group in GROUPS)
        return (
            f"{counted(sum(self.counts), 'image')} of {counted(len(self.counts), 'class')} "
            f"({max(self.counts):,} to {min(self.counts):,} a "
            f"class, imbalance factor {self.imbalance:,.1f}; {shots}); shorter side {self.shorter} pixels in the median"
        )


def inspect_folder(folder: Path) -> FolderSummary:
    """Count a folder's images, and decode about 300 of them, evenly spread, to measure their sizes.

    Raises ParamsError if the folder does not exist, or has a path that is not UTF-8, DataError if it has no
    classes or no readable image.
    """
    if not folder.is_dir():
        raise ParamsError(f"{folder}: no such folder; expected one that holds a folder of images for each class")
    if not is_utf8(str(folder.resolve())):  # DVC cannot hash such a path
        raise ParamsError(f"{folder.resolve()}: {NOT_UTF8}")
    source = FolderSource(folder)
    train = [row for row in source.rows if row.split == "train"]
    counts = np.bincount([row.label for row in train], minlength=len(source.classes)).tolist()
    sides, borders, unreadable = [], [], []
    for row in source.rows[:: max(1, len(source.rows) // DECODED_IMAGES)]:
        try:
            image = decode(source.read(row.reference))
        except (DataError, ImageError):
            unreadable.append(row.reference)
        else:
            sides.append(min(image.size))
            borders.append(_border(np.asarray(image)))
    if not sides:
        raise DataError(
            f"{folder}: none of {counted(len(unreadable), 'inspected image')} can be read; the first: {unreadable[0]}"
        )
    test = [row.label for row in source.rows if row.split == "test"]
    tested = np.bincount(test, minlength=len(source.classes)).tolist() if test else None
    own_validation = any(row.split == "validation" for row in source.rows)
    median = round(statistics.median(sides))
    return FolderSummary(
        source.classes, counts, tested, own_validation, median, unreadable, source.remarks, _light(borders), source
    )


def _border(pixels: np.ndarray) -> np.ndarray:
    # Median colour [3] of the outermost pixels of an image [H,W,3].
    return np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)


def _light(borders: list[np.ndarray]) -> list[int] | None:
    # The colour of the borders if it is light and nine of ten images have about this colour.
    colour = np.median(borders, axis=0)
    near = np.abs(np.array(borders) - colour).max(axis=1) <= NEAR
    return colour.astype(int).tolist() if colour.min() >= LIGHT and near.mean() >= 0.9 else None


def expected_tests(summary: FolderSummary) -> dict[str, SampleSize]:
    """Return sample sizes of the test split that results from `suggest_params`: all classes, and each shot group."""
    training, tested = summary.split_sizes()
    return sample_sizes(tested, [shot_group(count) for count in training])
