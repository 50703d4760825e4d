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

from benchmarks.machine import hardware, versions
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
    "pixels": "stream, crops alone (the rest of a view is the device's work)",
    "decode": "limit: decode, cut, resize alone",
    "libjpeg": "limit: libjpeg-turbo alone",
}


@dataclass(frozen=True)
class Given:
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


def dataloader_side(given: Given) -> dict[str, Work]:
    """The side of the torchvision DataLoader."""
    image = given.params.image
    # The augmentation of torchvision's reference training.
    steps = [transforms.RandomResizedCrop(image.size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    data = datasets.ImageFolder(given.root, transforms.Compose([*steps, transforms.Normalize(image.mean, image.std)]))
    loader = DataLoader(
        data, given.batch, shuffle=True, num_workers=given.workers, drop_last=True, persistent_workers=True
    )
    return {"epoch": every_round(lambda: [None for _ in loader] and None)}


def batches_of(given: Given) -> Iterator[tuple[Draws, torch.Tensor]]:
    """Yield an epoch of the stream: the augmentation draws of a batch and its crops, uint8 [B,1,3,224,224]."""
    augment, size = given.params.teacher.augment, given.params.image.size
    stream = ImageStream(*given.sections, "train", torch.device("cpu"), given.root, augment=augment)
    generator = torch.Generator().manual_seed(0)
    order = stream.order(generator)
    places = order[: len(order) // given.batch * given.batch].view(-1, given.batch)
    draws = [draw_views(given.batch, size, size, 1, augment, generator) for _ in places]
    with stream.feed(places, draws=draws) as feed:
        yield from zip(draws, feed, strict=True)


def loader_side(given: Given) -> dict[str, Work]:
    """The side of the stream with the engine's augmentation."""
    keep_freed_memory()
    normalised, augment = Normalisation(given.params.image, torch.device("cpu")), given.params.teacher.augment

    def work() -> None:
        for draws, pixels in batches_of(given):
            normalised(apply_views(pixels, draws, augment)[0])

    return {"epoch": every_round(work)}


def pixels_side(given: Given) -> dict[str, Work]:
    """The side of the stream without augmentation."""
    keep_freed_memory()
    return {"epoch": every_round(lambda: [None for _ in batches_of(given)] and None)}


def limit_side(given: Given, work: Callable[[bytes], object]) -> dict[str, Work]:
    """A side that calls `work` on the bytes of every image of an epoch, in threads."""
    keep_freed_memory()
    warnings.simplefilter("ignore", DeprecationWarning)
    encoded = [path.read_bytes() for path in sorted(given.root.glob("*/*.jpg"))]
    encoded = encoded[: len(encoded) // given.batch * given.batch]

    def part(first: int) -> None:
        for data in encoded[first : first + 16]:
            work(data)

    def epoch() -> None:
        with ThreadPoolExecutor(given.workers) as pool:
            list(pool.map(part, range(0, len(encoded), 16)))

    return {"epoch": every_round(epoch)}


def decode_side(given: Given) -> dict[str, Work]:
    """The limit for the stream's work per image: decode, crop, resize."""
    image, scale = given.params.image, given.params.teacher.augment.crop_scale
    generator = torch.Generator().manual_seed(0)

    def work(data: bytes) -> None:
        pixels = decode_original(data, enough_pixels(image, scale))
        sides = (torch.tensor(side) for side in pixels.shape[1:])
        box = boxes_of(draw_chances(1, generator)[0], *sides, scale)
        crop_and_resize(pixels, [*box.tolist(), 0], image)

    return limit_side(given, work)


def libjpeg_side(given: Given) -> dict[str, Work]:
    """The limit for decoding only (libjpeg-turbo)."""
    rgb = torchvision.io.ImageReadMode.RGB
    return limit_side(
        given, lambda data: torchvision.io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), rgb)
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


def wait_share(given: Given, device: torch.device, backbone: str) -> float:
    """Return the fraction of the second epoch (after warm-up) that training steps wait for data."""
    model = ImageClassifier(backbone, CLASSES, 1 / 30)
    objective = TeacherObjective(model, torch.full((CLASSES,), -np.log(CLASSES)), 1.0)
    # Steps on a CPU are slow: the small split is enough.
    split, batch = ("train", given.batch) if device.type == "cuda" else ("few", 16)
    section = given.params.teacher.model_copy(update={"batch_size": batch, "epochs": 2})
    train = ImageStream(*given.sections, split, device, given.root, augment=section.augment)
    held_out = ImageStream(*given.sections, "none", device, given.root)
    history = Training("teacher", objective, section, given.params.image, 0, device).run(train, held_out)
    return history[-1]["data_wait"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The streaming loader against a plain DataLoader: one table of ratios.",
        epilog="example: python -m benchmarks.loader --data FOLDER --output benchmarks/results/loader-cpu.md",
    )
    parser.add_argument("--data", type=Path, help=f"folder with {PACK} (default: made pictures)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--images", type=int, default=512, help="photographs, an epoch (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each side (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="(default: one a core)")
    parser.add_argument("--backbone", help="of the step that waits (default: torchvision/resnet18, resnet50 on CUDA)")
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no CUDA device here; run with --device cpu")
    if arguments.data and not (arguments.data / PACK).is_file():
        parser.error(f"argument --data: {arguments.data} has no {PACK}; leave --data out for made pictures")
    if arguments.images < arguments.batch:
        parser.error(f"argument --images: {arguments.images} fill no batch of {arguments.batch}")
    return arguments


def main() -> None:
    arguments = parse()
    cuda = arguments.device == "cuda"
    backbone = arguments.backbone or ("torchvision/resnet50" if cuda else "torchvision/resnet18")
    words = ["FOLDER" if word == str(arguments.data) else word for word in sys.argv[1:]]
    waiting = os.environ.get("OMP_WAIT_POLICY")
    text = f"`{f'OMP_WAIT_POLICY={waiting} ' if waiting else ''}python -m benchmarks.loader {' '.join(words)}`\n\n"
    text += f"{hardware(arguments.device)}; {versions(1)}.\n"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        photographs(root, arguments.images, arguments.data and arguments.data / PACK)
        size = sum(path.stat().st_size for path in root.glob("*/*.jpg")) / arguments.images / 1024
        images = arguments.images // arguments.batch * arguments.batch
        text += (
            f"{images} JPEGs an epoch, 500x375 and the like, {size:.0f} KiB each; batches of {arguments.batch}; "
            f"{arguments.workers} workers on each side; median of {arguments.rounds} epochs, of which one more was dropped.\n\n"
        )
        given = Given(root, recipe(root, arguments.workers, "cpu"), arguments.batch, arguments.workers)
        others = OtherWork()
        costs = in_turns(SIDES, given, ["epoch"], arguments.rounds, 1)["epoch"]
        text += table(costs, images, others.share())
        print(text, flush=True)
        given = Given(root, recipe(root, arguments.workers, arguments.device), arguments.batch, arguments.workers)
        share = wait_share(given, torch.device(arguments.device), backbone)
    text += (
        f"\nGoals: stream over DataLoader ≥ {RATIO_GOAL}; pixels ≥ {LIMIT_GOAL:.0%} of the decoding limit.\n\n"
        "| training step | waits for data | goal |\n|---|--:|--:|\n"
        f"| {backbone}, teacher, {arguments.device} | {share:.1%} | < {WAIT_GOAL:.0%} |\n"
    )
    if not cuda:
        text += (
            f"| torchvision/resnet50, teacher, cuda | | < {WAIT_GOAL:.0%} |\n\nOn a GPU: not run yet, none was at hand. "
            "`python -m benchmarks.loader --data FOLDER --device cuda --images 4096 --batch 256` fills the last row.\n"
        )
    print(text)
    if arguments.output:
        write_file(arguments.output, text)


if __name__ == "__main__":
    main()
