"""ONNX Runtime session shared by the peer servers: the graph on one thread; the servers run one process per core.

Runs in the peers' environment, without Tailor. Environment variables name the graph and the port.
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
BATCH_SECONDS = 0.001  # wait for a batch to fill, for peers that need a value; the best of 0, 1 and 10 ms


class Student:
    """The exported student graph at strength 0."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(GRAPH, options, providers=["CPUExecutionProvider"])
        self.shape = tuple(self._session.get_inputs()[0].shape[1:])

    def pixels(self, data: bytes) -> np.ndarray:
        """Return a request's bytes as uint8 [3,S,S]."""
        return np.frombuffer(data, dtype=np.uint8).reshape(self.shape)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Compute logits float32 [B,C] of images uint8 [B,3,S,S]."""
        strength = np.zeros((len(images), 1), dtype=np.float32)
        return self._session.run(["logits"], {"image": images, "strength": strength})[0]
