"""A golden request as a call of `student`, and the answer that its outputs mean: class probabilities, or shares of pixels."""

from __future__ import annotations

import numpy as np

from models.preprocess import decode, letterbox
from serving.repository.manifest import Golden, Manifest, served_probabilities


class StudentCall:
    """The inputs of `student` for one golden request, and the output that answers it.

    inputs: arrays with one row. output: name of the output. Raises ImageError for an image that cannot be decoded.
    """

    def __init__(self, manifest: Manifest, golden: Golden) -> None:
        self._manifest, self._strength = manifest, golden.strength
        strength = np.array([[golden.strength]], dtype=np.float32)
        canvas = manifest.segmentation
        if canvas is None:
            self.output, self._size = "logits", None
            self.inputs = {"image": manifest.image.pixels(golden.image_bytes())[None], "strength": strength}
            return
        image, self._size = letterbox(decode(golden.image_bytes()), canvas.height, canvas.width, canvas.fill)
        adjustment = strength * np.array(manifest.log_prior, dtype=np.float32)
        self.output, self._classes = "class_map", len(manifest.classes)
        self.inputs = {"image": image[None], "adjustment": adjustment}

    def answer(self, output: np.ndarray) -> tuple[list[int], list[float]]:
        """Indexes of all classes, best first, and their probabilities, from the output's row."""
        if self._size is None:
            manifest = self._manifest
            probability = served_probabilities(output, self._strength, manifest.log_prior, manifest.calibration)
        else:
            inside = output[: self._size[0], : self._size[1]]
            probability = np.bincount(inside.ravel(), minlength=self._classes) / inside.size
        best = np.argsort(-probability, kind="stable")
        return best.tolist(), probability[best].tolist()
