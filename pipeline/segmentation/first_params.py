"""`tailor init` on a folder of label maps: read them, and choose params of task segmentation with the reason for each value."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.image_names import NOT_UTF8, is_utf8
from models.prior import class_key
from pipeline.params import LabelMapParams, read_yaml
from pipeline.params.recipe import RECIPES, flat
from pipeline.segmentation.dataset import read_pair
from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources import UNLABELLED
from pipeline.sources.label_maps import ANNOTATIONS, IMAGES, LabelMapFolder
from serving.shared.terminal import counted

RECIPE = "camvid-cpu.yaml"
NAMES = "classes.txt"
READ = 300  # approximate number of pairs that are decoded
MOST_CLASSES, MOST_EPOCHS = 255, 1000
TEST_SHARE, MOST_TESTED = 0.2, 200
VALIDATION_SHARE, MOST_VALIDATED = 0.1, 50
# Without and with a GPU: longest side of the canvas, backbone, batch size, steps, rows of the queues.
CPU = (160, "resnet20", 8, 1125, 2048)
GPU = (512, "torchvision/resnet18", 16, 20_000, 8192)


@dataclass(frozen=True)
class LabelMapSummary:
    """Summary of a folder of label maps. splits: images of each. height, width: medians, in pixels.

    names: of the classes, from classes.txt or made from the numbers (named: False). absent: classes that occur in none of
    the label maps that were read. unreadable: a line for each pair that cannot be used.
    """

    source: str
    splits: dict[str, int]
    height: int
    width: int
    names: list[str]
    named: bool
    absent: list[str]
    unreadable: list[str]

    def __str__(self) -> str:
        return (
            f"{counted(sum(self.splits.values()), 'image')} with label maps of {counted(len(self.names), 'class')}; "
            f"{self.width}x{self.height} pixels in the median"
        )

    def remarks(self) -> list[str]:
        """Lines on what the user must complete or repair."""
        lines = [f"{problem}; `tailor data check` lists all" for problem in self.unreadable[:3]]
        if not self.named:
            lines.append(
                f"warning: the classes are named by their numbers; write their names, one a line, into {NAMES} of the folder "
                "and run this command again, or change data.label_map.class_names"
            )
        if self.absent:
            lines.append(
                f"warning: class {self.absent[0]!r} occurs in none of the label maps that were read (such classes: "
                f"{len(self.absent)}); `tailor data check` counts all label maps"
            )
        return lines


def holds_label_maps(folder: Path) -> bool:
    """Whether a folder has images with label maps: the folders `images` and `annotations`."""
    return all((folder / name).is_dir() for name in (IMAGES, ANNOTATIONS))


def inspect_label_maps(folder: Path) -> LabelMapSummary:
    """Read about 300 pairs of a folder, evenly spread: sizes and labels.

    Raises ParamsError for a path that is not UTF-8, DataError if none can be read, for one class, and for classes.txt with
    too few, repeated or too many names.
    """
    if not is_utf8(str(folder.resolve())):  # DVC cannot hash such a path
        raise ParamsError(f"{folder.resolve()}: {NOT_UTF8}")
    ade20k = next((folder / IMAGES / "training").glob("ADE_train_*"), None) is not None
    source = LabelMapFolder(
        folder, "ade20k" if ade20k else "folder", LabelMapParams(class_names=[str(n) for n in range(MOST_CLASSES)])
    )
    sizes, present, unreadable = [], set[int](), []
    for row in source.rows[:: max(1, len(source.rows) // READ)]:
        try:
            _, labels = read_pair(source, row.reference)
        except DataError as error:
            unreadable.append(str(error))
        else:
            sizes.append(labels.shape)
            present.update(np.unique(labels).tolist())
    if not sizes:
        raise DataError(f"{folder}: no label map can be used; the first: {unreadable[0]}")
    first = int(ade20k)  # in ADE20K 0 is no class
    occurring = {label - first for label in present - {UNLABELLED} if label >= first}
    names, named = _class_names(folder, max(occurring, default=0) + 1)
    height, width = (round(statistics.median(sides)) for sides in zip(*sizes, strict=True))
    absent = [name for index, name in enumerate(names) if index not in occurring]
    splits = dict(Counter(row.split for row in source.rows))
    return LabelMapSummary(source.origin, splits, height, width, names, named, absent, unreadable)


def _class_names(folder: Path, classes: int) -> tuple[list[str], bool]:
    """Names from classes.txt, one a line in the order of the labels; without the file made from the numbers."""
    path = folder / NAMES
    if not path.is_file():
        names = [f"class {index}" for index in range(classes)]
    else:
        try:
            text = class_key(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError:
            raise DataError(f"{path}: is not UTF-8; convert it to UTF-8") from None
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if len(set(names)) < len(names) or not classes <= len(names) <= MOST_CLASSES:
            raise DataError(
                f"{path}: has {len(names)} names, {len(set(names))} of them different; expected a different name for each "
                f"class, from {classes}, as label {classes - 1} occurs, to {MOST_CLASSES}"
            )
    if len(names) < 2:
        raise DataError(f"{folder / ANNOTATIONS}: the label maps have one class; expected at least 2")
    return names, path.is_file()


def suggest_label_map_params(summary: LabelMapSummary, location: str, gpu: bool) -> dict[str, tuple[Any, str]]:
    """Choose params: dotted key of params.yaml → (value, reason). gpu: whether training will run on a GPU.

    Raises DataError if fewer than 2 images remain for training.
    """
    longest, backbone, batch, steps, rows = GPU if gpu else CPU
    recipe, classes = read_yaml(RECIPES / RECIPE), len(summary.names)
    total = _training_images(summary, location)
    batch = min(batch, total)
    scale = min(1.0, longest / max(summary.height, summary.width))
    canvas = [_multiple(side * scale) for side in (summary.height, summary.width)]
    augment = recipe["segmentation"]["augment"] | {
        "scale": sorted(canvas, reverse=True), "crop": [_multiple(0.8 * side) for side in canvas],
    }  # fmt: skip
    whole = {
        "task": ("segmentation", "a class for each pixel"),
        "data.source": (summary.source, f"{IMAGES}/ and {ANNOTATIONS}/"),
        "data.location": (location, "your images"),
        "data.profile": ("natural", "your own pixel shares"),
        "data.label_map": (
            {"class_names": summary.names, "ignored": 255, "reduce_zero_label": summary.source == "ade20k"},
            f"names from {NAMES}" if summary.named else "write the names of your classes, in the order of the labels",
        ),
        "segmentation": (
            recipe["segmentation"] | {"canvas": canvas, "augment": augment},
            f"height and width in proportion to your images, at most {longest} pixels; rest: recipes/{RECIPE}",
        ),
    }
    if "test" not in summary.splits:
        whole["data.test_per_class"] = (MOST_TESTED, "images, at most; fewer by the share in the next line")
        whole["data.test_share"] = (TEST_SHARE, "of the images")
    if "validation" not in summary.splits:
        whole["data.validation_per_class"] = (MOST_VALIDATED, "images, at most; fewer by the share in the next line")
        whole["data.validation_share"] = (VALIDATION_SHARE, "of the training images")
    schedules = {
        f"{part}.schedule": (recipe[part].pop("schedule"), f"recipes/{RECIPE}") for part in ("teacher", "student")
    }
    rest = {key: value for key, value in recipe.items() if key not in ("task", "data", "segmentation")}
    epochs = min(MOST_EPOCHS, max(1, round(steps / (total // batch))))
    own = {
        "backbone": (backbone, "small, for a CPU; with a GPU run this command again" if not gpu else "for a GPU"),
        "batch_size": (batch, "crops a step"),
        "epochs": (epochs, f"{counted(epochs * (total // batch), 'step')} of {batch} crops"),
        "adapter": (0, "of encoders, which pixels do not have"),
    }
    return {
        **whole,
        **{key: (value, f"recipes/{RECIPE}") for key, value in flat(rest).items()},
        **schedules,
        **{f"{part}.{key}": value for part in ("teacher", "student") for key, value in own.items()},
        "student.memory": (None, "of encoders, which pixels do not have"),
        "student.queue_total": (rows, "cells; the paper has 8192 on ADE20K"),
        "student.queue_minimum": (rows // 2 // classes, "half of the rows in equal parts, as the paper's 27 of 8192"),
        "evaluate.top_k": (min(5, classes), "of your classes"),
        "serving.top_k": (min(5, classes), "largest classes per response"),
    }


def _training_images(summary: LabelMapSummary, location: str) -> int:
    """Images for training after those that are held out. Raises DataError for fewer than 2."""
    held_out = {"test": TEST_SHARE, "validation": VALIDATION_SHARE}
    number = summary.splits["train"]
    total = round(number * (1 - sum(share for split, share in held_out.items() if split not in summary.splits)))
    if total < 2:
        raise DataError(
            f"{location}: has {counted(number, 'training image')} with a label map, of which {total} remains after test and "
            "validation images are held out; expected at least 2 that remain"
        )
    return total


def _multiple(side: float) -> int:
    """The multiple of 8 next to a side, at least 16: the cells of the network have strides of 4 and 8 pixels."""
    return max(16, 8 * round(side / 8))
