"""Source `digits`: the handwritten digits of scikit-learn, which need no download."""

from __future__ import annotations

import numpy as np

from pipeline.sources.source import Row, Source, as_png


class DigitsSource(Source):
    """Handwritten digits bundled with scikit-learn: 1,797 images of 8x8 pixels, 16 grey levels, ten classes."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        scans = load_digits()
        self.origin = "digits"
        self.classes = [str(digit) for digit in range(10)]
        self._pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)
        self.rows = [Row(str(i), int(label), f"digits/{i}", "train") for i, label in enumerate(scans.target)]

    def read(self, reference: str) -> bytes:
        """Encode the scan as PNG."""
        return as_png(self._pixels[int(reference)])
