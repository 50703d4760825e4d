"""Effective sample size of test images: one rule for all figures that are a mean over classes.

Does not import torch, because commands of the serving package use it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from models.prior import GROUPS

# The 95 % interval of an accuracy on n test images is at most 1.96 * sqrt(0.25 / n) to either side. 100 images are the
# fewest for which this is within 10 percentage points.
ENOUGH = 100
ADVICE = "add images, hold out more of them (data.test_share), or bring a test folder"


@dataclass(frozen=True)
class SampleSize:
    """Number of test images of a group of classes, and the effective number for the mean over its classes."""

    images: int
    effective: float

    @property
    def too_few(self) -> bool:
        """Whether the effective number is below ENOUGH; 1e-9 allows for rounding in the sum over classes."""
        return self.effective < ENOUGH - 1e-9

    @property
    def half_width(self) -> float:
        """Largest half width of the 95 % interval of an accuracy, as a share; 1 without images."""
        return min(1.0, 0.98 / self.effective**0.5) if self.effective else 1.0

    def __str__(self) -> str:
        if not self.images:
            return "no test images, so no accuracy can be measured"
        counted = f"{self.images:,} test image{'s' if self.images > 1 else ''}"
        if self.effective < self.images - 0.5:
            counted += f", which count as {self.effective:,.0f} in a mean over classes of unequal size"
        compared = "fewer than" if self.too_few else "at least"
        return f"{counted}, {compared} {ENOUGH}: figures are uncertain by up to ±{100 * self.half_width:.0f} percentage points"


def sample_size(tested: Any, weights: Any = None) -> SampleSize:
    """Effective sample size of a mean over classes: (sum w)^2 / (sum w^2) with w = 1/n_c for each image (Kish 1965).

    This is C^2 / sum 1/n_c. tested: int [C], test images of each class; classes without images are excluded. With equal
    counts the effective size is their sum. The variance of the mean over classes is at most 1/4 divided by the
    effective size. weights: [C] > 0, of the classes in the mean; None: equal.
    """
    counts = np.asarray(tested, dtype=np.float64)
    share = np.ones(counts.shape) if weights is None else np.asarray(weights, dtype=np.float64)
    counts, share = counts[counts > 0], share[counts > 0]
    effective = float(share.sum() ** 2 / (share**2 / counts).sum()) if counts.size else 0.0
    return SampleSize(int(counts.sum()), effective)


def sample_sizes(tested: Any, groups: Sequence[str]) -> dict[str, SampleSize]:
    """Sample size of `all` classes and of each shot group that has classes. tested: int [C]; groups: [C] shot groups."""
    counts, members = np.asarray(tested), np.asarray(groups)
    present = [group for group in GROUPS if group in groups]
    return {"all": sample_size(counts)} | {group: sample_size(counts[members == group]) for group in present}


def as_json(sizes: Mapping[str, SampleSize]) -> dict[str, dict[str, Any]]:
    """Convert sample sizes to JSON values for metrics.json and report.json."""
    return {name: asdict(size) | {"too_few": size.too_few} for name, size in sizes.items()}


def from_json(content: Mapping[str, Mapping[str, Any]]) -> dict[str, SampleSize]:
    """Read sample sizes that `as_json` wrote."""
    return {name: SampleSize(values["images"], values["effective"]) for name, values in content.items()}


def warnings_of(sizes: Mapping[str, SampleSize]) -> list[str]:
    """One line of text for each group with too few test images."""
    return [f"{name}: {size}" for name, size in sizes.items() if size.too_few]
