"""Source `digits`: scans of handwritten digits that come with scikit-learn; they need no file."""

from __future__ import annotations

import numpy as np

from pipeline.sources.source import Row, WithoutFiles, as_png


class DigitsSource(WithoutFiles):
    """scikit-learn's bundled scans of handwritten digits: 1,797 images of 8x8 pixels, 16 grey levels, ten classes."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        scans = load_digits()
        self.origin = "digits"
        self.classes = [str(digit) for digit in range(10)]
        self._pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)
        self.rows = [Row(str(i), int(label), f"digits/{i}", "train") for i, label in enumerate(scans.target)]

    def place(self, row: Row) -> str:
        """The scan's number."""
        return row.sample_id

    def stamp(self, reference: str) -> str:
        """Always the same: the scans are part of a package."""
        return f"digits/{reference}"

    def read(self, reference: str) -> bytes:
        """The scan as a PNG file."""
        return as_png(self._pixels[int(reference)])
