"""What the peers' servers share: the graph in ONNX Runtime on one thread, which as many processes run as there are cores.

Runs in the peers' environment, which has nothing of Tailor. What to serve comes in the environment of the process.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime

GRAPH = os.environ["BENCHMARK_GRAPH"]
PORT = int(os.environ["BENCHMARK_PORT"])
WORKERS = int(os.environ["BENCHMARK_WORKERS"])
MAX_BATCH = 32
BATCH_SECONDS = 0.001  # that a batch waits for more, where the peer wants a number; the best of 0, 1 and 10 ms


class Student:
    """The exported graph at strength 0."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(GRAPH, options, providers=["CPUExecutionProvider"])
        self.shape = tuple(self._session.get_inputs()[0].shape[1:])

    def pixels(self, data: bytes) -> np.ndarray:
        """uint8 [3,S,S] of a request's bytes."""
        return np.frombuffer(data, dtype=np.uint8).reshape(self.shape)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B,3,S,S] to float32 [B,C]."""
        strength = np.zeros((len(images), 1), dtype=np.float32)
        return self._session.run(["logits"], {"image": images, "strength": strength})[0]
