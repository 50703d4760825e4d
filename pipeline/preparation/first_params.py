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

LOOKED_AT = 300  # images that are decoded
SMALL, TINY_PHOTOGRAPH = 40, 96  # pixels of the shorter side
LARGEST_QUEUE = 65536  # the paper's value for iNaturalist 2018
TEST_SHARE, MOST_TESTED = 0.2, 50  # per class; 50 at most, because all classes have equal weight in the metrics
VALIDATION_SHARE, MOST_VALIDATED = 0.1, 20


@dataclass(frozen=True)
class Found:
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


def look(folder: Path) -> Found:
    """Count a folder's images, and decode about 300 of them, evenly spread, to measure their sizes.

    Raises ParamsError if the folder does not exist, DataError if it has no classes or no readable image.
    """
    if not folder.is_dir():
        raise ParamsError(f"{folder}: no such folder; expected one that holds a folder of images for each class")
    source = FolderSource(folder)
    train = [row for row in source.rows if row.split == "train"]
    counts = np.bincount([row.label for row in train], minlength=len(source.classes)).tolist()
    step = max(1, len(source.rows) // LOOKED_AT)
    sides, unreadable = [], []
    for row in source.rows[::step]:
        side = _shorter_side(source, row)
        if side is None:
            unreadable.append(row.reference)
        else:
            sides.append(side)
    if not sides:
        raise DataError(
            f"{folder}: none of {counted(len(unreadable), 'inspected image')} can be read, {unreadable[0]} the first"
        )
    own = [row.label for row in source.rows if row.split == "test"]
    tested = np.bincount(own, minlength=len(source.classes)).tolist() if own else None
    own_validation = any(row.split == "validation" for row in source.rows)
    median = round(statistics.median(sides))
    return Found(source.classes, counts, tested, own_validation, median, unreadable, source.remarks)


def _shorter_side(source: FolderSource, row: Row) -> int | None:
    try:
        return min(decode(source.read(row.reference)).size)
    except (DataError, ImageError):
        return None


def choices(found: Found, location: str, gpu: bool) -> dict[str, tuple[Any, str]]:
    """Choose params: dotted key of params.yaml → (value, reason). gpu: whether training will run on a GPU.

    Raises DataError if a class is too small to hold out a test image.
    """
    total, classes, smallest = sum(found.counts), len(found.counts), min(found.counts)
    chosen: dict[str, tuple[Any, str]] = {
        "data.source": ("folder", "a folder per class"),
        "data.location": (location, "your images"),
        "data.profile": (
            "natural",
            f"your own tail is kept: {counted(max(found.counts), 'image')} down to {smallest:,}",
        ),
    }
    if found.tested is None:
        if smallest < 2:
            name = found.classes[found.counts.index(smallest)]
            raise DataError(
                f"class {name!r} has 1 image: nothing is left to train on once one is held out; add images, merge the "
                "class into another, or give a test/ folder of your own"
            )
        total -= sum(test_size(count, MOST_TESTED, TEST_SHARE) for count in found.counts)
        reason = "of each class, at least one image; see docs/own-images.md"
        chosen["data.test_per_class"] = (MOST_TESTED, "at most; small classes give less, see the next line")
        chosen["data.test_share"] = (TEST_SHARE, reason)
    if not found.own_validation:
        chosen["data.validation_per_class"] = (MOST_VALIDATED, "at most; small classes give less, see the next line")
        chosen["data.validation_share"] = (VALIDATION_SHARE, "of what a class keeps for training")
    chosen |= _network(found, total, gpu)
    chosen |= _queues(total, classes)
    top = min(5, classes)
    chosen["evaluate.top_k"] = (top, "of your classes")
    chosen["serving.top_k"] = (top, "answers per image")
    return chosen


def expected_tests(found: Found) -> dict[str, SampleSize]:
    """Sample sizes of the test split that results from `choices`, for all classes and by its shot groups."""
    held = [test_size(count, MOST_TESTED, TEST_SHARE) for count in found.counts]
    tested = held if found.tested is None else found.tested
    kept = [count - (size if found.tested is None else 0) for count, size in zip(found.counts, held, strict=True)]
    if not found.own_validation:
        kept = [count - validation_size(count, 0, MOST_VALIDATED, VALIDATION_SHARE) for count in kept]
    return sample_sizes(tested, [shot_group(count) for count in kept])


def _network(found: Found, total: int, gpu: bool) -> dict[str, tuple[Any, str]]:
    """Choose image size, backbone, batch size, epochs, learning rate, augmentation; equal for teacher and student."""
    size, resize, backbone, why = _backbone(found.shorter, total, gpu)
    batch = max(8, min(128 if total >= 50_000 else 64, 2 ** int(math.log2(max(total / 8, 1)))))
    most = 200 if gpu else 60
    epochs = max(20, min(most, round(40_000 * batch / total)))
    photograph = size >= 128
    about = f"{counted(epochs * max(1, total // batch), 'step')} of {batch} images; more seldom hurts"
    if not gpu:
        about += "; no GPU was found here, on one take 200"
    named = {
        "backbone": (backbone, why),
        "epochs": (epochs, about),
        "batch_size": (batch, "64, or 128 from 50,000 images on; less where there are few"),
        "learning_rate": (0.05 * batch / 64, "the paper's 0.05 at batch 64, in proportion to the batch"),
        "schedule.warmup_epochs": (max(1, min(5, epochs // 10)), "a tenth of the epochs, at most 5"),
        "augment.crop": ("resized" if photograph else "pad", "a box of a photograph" if photograph else "small images"),
        "augment.crop_padding": (0 if photograph else size // 8, "an eighth of the image, where it is padded"),
        "augment.flip": (True, "false where a mirror image means something else: text, digits, left and right"),
        "augment.policy": ("randaugment", "colour and shape; none if colour is what tells your classes apart"),
        "augment.cutout": (0 if photograph else size // 4, "a quarter of a small image; none with crop: resized"),
    }
    chosen: dict[str, tuple[Any, str]] = {
        "image.size": (size, f"your images' shorter side is {found.shorter} pixels in the median"),
        "image.resize_to": (resize, "before the centre crop"),
        "image.mean": ([0.485, 0.456, 0.406], "ImageNet's, right enough for photographs"),
        "image.std": ([0.229, 0.224, 0.225], "ImageNet's"),
    }
    return chosen | {f"{part}.{key}": value for part in ("teacher", "student") for key, value in named.items()}


def _backbone(shorter: int, total: int, gpu: bool) -> tuple[int, int, str, str]:
    """Choose the backbone: (size, resize_to, backbone, reason)."""
    if shorter <= SMALL:
        return 32, 32, "resnet32", "the paper's for 32x32 images"
    if shorter <= TINY_PHOTOGRAPH or not gpu:
        why = (
            "small images"
            if shorter <= TINY_PHOTOGRAPH
            else "64x64 pixels is what a CPU can train; on a GPU run this again"
        )
        return 64, 64, "resnet32", why
    if total >= 20_000:
        return 224, 256, "torchvision/resnet50", "photographs, and enough of them for 24 million weights"
    return 224, 256, "torchvision/resnet18", "photographs, but too few of them for a larger network"


def _queues(total: int, classes: int) -> dict[str, tuple[Any, str]]:
    """Choose K and k_m of Eq. 5 within the paper's ratios: 0.3 of the training images, at least 8 rows per class."""
    wanted = max(0.3 * total, 8 * classes, 256)
    rows = max(min(2 ** round(math.log2(wanted)), LARGEST_QUEUE), 2 ** math.ceil(math.log2(2 * classes)))
    minimum = max(1, min(3, rows // (2 * classes)))
    return {
        "student.queue_total": (rows, f"K: a third of the training images ({total:,}), 8 rows a class, 256 at least"),
        "student.queue_minimum": (minimum, "k_m: rows that even the smallest class owns"),
        "student.projection_dim": (32 if classes <= 100 else 128, "of the contrast features"),
    }


def write_text(template: str, chosen: dict[str, tuple[Any, str]]) -> tuple[str, Params]:
    """Write the chosen values into the template (text of a params.yaml), each with its reason as a comment.

    Returns the text and its validated params. Raises ParamsError if the template lacks a key.
    """
    import yaml

    from pipeline.params.recipe import dump_document, load_document

    template = dump_document(load_document(template))  # puts each key on one line, also lists
    left, lines, above = dict(chosen), [], []
    for line in template.splitlines():
        body = line.split(" #")[0]
        name = body.strip().partition(":")[0]
        if not name or name.startswith("#"):
            lines.append(line)
            continue
        depth = (len(body) - len(body.lstrip())) // 2
        above[depth:] = [name]
        key = ".".join(above)
        if key not in left:
            lines.append(line)
            continue
        value, reason = left.pop(key)
        shown = yaml.safe_dump(value, default_flow_style=True, width=1000).replace("\n...", "").strip()
        lines.append(f"{'  ' * depth}{name}: {shown} # {reason}")
    if left:
        raise ParamsError(
            f"params.yaml: has no key {next(iter(left))}; take back the delivered file, then run this again"
        )
    text = "\n".join(lines) + "\n"
    return text, parse_params(yaml.safe_load(text), Path("params.yaml"))
