"""Throughput of stage `embed` against the bare forward pass of its encoder: `python -m benchmarks.encoders`.

Both process the same number of photograph-sized JPEGs on the same cores, in turns in one process. The ratio is the median
over rounds, with the smallest and the largest. The bare forward pass has its images in memory and uses its fastest batch
size. `embed` also reads, decodes and resizes the JPEGs, and writes shards. Goal: at least 0.9.

  python -m benchmarks.encoders --encoder efficientnet_lite0 --size 224 --images 512
  python -m benchmarks.encoders --heads           # training on stored features: benchmarks/encoder_heads.py
  python -m benchmarks.encoders --memory 512 4096 # peak memory of `embed` for these numbers of images, a new process for each
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import shutil
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

import pipeline.embed
import pipeline.split
from benchmarks.encoder_heads import report, timed
from benchmarks.other_work import memory_mebibytes
from models.networks.encoders import ENCODERS
from pipeline.model_io.encoder import LoadedEncoder, load_encoder
from pipeline.params import Params, parse_params
from pipeline.shared.artifacts import EMBEDDINGS
from pipeline.shared.host_memory import keep_freed_memory

ROOT = Path(__file__).parents[1]
BATCHES = (8, 16, 32, 64)
SIDE = 320  # pixels of a JPEG
GOAL = 0.9
MEMORY_GOAL = 1.1  # peak of the largest number of images, as a multiple of that of the smallest


def prepared(name: str, size: int, images: int, root: Path) -> Params:
    """Generate a folder of JPEGs (smooth colours with noise, two classes), run stage split, and return the params."""
    draw = np.random.default_rng(0)
    for number in range(images):
        coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((SIDE, SIDE))
        noise = draw.integers(0, 16, (SIDE, SIDE, 3), dtype=np.uint8)
        path = root / f"images/{'ab'[number % 2]}/{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(coarse) // 2 + noise).save(path, quality=90)
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    encoder = ENCODERS[name]
    content["data"] |= {"source": "folder", "location": str(root / "images"), "profile": "natural", "test_per_class": 1}
    content["image"] |= {"size": size, "resize_to": size, "mean": list(encoder.mean), "std": list(encoder.std)}
    content["image"]["interpolation"] = encoder.interpolation
    content["encoder"] = {"name": name}
    for section in ("teacher", "student"):
        content[section]["backbone"] = "encoder"
        content[section]["augment"] |= {"crop_padding": 0}
    params = parse_params(content, Path("params.yaml"))
    pipeline.split.run(params)
    return params


@torch.inference_mode()
def bare(encoder: LoadedEncoder, images: Tensor, batch: int) -> None:
    """Run the forward pass alone, on normalised images."""
    for part in images.split(batch):
        encoder.network(part)


def peak_of_embed(params: Params) -> float:
    """Run stage embed in this process; returns the peak of its resident memory in MiB."""
    with contextlib.redirect_stderr(io.StringIO()):
        pipeline.embed.run(params)
    return memory_mebibytes("VmHWM")


def report_memory(name: str, size: int, counts: list[int]) -> bool:
    """Print the peak memory of stage embed for each number of images; returns whether the goal is met."""
    peaks = []
    for images in counts:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            params = prepared(name, size, images, Path(folder))
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                peaks.append(process.submit(peak_of_embed, params).result())
        print(f"embed of {images:,} images: peak {peaks[-1]:,.0f} MiB", flush=True)
    print(f"ratio of the last to the first {peaks[-1] / peaks[0]:.2f}, goal at most {MEMORY_GOAL}")
    return peaks[-1] <= MEMORY_GOAL * peaks[0]


def main() -> int:
    """Print images/s of both sides and their ratio; returns 0 if the goal is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="efficientnet_lite0", choices=list(ENCODERS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heads", action="store_true", help="time the training on features instead")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/photographs-lite0.yaml", help="for --heads")
    parser.add_argument("--memory", type=int, nargs="+", metavar="IMAGES", help="measure the peak memory instead")
    options = parser.parse_args()
    if options.memory:
        return 0 if report_memory(options.encoder, options.size, options.memory) else 1
    if options.heads:
        return 0 if report(options.recipe) else 1
    keep_freed_memory()  # as embed does, for both sides
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        params = prepared(options.encoder, options.size, options.images, Path(folder))
        encoder = load_encoder(params.encoder, params.image)
        encoder.network.to(memory_format=torch.channels_last)
        images = torch.randn(options.images, 3, options.size, options.size).to(memory_format=torch.channels_last)
        best = min(BATCHES, key=lambda batch: timed(lambda: bare(encoder, images[:128], batch))[0])
        overhead, _ = timed(lambda: load_encoder(params.encoder, params.image))
        sides = []
        for _ in range(options.rounds):
            shutil.rmtree(EMBEDDINGS, ignore_errors=True)
            with contextlib.redirect_stderr(io.StringIO()):
                embed = timed(lambda: pipeline.embed.run(params))[0] - overhead
            sides.append((options.images / embed, options.images / timed(lambda: bare(encoder, images, best))[0]))
    ratios = [embedded / forwarded for embedded, forwarded in sides]
    for label, column in (("embed", 0), (f"bare forward, batch {best}", 1)):
        print(f"{label}: {statistics.median(side[column] for side in sides):,.1f} images/s")
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"ratio {spread}, goal {GOAL}; {os.cpu_count()} CPU cores")
    return 0 if statistics.median(ratios) >= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
