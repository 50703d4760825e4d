"""`tailor init`: choose params for a folder of images, and write them to params.yaml with the reason for each value."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.preprocess import ImageError, decode
from models.prior import GROUPS, shot_group
from models.sample_size import SampleSize, sample_sizes
from pipeline.data.profiles import test_size, validation_size
from pipeline.params import Params, parse_params
from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources.folder import FolderSource
from pipeline.sources.source import Row
from serving.shared.terminal import counted

DECODED_IMAGES = 300  # at most about this number
SMALL, TINY_PHOTOGRAPH = 40, 96  # pixels of the shorter side
LARGEST_QUEUE = 65536  # the paper's value for iNaturalist 2018
TEST_SHARE, MOST_TESTED = 0.2, 50  # per class; 50 at most, because all classes have equal weight in the metrics
VALIDATION_SHARE, MOST_VALIDATED = 0.1, 20


@dataclass(frozen=True)
class FolderSummary:
    """Summary of a folder of images. counts: training images of each class; shorter: median shorter side in pixels.

    tested: images of each class in a test folder; None if there is no test folder.
    """

    classes: list[str]
    counts: list[int]
    tested: list[int] | None
    own_validation: bool
    shorter: int
    unreadable: list[str]
    remarks: list[str] = field(default_factory=list)

    @property
    def imbalance(self) -> float:
        """Images of the largest class / images of the smallest class."""
        return max(self.counts) / min(self.counts)

    def __str__(self) -> str:
        groups = [shot_group(count) for count in self.counts]
        shots = ", ".join(f"{groups.count(group)} {group}" for group in GROUPS)
        return (
            f"{counted(sum(self.counts), 'image')} of {counted(len(self.counts), 'class')} "
            f"({max(self.counts):,} to {min(self.counts):,} a "
            f"class, imbalance factor {self.imbalance:,.1f}; {shots}); shorter side {self.shorter} pixels in the median"
        )


def inspect_folder(folder: Path) -> FolderSummary:
    """Count a folder's images, and decode about 300 of them, evenly spread, to measure their sizes.

    Raises ParamsError if the folder does not exist, DataError if it has no classes or no readable image.
    """
    if not folder.is_dir():
        raise ParamsError(f"{folder}: no such folder; expected one that holds a folder of images for each class")
    source = FolderSource(folder)
    train = [row for row in source.rows if row.split == "train"]
    counts = np.bincount([row.label for row in train], minlength=len(source.classes)).tolist()
    sides, unreadable = [], []
    for row in source.rows[:: max(1, len(source.rows) // DECODED_IMAGES)]:
        side = _shorter_side(source, row)
        if side is None:
            unreadable.append(row.reference)
        else:
            sides.append(side)
    if not sides:
        raise DataError(
            f"{folder}: none of {counted(len(unreadable), 'inspected image')} can be read; the first: {unreadable[0]}"
        )
    test = [row.label for row in source.rows if row.split == "test"]
    tested = np.bincount(test, minlength=len(source.classes)).tolist() if test else None
    own_validation = any(row.split == "validation" for row in source.rows)
    median = round(statistics.median(sides))
    return FolderSummary(source.classes, counts, tested, own_validation, median, unreadable, source.remarks)


def _shorter_side(source: FolderSource, row: Row) -> int | None:
    try:
        return min(decode(source.read(row.reference)).size)
    except (DataError, ImageError):
        return None


def suggest_params(summary: FolderSummary, location: str, gpu: bool) -> dict[str, tuple[Any, str]]:
    """Choose params: dotted key of params.yaml → (value, reason). gpu: whether training will run on a GPU.

    Raises DataError if a class is too small to hold out a test image.
    """
    total, classes, smallest = sum(summary.counts), len(summary.counts), min(summary.counts)
    tail = f"your own class sizes: {counted(max(summary.counts), 'image')} to {smallest:,}"
    suggested: dict[str, tuple[Any, str]] = {
        "data.source": ("folder", "a folder per class"),
        "data.location": (location, "your images"),
        "data.profile": ("natural", tail),
    }
    if summary.tested is None:
        if smallest < 2:
            name = summary.classes[summary.counts.index(smallest)]
            raise DataError(
                f"class {name!r} has 1 image: none remains for training after one is held out; add images, merge the "
                "class into another, or add a test/ folder of your own"
            )
        total -= sum(test_size(count, MOST_TESTED, TEST_SHARE) for count in summary.counts)
        reason = "of each class, at least one image; see docs/own-images.md"
        suggested["data.test_per_class"] = (MOST_TESTED, "at most; fewer for small classes, see the next line")
        suggested["data.test_share"] = (TEST_SHARE, reason)
    if not summary.own_validation:
        suggested["data.validation_per_class"] = (MOST_VALIDATED, "at most; fewer for small classes, see the next line")
        suggested["data.validation_share"] = (VALIDATION_SHARE, "of the training images of a class")
    suggested |= _network(summary, total, gpu) | _queues(total, classes)
    top = min(5, classes)
    return suggested | {"evaluate.top_k": (top, "of your classes"), "serving.top_k": (top, "classes per response")}


def expected_tests(summary: FolderSummary) -> dict[str, SampleSize]:
    """Sample sizes of the test split that results from `suggest_params`, for all classes and by its shot groups."""
    counts, tested = summary.counts, summary.tested
    if tested is None:
        tested = [test_size(count, MOST_TESTED, TEST_SHARE) for count in counts]
        counts = [count - size for count, size in zip(counts, tested, strict=True)]
    if not summary.own_validation:
        counts = [count - validation_size(count, 0, MOST_VALIDATED, VALIDATION_SHARE) for count in counts]
    return sample_sizes(tested, [shot_group(count) for count in counts])


def _network(summary: FolderSummary, total: int, gpu: bool) -> dict[str, tuple[Any, str]]:
    """Choose image size, backbone, batch size, epochs, learning rate, augmentation; equal for teacher and student."""
    size, resize, backbone, why = _backbone(summary.shorter, total, gpu)
    batch = max(8, min(128 if total >= 50_000 else 64, 2 ** int(math.log2(max(total / 8, 1)))))
    epochs = max(20, min(200 if gpu else 60, round(40_000 * batch / total)))
    photograph = size >= 128
    steps = f"{counted(epochs * max(1, total // batch), 'step')} of {batch} images; more epochs rarely reduce accuracy"
    if not gpu:
        steps += "; no GPU was detected here, with one use 200"
    network = {
        "backbone": (backbone, why),
        "epochs": (epochs, steps),
        "batch_size": (batch, "64; 128 from 50,000 images; smaller for few images"),
        "learning_rate": (0.05 * batch / 64, "the paper's 0.05 at batch 64, in proportion to the batch"),
        "schedule.warmup_epochs": (max(1, min(5, epochs // 10)), "a tenth of the epochs, at most 5"),
        "augment.crop": ("resized" if photograph else "pad", "a box of a photograph" if photograph else "small images"),
        "augment.crop_padding": (0 if photograph else size // 8, "an eighth of the image; 0 with crop: resized"),
        "augment.flip": (True, "false if a mirror image has another meaning: text, digits, left and right"),
        "augment.policy": ("randaugment", "colour and shape; none if your classes differ only by colour"),
        "augment.cutout": (0 if photograph else size // 4, "a quarter of a small image; none with crop: resized"),
    }
    suggested: dict[str, tuple[Any, str]] = {
        "image.size": (size, f"the median of your images' shorter sides is {summary.shorter} pixels"),
        "image.resize_to": (resize, "before the centre crop"),
        "image.mean": ([0.485, 0.456, 0.406], "ImageNet's, suitable for photographs"),
        "image.std": ([0.229, 0.224, 0.225], "ImageNet's"),
    }
    return suggested | {f"{part}.{key}": value for part in ("teacher", "student") for key, value in network.items()}


def _backbone(shorter: int, total: int, gpu: bool) -> tuple[int, int, str, str]:
    """Choose the backbone: (size, resize_to, backbone, reason)."""
    if shorter <= SMALL:
        return 32, 32, "resnet32", "the paper's for 32x32 images"
    if shorter <= TINY_PHOTOGRAPH:
        return 64, 64, "resnet32", "small images"
    if not gpu:
        return 64, 64, "resnet32", "a CPU can train with 64x64 pixels; with a GPU run this command again"
    if total >= 20_000:
        return 224, 256, "torchvision/resnet50", "photographs, enough for 24 million weights"
    return 224, 256, "torchvision/resnet18", "photographs, too few for a larger network"


def _queues(total: int, classes: int) -> dict[str, tuple[Any, str]]:
    """Choose K and k_m of Eq. 5 within the paper's ratios: 0.3 of the training images, at least 8 rows per class."""
    target = max(0.3 * total, 8 * classes, 256)
    rows = max(min(2 ** round(math.log2(target)), LARGEST_QUEUE), 2 ** math.ceil(math.log2(2 * classes)))
    minimum = max(1, min(3, rows // (2 * classes)))
    return {
        "student.queue_total": (
            rows,
            f"K: a third of the training images ({total:,}), at least 8 rows per class and 256",
        ),
        "student.queue_minimum": (minimum, "k_m: least number of rows of a class"),
        "student.projection_dim": (32 if classes <= 100 else 128, "dimension of the contrast features"),
    }


def write_text(template: str, suggested: dict[str, tuple[Any, str]]) -> tuple[str, Params]:
    """Write the suggested values into the template (text of a params.yaml), each with its reason as a comment.

    Returns the text and its validated params. Raises ParamsError if the template lacks a key.
    """
    import yaml

    from pipeline.params.recipe import dump_document, load_document

    template = dump_document(load_document(template))  # puts each key on one line, also lists
    remaining, lines, path = dict(suggested), [], []
    for line in template.splitlines():
        body = line.split(" #")[0]
        name = body.strip().partition(":")[0]
        if name and not name.startswith("#"):
            depth = (len(body) - len(body.lstrip())) // 2
            path[depth:] = [name]
            if (key := ".".join(path)) in remaining:
                value, reason = remaining.pop(key)
                text = yaml.safe_dump(value, default_flow_style=True, width=1000).replace("\n...", "").strip()
                line = f"{'  ' * depth}{name}: {text} # {reason}"
        lines.append(line)
    if remaining:
        raise ParamsError(
            f"params.yaml: has no key {next(iter(remaining))}; restore the original file, then run this command again"
        )
    text = "\n".join(lines) + "\n"
    return text, parse_params(yaml.safe_load(text), Path("params.yaml"))
