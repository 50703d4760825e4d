"""The streaming loader against a torchvision DataLoader: `python -m benchmarks.loader [--data FOLDER] [--device cuda]`.

Both read the same photograph-sized JPEGs from disk on the same cores and return the same kind of batch: float32
[B,3,224,224], random resized crop, flip, normalised. The DataLoader uses worker processes with Pillow (ImageFolder,
RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize). The stream decodes, crops and resizes in threads; the
rest of the augmentation runs in batches on the device (on a CPU, the same cores). Each side runs in a separate process,
in turns, round by round; a ratio is the median over rounds, with the smallest and the largest.

Upper limits, with as many threads and the files in memory: libjpeg-turbo alone, and the stream's work per image
(decode, crop, resize). The JPEGs are generated: mosaics of pictures of the pack, or of random ones.

  python -m benchmarks.loader --data FOLDER --output benchmarks/results/loader-cpu.md
  python -m benchmarks.loader --data FOLDER --device cuda --output benchmarks/results/loader-cuda.md
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision.io
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.machine import add_device_option, gpu_note, hardware, versions
from benchmarks.other_work import OtherWork, quiet_ratio
from benchmarks.photographs import CLASSES, PACK, photographs
from benchmarks.turns import Cost, Turn, Work, in_turns
from models.networks.cosine_classifier import ImageClassifier
from models.objectives.teacher import TeacherObjective
from pipeline.augment import Draws, apply_views, draw_views
from pipeline.augment.crops import boxes_of, draw_chances
from pipeline.data.dataset import Normalisation
from pipeline.data.stream import ImageStream
from pipeline.data.stream_decoding import crop_and_resize, decode_original, enough_pixels
from pipeline.params import PARAMS_FILE, DataParams, ImageParams, Params, StreamParams, parse_params, read_yaml
from pipeline.shared.host_memory import keep_freed_memory
from pipeline.training.engine import Training
from serving.shared.atomic import write_file

RATIO_GOAL, LIMIT_GOAL, WAIT_GOAL = 1.5, 0.9, 0.05
NAMES = {
    "dataloader": "torchvision DataLoader, Pillow",
    "loader": "stream, views made on the CPU",
    "pixels": "stream, crops alone (without the other augmentation)",
    "decode": "limit: decode, crop, resize alone",
    "libjpeg": "limit: libjpeg-turbo alone",
}


@dataclass(frozen=True)
class LoaderInput:
    """Input of every side: folder of photographs, params for it, batch size, number of worker threads or processes."""

    root: Path
    params: Params
    batch: int
    workers: int

    @property
    def sections(self) -> tuple[DataParams, ImageParams, StreamParams]:
        """The params sections that ImageStream takes."""
        return self.params.data, self.params.image, self.params.stream


def recipe(root: Path, workers: int, device: str) -> Params:
    """Return the shipped params with ImageNet's sizes and augmentation, streaming from the photographs."""
    content = read_yaml(PARAMS_FILE)
    content["data"] |= {"source": "folder", "location": str(root)}
    content["stream"] = {"mode": "on", "workers": workers, "decode": "gpu" if device == "cuda" else "fast"}
    content["image"] = {"size": 224, "resize_to": 256, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    content["teacher"]["augment"] |= {"crop": "resized", "flip": True}
    return parse_params(content, PARAMS_FILE)


def every_round(work: Callable[[], None]) -> Callable[[int, Turn], None]:
    """Return a row's work that calls `work` in each round."""

    def rounds_of(rounds: int, turn: Turn) -> None:
        for _ in range(rounds):
            work()
            turn()

    return rounds_of


def dataloader_side(source: LoaderInput) -> dict[str, Work]:
    """The side of the torchvision DataLoader."""
    image = source.params.image
    # The augmentation of torchvision's reference training.
    steps = [transforms.RandomResizedCrop(image.size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    data = datasets.ImageFolder(source.root, transforms.Compose([*steps, transforms.Normalize(image.mean, image.std)]))
    loader = DataLoader(
        data, source.batch, shuffle=True, num_workers=source.workers, drop_last=True, persistent_workers=True
    )
    return {"epoch": every_round(lambda: [None for _ in loader] and None)}


def batches_of(source: LoaderInput) -> Iterator[tuple[Draws, torch.Tensor]]:
    """Yield an epoch of the stream: the augmentation draws of a batch and its crops, uint8 [B,1,3,224,224]."""
    augment, size = source.params.teacher.augment, source.params.image.size
    stream = ImageStream(*source.sections, "train", torch.device("cpu"), source.root, augment=augment)
    generator = torch.Generator().manual_seed(0)
    order = stream.order(generator)
    batches = order[: len(order) // source.batch * source.batch].view(-1, source.batch)
    draws = [draw_views(source.batch, size, size, 1, augment, generator) for _ in batches]
    with stream.feed(batches, draws=draws) as feed:
        yield from zip(draws, feed, strict=True)


def loader_side(source: LoaderInput) -> dict[str, Work]:
    """The side of the stream with the engine's augmentation."""
    keep_freed_memory()
    normalised, augment = Normalisation(source.params.image, torch.device("cpu")), source.params.teacher.augment

    def work() -> None:
        for draws, pixels in batches_of(source):
            normalised(apply_views(pixels, draws, augment)[0])

    return {"epoch": every_round(work)}


def pixels_side(source: LoaderInput) -> dict[str, Work]:
    """The side of the stream without augmentation."""
    keep_freed_memory()
    return {"epoch": every_round(lambda: [None for _ in batches_of(source)] and None)}


def limit_side(source: LoaderInput, work: Callable[[bytes], object]) -> dict[str, Work]:
    """A side that calls `work` on the bytes of every image of an epoch, in threads."""
    keep_freed_memory()
    warnings.simplefilter("ignore", DeprecationWarning)
    encoded = [path.read_bytes() for path in sorted(source.root.glob("*/*.jpg"))]
    encoded = encoded[: len(encoded) // source.batch * source.batch]

    def part(first: int) -> None:
        for data in encoded[first : first + 16]:
            work(data)

    def epoch() -> None:
        with ThreadPoolExecutor(source.workers) as pool:
            list(pool.map(part, range(0, len(encoded), 16)))

    return {"epoch": every_round(epoch)}


def decode_side(source: LoaderInput) -> dict[str, Work]:
    """The limit for the stream's work per image: decode, crop, resize."""
    image, scale = source.params.image, source.params.teacher.augment.crop_scale
    generator = torch.Generator().manual_seed(0)

    def work(data: bytes) -> None:
        pixels = decode_original(data, enough_pixels(image, scale))
        sides = (torch.tensor(side) for side in pixels.shape[1:])
        box = boxes_of(draw_chances(1, generator)[0], *sides, scale)
        crop_and_resize(pixels, [*box.tolist(), 0], image)

    return limit_side(source, work)


def libjpeg_side(source: LoaderInput) -> dict[str, Work]:
    """The limit for decoding only (libjpeg-turbo)."""
    rgb = torchvision.io.ImageReadMode.RGB
    return limit_side(
        source, lambda data: torchvision.io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), rgb)
    )


SIDES = {
    "dataloader": dataloader_side,
    "loader": loader_side,
    "pixels": pixels_side,
    "decode": decode_side,
    "libjpeg": libjpeg_side,
}


def table(costs: dict[str, list[Cost]], images: int, others: float) -> str:
    """Markdown table: speed of each side, and ratios to the DataLoader by wall time (with range) and CPU time."""
    lines = ["| | images/s | over the DataLoader | smallest to largest | in processor time | of the decoding limit |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for name, taken in costs.items():
        wall, cpu = (
            [getattr(a, kind) / getattr(b, kind) for a, b in zip(costs["dataloader"], taken, strict=True)]
            for kind in ("wall", "cpu")
        )
        limit = [a.wall / b.wall for a, b in zip(costs["decode"], taken, strict=True)]
        speed = images / statistics.median(cost.wall for cost in taken)
        ratio = quiet_ratio(f"{statistics.median(wall):.2f}", others)
        lines.append(
            f"| {NAMES[name]} | {speed:,.0f} | {ratio} | {min(wall):.2f} to {max(wall):.2f} "
            f"| {statistics.median(cpu):.2f} | {statistics.median(limit):.0%} |"
        )
    return "\n".join(lines) + "\n"


def wait_share(source: LoaderInput, device: torch.device, backbone: str) -> float:
    """Return the fraction of the second epoch (after warm-up) that training steps wait for data."""
    model = ImageClassifier(backbone, CLASSES, 1 / 30)
    objective = TeacherObjective(model, torch.full((CLASSES,), -np.log(CLASSES)), 1.0)
    # Steps on a CPU are slow: the small split is enough.
    split, batch = ("train", source.batch) if device.type == "cuda" else ("few", 16)
    section = source.params.teacher.model_copy(update={"batch_size": batch, "epochs": 2})
    train = ImageStream(*source.sections, split, device, source.root, augment=section.augment)
    validation = ImageStream(*source.sections, "none", device, source.root)
    history = Training("teacher", objective, section, source.params.image, 0, device).run(train, validation)
    return history[-1]["data_wait"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The streaming loader against a plain DataLoader: one table of ratios.",
        epilog="example: python -m benchmarks.loader --data FOLDER --output benchmarks/results/loader-cpu.md",
    )
    parser.add_argument("--data", type=Path, help=f"folder with {PACK} (default: generated pictures)")
    add_device_option(parser)
    parser.add_argument("--images", type=int, default=512, help="photographs, an epoch (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each side (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="(default: one a core)")
    parser.add_argument("--backbone", help="of the training step (default: torchvision/resnet18, resnet50 on CUDA)")
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    arguments = parser.parse_args()
    if arguments.data and not (arguments.data / PACK).is_file():
        parser.error(f"argument --data: {arguments.data} has no {PACK}; leave --data out for generated pictures")
    if arguments.images < arguments.batch:
        parser.error(f"argument --images: {arguments.images} fill no batch of {arguments.batch}")
    return arguments


def main() -> None:
    arguments = parse()
    cuda = arguments.device == "cuda"
    backbone = arguments.backbone or ("torchvision/resnet50" if cuda else "torchvision/resnet18")
    command = ["FOLDER" if word == str(arguments.data) else word for word in sys.argv[1:]]
    wait_policy = os.environ.get("OMP_WAIT_POLICY")
    text = f"`{f'OMP_WAIT_POLICY={wait_policy} ' if wait_policy else ''}python -m benchmarks.loader {' '.join(command)}`\n\n"
    text += f"{hardware(arguments.device)}; {versions(1)}.\n"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        photographs(root, arguments.images, arguments.data and arguments.data / PACK)
        size = sum(path.stat().st_size for path in root.glob("*/*.jpg")) / arguments.images / 1024
        images = arguments.images // arguments.batch * arguments.batch
        text += (
            f"{images} JPEGs an epoch, 500x375 and the like, {size:.0f} KiB each; batches of {arguments.batch}; "
            f"{arguments.workers} workers on each side; median of {arguments.rounds} epochs, after one warm-up epoch.\n\n"
        )
        source = LoaderInput(root, recipe(root, arguments.workers, "cpu"), arguments.batch, arguments.workers)
        others = OtherWork()
        costs = in_turns(SIDES, source, ["epoch"], arguments.rounds, 1)["epoch"]
        text += table(costs, images, others.share())
        print(text, flush=True)
        source = LoaderInput(
            root, recipe(root, arguments.workers, arguments.device), arguments.batch, arguments.workers
        )
        share = wait_share(source, torch.device(arguments.device), backbone)
    text += (
        f"\nGoals: stream over DataLoader ≥ {RATIO_GOAL}; pixels ≥ {LIMIT_GOAL:.0%} of the decoding limit.\n\n"
        "| training step | waits for data | goal |\n|---|--:|--:|\n"
        f"| {backbone}, teacher, {arguments.device} | {share:.1%} | < {WAIT_GOAL:.0%} |\n"
    )
    if not cuda:
        text += gpu_note("python -m benchmarks.loader --data FOLDER --device cuda --images 4096 --batch 256")
    print(text)
    if arguments.output:
        write_file(arguments.output, text)


if __name__ == "__main__":
    main()
