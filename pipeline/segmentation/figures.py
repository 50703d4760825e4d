"""Figures of label maps for `tailor data check`: pixels and images of each class, sizes, classes that do not occur."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from pipeline.data.inspection import InspectionResult
from pipeline.params import Params
from pipeline.sources import Row
from serving.shared.terminal import cell, counted


@dataclass(frozen=True)
class LabelMapFigures:
    """Figures of the usable label maps. pixels, images: by split, [C] pixels of each class and images that have it.

    labelled: share of all pixels that have a class. sizes: number of images by width and height.
    """

    classes: list[str]
    pixels: dict[str, list[int]]
    images: dict[str, list[int]]
    labelled: float
    sizes: dict[tuple[int, int], int]

    def shares(self, split: str) -> list[float]:
        """Share of each class in the labelled pixels of a split, [C]."""
        total = max(sum(self.pixels[split]), 1)
        return [count / total for count in self.pixels[split]]

    def table(self) -> Table:
        """Table with a row for each class, most frequent first."""
        table = Table()
        for column in ("class", "train pixels", "share", "train images", "test share", "test images"):
            table.add_column(column, justify="left" if column == "class" else "right")
        train, test = self.shares("train"), self.shares("test")
        for c in sorted(range(len(self.classes)), key=lambda c: -train[c]):
            table.add_row(
                cell(self.classes[c]), f"{self.pixels['train'][c]:,}", f"{train[c]:.3%}", f"{self.images['train'][c]:,}",
                f"{test[c]:.3%}", f"{self.images['test'][c]:,}",
            )  # fmt: skip
        return table

    def summary(self) -> str:
        """A line for the terminal."""
        shares = [share for share in self.shares("train") if share]
        factor = f"imbalance factor {max(shares) / min(shares):.4g} over pixels" if shares else "no labelled pixel"
        return (
            f"train: {counted(len(self.classes), 'class')}, {factor}; {self.labelled:.1%} of all pixels have a class; "
            f"{counted(len(self.sizes), 'image size')}"
        )

    def as_json(self) -> dict[str, Any]:
        """The figures as JSON-serialisable values."""
        return {
            "classes": self.classes,
            "pixels": self.pixels,
            "images": self.images,
            "labelled": self.labelled,
            "sizes": [
                {"width": width, "height": height, "images": n} for (width, height), n in sorted(self.sizes.items())
            ],
        }


def label_map_figures(
    classes: list[str], assigned: Mapping[str, list[Row]], inspected: Mapping[str, InspectionResult]
) -> LabelMapFigures:
    """Compute the figures of the usable images of all splits."""
    pixels, images, total, sizes = {}, {}, 0, dict[tuple[int, int], int]()
    for split, rows in assigned.items():
        results = [inspected[row.reference] for row in rows if not inspected[row.reference].problem]
        counts = np.array([result.pixels for result in results], dtype=np.int64).reshape(len(results), len(classes))
        pixels[split], images[split] = counts.sum(0).tolist(), (counts > 0).sum(0).tolist()
        for result in results:
            total += result.width * result.height
            sizes[result.width, result.height] = sizes.get((result.width, result.height), 0) + 1
    return LabelMapFigures(classes, pixels, images, sum(map(sum, pixels.values())) / max(total, 1), sizes)


def missing_classes(figures: LabelMapFigures, smoothing: float) -> list[str]:
    """A line if classes occur in no training label map, with which stage `prior` would fail; else empty."""
    absent = [name for name, n in zip(figures.classes, figures.images["train"], strict=True) if not n]
    if not absent or smoothing:
        return []
    return [
        f"class {absent[0]!r} occurs in no training label map (such classes: {len(absent)}); add images, remove the class "
        "from data.label_map.class_names, or set prior.smoothing above 0"
    ]


def remarks(figures: LabelMapFigures, params: Params) -> list[str]:
    """Lines on what a user may not expect: classes without test pixels, images that are smaller than a crop."""
    lines = []
    untested = [name for name, n in zip(figures.classes, figures.images["test"], strict=True) if not n]
    if untested and sum(figures.images["test"]):
        lines.append(
            f"class {untested[0]!r} occurs in no test label map (such classes: {len(untested)}): it has no IoU, or 0 where "
            "it is predicted"
        )
    assert params.segmentation
    augment = params.segmentation.augment
    if not augment.scale:
        tall, wide = (round(side / augment.ratio[1]) for side in augment.crop)
        small = sum(n for (width, height), n in figures.sizes.items() if height < tall or width < wide)
        if small:
            lines.append(
                f"{counted(small, 'image', 'are')} smaller than segmentation.augment.crop {augment.crop} even at the "
                f"largest ratio {augment.ratio[1]:g}; their crops are padded with pixels without a class"
            )
    return lines
