"""BentoML server with adaptive batching: a worker per core, image files in (as in its documentation), JSON out.

The files are uncompressed (BMP), so that decoding has almost no cost.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import bentoml
import numpy as np
from PIL.Image import Image
from session import MAX_BATCH, PORT, WORKERS, Student


@bentoml.service(name="student", workers=WORKERS, traffic={"timeout": 60, "max_concurrency": 256})
class StudentService:
    def __init__(self) -> None:
        self.student = Student()

    # BentoML responds with status 503 when a batch takes longer than max_latency_ms.
    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=10_000)
    def predict(self, images: list[Image]) -> list[list[float]]:
        pixels = np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])
        return self.student.logits(pixels).tolist()


if __name__ == "__main__":
    folder = str(Path(__file__).parent)
    command = [sys.executable, "-m", "bentoml", "serve", "bentoml_server:StudentService", "--working-dir", folder]
    os.chdir(folder)
    sys.exit(subprocess.call([*command, "--host", "127.0.0.1", "--port", str(PORT)]))
