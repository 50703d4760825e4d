"""CPU cost of logging logits: `python -m benchmarks.logit_log [--images 20000]`.

CPU time per image of the request thread (time.thread_time): `LogitLog.offer` for batches of 8 images of 224 x 224,
compared with decoding and resizing one JPEG of 500 x 375 per image, which the same thread does. Also the CPU time per
image of the log's writer thread until all rows are on disk. Minimum of three rounds.
"""

from __future__ import annotations

import argparse
import io
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.other_work import OtherWork, load_average, processor
from models.preprocess import preprocess
from serving.triton.storage import folder_files
from serving.triton.storage.logit_log import LOST, LogitLog

BATCH, SIZE = 8, 224
ABOUT = {"tailor_logits": "1", "version": "1", "student_sha256": "", "classes_sha256": ""}


class Uncounted:
    """Metrics that are not read; rows lost by the log end the benchmark, since they would distort the figures."""

    def count(self, family: str, number: int = 1, reason: str = "") -> None:
        """Exit when rows are lost."""
        if family == LOST:
            raise SystemExit(f"logit_log: {number} images were lost ({reason}); give fewer --images")


def seconds_of_decoding() -> float:
    """Return the CPU seconds of decoding and resizing one photograph-like JPEG."""
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (47, 63, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    best = float("inf")
    for _ in range(3):
        began = time.thread_time()
        for _ in range(100):
            preprocess(stream.getvalue(), SIZE, 256)
        best = min(best, (time.thread_time() - began) / 100)
    return best


def seconds_of_logging(classes: int, share: float, images: int) -> tuple[float, float]:
    """Return CPU seconds per image: of the request thread, and of the log's writer thread."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (BATCH, 3, SIZE, SIZE), dtype=np.uint8)
    logits = random.normal(size=(BATCH, classes))
    batches = max(1, images // BATCH)
    with tempfile.TemporaryDirectory() as folder:
        log = LogitLog(Path(folder), share, 1 << 30, classes, ABOUT, [pixels[0] ^ 1], Uncounted(), folder_files)
        whole, requests = time.process_time(), 0.0
        for index in range(batches):
            began = time.thread_time()
            log.offer(pixels, logits)
            requests += time.thread_time() - began
            if index % max(1, (1 << 20) // (BATCH * classes)) == 0:
                log.write()  # written here, so that no rows are lost at any batch rate
        log.close()
        whole = time.process_time() - whole
    return requests / (batches * BATCH), max(0.0, whole - requests) / (batches * BATCH)


def main() -> None:
    """Run the measurement and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.logit_log", description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=20_000, help="images a row (default: %(default)s)")
    images = parser.parse_args().images
    others = OtherWork()
    decoding = seconds_of_decoding()
    print(f"`python -m benchmarks.logit_log --images {images}`\n")
    print(f"{processor()}; numpy {np.__version__}, Python {platform.python_version()}; load average {load_average()}.")
    print(f"Decoding and resizing one JPEG: {decoding * 1e6:.0f} µs.\n")
    print("| classes | share | µs an image, request thread | of decoding | µs an image, writer thread |")
    print("|--:|--:|--:|--:|--:|")
    for classes in (10, 1000, 8142):
        for share in (0.01, 1.0):
            number = images if share < 1 else max(BATCH, min(images, 4_000_000 // classes))
            costs = [seconds_of_logging(classes, share, number) for _ in range(3)]
            requests, writing = (min(column) for column in zip(*costs, strict=True))
            ratio = others.ratio(f"{requests / decoding:.4f}")
            print(f"| {classes} | {share:g} | {requests * 1e6:.2f} | {ratio} | {writing * 1e6:.2f} |", flush=True)


if __name__ == "__main__":
    main()
