"""Write logs of logits in the server's format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from serving.repository.manifest import Manifest
from serving.triton.storage.logit_log import classes_sha256
from tests.support.logging_process import opened


def write_log(folder: Path, manifest: Manifest, logits: np.ndarray, **about: str) -> None:
    """Write logits to a log as a server does."""
    metadata = {
        "tailor_logits": "1",
        "version": str(manifest.version),
        "student_sha256": manifest.files["student.onnx"],
        "classes_sha256": classes_sha256(manifest.classes),
    } | about
    log, _ = opened(folder, logits.shape[1], limit=1 << 24, about=metadata)
    images = np.random.default_rng(0).integers(0, 256, (len(logits), 3, 2, 2), dtype=np.uint8)
    for start in range(0, len(logits), 100):
        log.offer(images[start : start + 100], logits[start : start + 100])
    log.close()
