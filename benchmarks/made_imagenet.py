"""Generate a data set with ImageNet-LT's sizes: list files, 1,000 classes of 1,280 to 5 images, photograph-like JPEGs.

The pictures are images of a Parquet pack (`image`: encoded bytes), or scikit-learn's digits, enlarged to the size of a
photograph, with noise until a file has as many bytes as a photograph. The data set is for speed measurements and for
tests of the path from files to a trained network; accuracies on it have no meaning.

  python -m benchmarks.made_imagenet FOLDER                      the whole set: 185,846 files, about 20 GB
  python -m benchmarks.made_imagenet FOLDER --scale 0.02 --pack PACK.parquet
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pipeline.data.published import PUBLISHED
from pipeline.shared.progress import progress_bar
from serving.shared.atomic import write_file

SHAPE = PUBLISHED["imagenet_lt"]
LISTS = {"train": "ImageNet_LT_train.txt", "validation": "ImageNet_LT_val.txt", "test": "ImageNet_LT_test.txt"}
QUALITY = 90
ROUGHNESS = 32  # noise amplitude of 255: a 500x375 file then has about 100 KB, as in ImageNet


def class_counts(classes: int, scale: float) -> dict[str, list[int]]:
    """Return the images per class by split, largest class first; at least one per class.

    Train has ImageNet-LT's largest and smallest class and its numbers of many-, medium- and few-shot classes. The curve
    is linear in the logarithm except in the head, which is bent so that the sum is ImageNet-LT's number of images.
    Fewer classes than 1,000 are sampled at equal distances.
    """
    low, high = 0.05, 1.0
    for _ in range(60):
        bend = (low + high) / 2
        low, high = (bend, high) if _curve(bend).sum() < SHAPE.images["train"] else (low, bend)
    chosen = np.round(np.linspace(0, SHAPE.classes - 1, classes)).astype(int)
    held_out = {split: SHAPE.images[split] // SHAPE.classes for split in ("validation", "test")}
    sizes = {"train": _curve(high)[chosen], **{split: np.full(classes, n) for split, n in held_out.items()}}
    return {split: np.maximum(1, np.round(counts * scale)).astype(int).tolist() for split, counts in sizes.items()}


def _curve(bend: float) -> np.ndarray:
    many, medium, few = (SHAPE.groups[group] for group in ("many", "medium", "few"))
    head = SHAPE.largest * (101 / SHAPE.largest) ** (np.linspace(0, 1, many) ** bend)
    return np.round(np.concatenate([head, np.geomspace(100, 20, medium), np.geomspace(19, SHAPE.smallest, few)]))


def make(
    folder: Path,
    *,
    classes: int = SHAPE.classes,
    scale: float = 1.0,
    pack: Path | None = None,
    size: tuple[int, int] = (500, 375),
    workers: int = 0,
) -> dict[str, int]:
    """Write the images and their list files under `folder`; return the images per split. Deterministic.

    size: width and height in pixels. workers: processes that generate images; 0 uses only this process.
    """
    entries = {
        split: [
            (f"{'val' if split == 'test' else 'train'}/n{label:08d}/{split}_{number}.JPEG", label)
            for label, count in enumerate(counts)
            for number in range(count)
        ]
        for split, counts in class_counts(classes, scale).items()
    }
    for split, images in entries.items():
        write_file(folder / LISTS[split], "".join(f"{path} {label}\n" for path, label in images))
    all_images = [entry for images in entries.values() for entry in images]
    tasks = [all_images[start : start + 64] for start in range(0, len(all_images), 64)]
    work = functools.partial(write_images, folder, pack, size)
    with progress_bar(unit="images") as progress, contextlib.ExitStack() as stack:
        run = stack.enter_context(ProcessPoolExecutor(workers)).map if workers else map
        bar = progress.add_task("images", total=len(all_images), rate="")
        for done in run(work, tasks):
            progress.update(bar, advance=done)
    return {split: len(images) for split, images in entries.items()}


def write_images(folder: Path, pack: Path | None, size: tuple[int, int], entries: list[tuple[str, int]]) -> int:
    """Write some of the images; return their number."""
    for path, label in entries:
        random = np.random.default_rng(list(path.encode()))
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(photograph(random, label, _pictures(pack), size))
    return len(entries)


def photograph(random: np.random.Generator, label: int, pictures: list[np.ndarray], size: tuple[int, int]) -> bytes:
    """Return a JPEG file: an enlarged picture with the tint of its class and noise."""
    picture = Image.fromarray(pictures[random.integers(len(pictures))]).resize(size, Image.Resampling.BICUBIC)
    tint = 0.6 + 0.4 * np.cos(2 * np.pi * (label * 0.618 + np.arange(3) / 3))
    rough = random.integers(-ROUGHNESS, ROUGHNESS + 1, (size[1], size[0], 1), dtype=np.int16)
    pixels = np.clip(np.asarray(picture) * tint + rough, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


@functools.cache
def _pictures(pack: Path | None) -> list[np.ndarray]:
    """Load up to 2,000 small pictures, uint8 [H,W,3]."""
    if pack is None:
        from sklearn.datasets import load_digits

        grey = np.round(load_digits().images[:2000] * (255 / 16)).astype(np.uint8)
        return [np.repeat(scan[:, :, None], 3, axis=2) for scan in grey]
    batch = next(pq.ParquetFile(pack).iter_batches(2000, columns=["image"]))
    return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in batch.column("image").to_pylist()]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Generate a data set with ImageNet-LT's sizes.")
    parser.add_argument("folder", type=Path, help="a new or empty folder, to be used as data.location")
    parser.add_argument("--scale", type=float, default=1.0, help="share of each class's images (default: all)")
    parser.add_argument("--classes", type=int, default=SHAPE.classes, help="(default: %(default)s)")
    parser.add_argument("--pack", type=Path, help="Parquet file with a column `image` (default: scikit-learn's digits)")
    parser.add_argument("--size", default="500x375", help="pixels (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="(default: one a core)")
    options = parser.parse_args(arguments)
    width, _, height = options.size.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        parser.error(f"argument --size: {options.size!r}; expected WIDTHxHEIGHT, for example 500x375")
    if not 0 < options.scale <= 1 or options.classes < 2:
        parser.error("expected --scale above 0 and at most 1, and --classes of at least 2")
    if options.pack and not options.pack.is_file():
        parser.error(f"argument --pack: {options.pack} is not a file; leave it out for digits")
    if options.folder.is_dir() and any(options.folder.iterdir()):
        parser.error(f"argument folder: {options.folder} is not empty; expected a new folder")
    sizes = make(
        options.folder, classes=options.classes, scale=options.scale, pack=options.pack, size=(int(width), int(height)),
        workers=options.workers,
    )  # fmt: skip
    print(f"{', '.join(f'{count:,} {split}' for split, count in sizes.items())} → {options.folder}")


if __name__ == "__main__":
    main()
