"""`python -m pipeline.flows.latency A.onnx [B.onnx]`: measure ms per image in ONNX Runtime, on one CPU thread.

Runs in a separate process, because a graph can crash the process that runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from serving.shared.terminal import print

ROUNDS = 100
WARM_UP = 10
TIMEOUT = 120.0  # seconds


def measure_latency(graphs: Sequence[Path]) -> list[float] | None:
    """Median milliseconds per image of each graph, measured in turns; None if the measurement fails or times out."""
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-P", "-m", "pipeline.flows.latency", *map(str, graphs)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        return json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError):
        return None


def main(paths: Sequence[str]) -> int:
    """Measure the graphs and print the medians in milliseconds as a JSON list."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in paths]
    random = np.random.default_rng(0)
    inputs = []
    for session in sessions:
        image, second = session.get_inputs()  # and `strength`, or `adjustment` of task segmentation
        pixels = random.integers(0, 256, (1, *image.shape[1:]), dtype=np.uint8)
        inputs.append({image.name: pixels, second.name: np.zeros((1, second.shape[1]), dtype=np.float32)})
    durations: list[list[float]] = [[] for _ in sessions]
    for _ in range(WARM_UP + ROUNDS):
        for session, feed, milliseconds in zip(sessions, inputs, durations, strict=True):
            started = time.perf_counter()
            session.run([session.get_outputs()[0].name], feed)
            milliseconds.append((time.perf_counter() - started) * 1000)
    print(json.dumps([median(milliseconds[WARM_UP:]) for milliseconds in durations]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
