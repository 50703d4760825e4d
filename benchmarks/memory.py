"""Size and latency of the served graph against the rows of its memory: `python -m benchmarks.memory`.

Each graph has an encoder, an adapter, a cosine classifier and a memory of K rows (0: none) in long-tailed classes, with random
weights. It runs in ONNX Runtime on the CPU. All graphs process the same pixels in turns in one process. Latency is the median
over rounds. The ratio is the median over rounds of a graph's time divided by that of the first graph. Accuracy by K:
`python -m benchmarks.encoder_accuracy plankton --size 112 --data DIR --memory-rows 512 1024 ...`.

  python -m benchmarks.memory --encoder efficientnet_lite0 --size 224 --rows 0 512 1024 2048 4096 24320
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F

from models.networks.adapters import feature_backbone, with_encoder
from models.networks.backbones import build_backbone
from models.networks.cosine_classifier import ImageClassifier
from models.networks.encoders import ENCODERS, Encoder
from models.networks.memory import FeatureMemory, MemoryRows
from pipeline.onnx_export.graph import ServedStudent, to_onnx

ADAPTER, TAU_S = 320, 1 / 30  # hidden units of an example adapter (photographs-lite0 has none), temperature tau_s
BATCHES = (1, 8)
OPSET = 20


def rows_of(rows: int, width: int, classes: int) -> MemoryRows:
    """Return random rows. Class c has at least one row, and a number in proportion to 1 / (c + 1)."""
    share = 1 / np.arange(1, classes + 1)
    lengths = np.maximum(1, np.floor(share / share.sum() * rows)).astype(int)
    lengths[0] += rows - lengths.sum()
    row_class = torch.from_numpy(np.repeat(np.arange(classes), lengths))
    log_share = -torch.from_numpy(lengths).log()[row_class].float()
    return MemoryRows(F.normalize(torch.randn(rows, width), dim=1).half(), log_share, row_class)


def graph(encoder: Encoder, size: int, classes: int, rows: int) -> bytes:
    """Export the ONNX graph of a student with a memory of `rows` rows."""
    network, width = build_backbone(f"timm/{encoder.model}", size), encoder.width
    memory = FeatureMemory(rows_of(rows, width, classes), classes, 0.07, 1.0) if rows else None
    head = feature_backbone(width, ADAPTER, with_input=rows > 0)
    model = ImageClassifier(with_encoder(network, head), classes, TAU_S, memory=memory)
    served = ServedStudent(model, list(encoder.mean), list(encoder.std), [0.0] * classes)
    return to_onnx(served.eval(), size, OPSET)


def main(arguments: list[str] | None = None) -> int:
    """Print a table row for each number of memory rows; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="efficientnet_lite0", choices=list(ENCODERS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=121)
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 512, 1024, 2048, 4096, 24320])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(arguments)
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    graphs = [graph(ENCODERS[options.encoder], options.size, options.classes, rows) for rows in options.rows]
    sessions = [onnxruntime.InferenceSession(each, settings, providers=["CPUExecutionProvider"]) for each in graphs]
    print("| rows | file, MiB |" + "".join(f" ms, {batch} images | ratio |" for batch in BATCHES))
    print("|--:|--:|" + "--:|--:|" * len(BATCHES))
    cells: list[list[str]] = [
        [f"{rows:,}", f"{len(each) / 2**20:.1f}"] for rows, each in zip(options.rows, graphs, strict=True)
    ]
    for batch in BATCHES:
        pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, options.size, options.size), dtype=np.uint8)
        inputs = {"image": pixels, "strength": np.zeros((batch, 1), np.float32)}
        times: list[list[float]] = []
        for _ in range(options.rounds + 1):  # the first round allocates memory
            times.append([])
            for session in sessions:
                started = time.perf_counter()
                session.run(["logits"], inputs)
                times[-1].append(time.perf_counter() - started)
        for number, row in enumerate(cells):
            own, first = [each[number] for each in times[1:]], [each[0] for each in times[1:]]
            ratio = statistics.median(one / other for one, other in zip(own, first, strict=True))
            row += [f"{1e3 * statistics.median(own):.1f}", f"{ratio:.2f}"]
    for row in cells:
        print(f"| {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
