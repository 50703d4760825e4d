"""Whether test images are enough to judge by: one rule for every figure that is a mean over classes.

Imports no torch, as the commands of the serving room use it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from models.prior import GROUPS

# An accuracy of n test images has a 95 % interval of at most 1.96 * sqrt(0.25 / n) either side: 100 images are the fewest
# with which it is within 10 percentage points.
ENOUGH = 100
ADVICE = "add images, hold out more of them (data.test_share), or bring a test folder"


@dataclass(frozen=True)
class SampleSize:
    """Test images of a group of classes, and as how many equal ones they count in the mean over its classes."""

    images: int
    effective: float

    @property
    def too_few(self) -> bool:
        """Whether they are below ENOUGH; 1e-9 is for rounding in the sum over classes."""
        return self.effective < ENOUGH - 1e-9

    @property
    def half_width(self) -> float:
        """Largest distance of the bounds of a 95 % interval from an accuracy, as a share; 1 without images."""
        return min(1.0, 0.98 / self.effective**0.5) if self.effective else 1.0

    def __str__(self) -> str:
        if not self.images:
            return "no test images: nothing is known"
        counted = f"{self.images:,} test image{'s' if self.images > 1 else ''}"
        if self.effective < self.images - 0.5:
            counted += f", which count as {self.effective:,.0f} in a mean over classes of unequal size"
        compared = "fewer than" if self.too_few else "at least"
        return f"{counted}, {compared} {ENOUGH}: figures are uncertain by up to ±{100 * self.half_width:.0f} percentage points"


def sample_size(tested: Any, weights: Any = None) -> SampleSize:
    """Sample size of a mean over classes: (sum w)^2 / (sum w^2) with w = 1/n_c for each image (Kish 1965), C^2 / sum 1/n_c.

    tested: int [C], test images of each class; classes without any are left out. With equal counts it is their sum. The
    variance of the mean over classes is at most 1/4 over it. weights: [C] > 0, of the classes in the mean; equal if None.
    """
    counts = np.asarray(tested, dtype=np.float64)
    share = np.ones(counts.shape) if weights is None else np.asarray(weights, dtype=np.float64)
    counts, share = counts[counts > 0], share[counts > 0]
    effective = float(share.sum() ** 2 / (share**2 / counts).sum()) if counts.size else 0.0
    return SampleSize(int(counts.sum()), effective)


def sample_sizes(tested: Any, groups: Sequence[str]) -> dict[str, SampleSize]:
    """`all`, and each shot group that has classes → its sample size. tested: int [C]; groups: [C] shot groups."""
    counts, members = np.asarray(tested), np.asarray(groups)
    present = [group for group in GROUPS if group in groups]
    return {"all": sample_size(counts)} | {group: sample_size(counts[members == group]) for group in present}


def as_json(sizes: Mapping[str, SampleSize]) -> dict[str, dict[str, Any]]:
    """The sizes for metrics.json and report.json."""
    return {name: asdict(size) | {"too_few": size.too_few} for name, size in sizes.items()}


def from_json(content: Mapping[str, Mapping[str, Any]]) -> dict[str, SampleSize]:
    """What `as_json` wrote."""
    return {name: SampleSize(values["images"], values["effective"]) for name, values in content.items()}


def warnings_of(sizes: Mapping[str, SampleSize]) -> list[str]:
    """A line for each group of too few test images."""
    return [f"{name}: {size}" for name, size in sizes.items() if size.too_few]
