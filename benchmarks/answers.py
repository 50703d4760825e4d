"""CPU cost of the extra parts of an answer: `python -m benchmarks.answers [--requests 4000]`.

CPU time per image of the request thread (time.thread_time) in the classifier, batches of 8 requests of one image each:
calibration, logit adjustment and softmax, then prediction set, decision by costs and ask, and unknown, each beside the CPU
time of ResNet-32 at 32 pixels in ONNX Runtime on one thread, batches of 8. Minimum of three rounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.other_work import OtherWork, load_average, processor
from models import decisions, prior, taxonomy
from models.networks.cosine_classifier import ImageClassifier
from pipeline.onnx_export.graph import ServedStudent, to_onnx
from serving.triton.extras import Extras, Wanted

BATCH, SIZE, SCORES = 8, 32, 2000  # requests, pixels, validation images


def microseconds(work: Callable[[], object], repeats: int) -> float:
    """Return the CPU time of one image in µs: minimum of three rounds."""
    best = float("inf")
    for _ in range(3):
        began = time.thread_time()
        for _ in range(repeats):
            work()
        best = min(best, (time.thread_time() - began) / repeats / BATCH)
    return best * 1e6


def of_network(classes: int, repeats: int) -> float:
    """CPU time of one image in the network, on this thread."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    model = ImageClassifier("resnet32", classes, 1 / 30)
    served = ServedStudent(model, [0.5] * 3, [0.25] * 3, [0.0] * classes).eval()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(to_onnx(served, SIZE, 20), options, providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, 3, SIZE, SIZE), dtype=np.uint8)
    inputs = {"image": pixels, "strength": np.zeros((BATCH, 1), np.float32)}
    return microseconds(lambda: session.run(["logits"], inputs), repeats)


def of_answers(classes: int, repeats: int) -> dict[str, float]:
    """CPU time of one image without extras, and of each extra part."""
    random = np.random.default_rng(0)
    counts = np.maximum(1000 * 0.01 ** np.linspace(0, 1, classes), 5).astype(int)
    label = random.integers(0, classes, SCORES)
    manifest = {
        "counts": counts.tolist(), "log_prior": prior.log_class_prior(counts).tolist(),
        "sets": {"scores": [random.uniform(size=(label == c).sum()).tolist() for c in range(classes)], "interpolation": 0.5},
        "unknown": {"scores": {group: random.normal(size=600).tolist() for group in prior.GROUPS}},
    }  # fmt: skip
    names = np.array([f"class {c}".encode() for c in range(classes)], dtype=np.object_)
    extras = Extras(manifest, names, SimpleNamespace(), prior, decisions, taxonomy)
    logits = 4 * random.normal(size=(BATCH, classes)).astype(np.float32)
    log_prior, strength = extras.log_prior, np.ones((1, 1))

    def plain() -> np.ndarray:
        calibrated = prior.calibrate_logits(logits.astype(np.float64), 1.3)
        return prior.softmax(prior.adjust_logits(calibrated, log_prior, np.ones((BATCH, 1))))

    probability, calibrated = plain(), logits / 1.3
    costs = random.uniform(size=classes)
    parts = {
        "prediction set": Wanted([0.9], None, None, None, None),
        "decision": Wanted(None, [costs], [0.2], None, None),
        "unknown": Wanted(None, None, None, [0.05], None),
        "all three": Wanted([0.9], [costs], [0.2], [0.05], None),
    }
    times = {"calibration, adjustment, softmax": microseconds(plain, repeats)}
    for name, wanted in parts.items():
        parsed = SimpleNamespace(extras=wanted, log_prior=log_prior, strength=strength)

        def answer(parsed: SimpleNamespace = parsed) -> None:
            for row in range(BATCH):
                extras.outputs(parsed, calibrated[row : row + 1], probability[row : row + 1])

        times[name] = microseconds(answer, repeats)
    return times


def main() -> None:
    """Run the measurement and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.answers", description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=4000, help="requests a row (default: %(default)s)")
    requests = parser.parse_args().requests
    repeats, others = max(1, requests // BATCH), OtherWork()
    torch.manual_seed(0)
    print(f"`python -m benchmarks.answers --requests {requests}`\n")
    print(
        f"{processor()}; numpy {np.__version__}, Python {platform.python_version()}; load average {load_average()}.\n"
    )
    print("| classes | part | µs an image | share of ResNet-32 |")
    print("|--:|---|--:|--:|")
    for classes in (10, 100, 1000):
        network = of_network(classes, max(1, repeats // 10))
        print(f"| {classes} | ResNet-32 in ONNX Runtime | {network:.0f} | |", flush=True)
        for name, each in of_answers(classes, repeats).items():
            print(f"| {classes} | {name} | {each:.1f} | {others.ratio(f'{each / network:.1%}')} |", flush=True)


if __name__ == "__main__":
    main()
