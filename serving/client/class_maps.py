"""Class maps of a server of task segmentation, at the size of the images that were sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.label_map_image import palette
from models.preprocess import opened
from serving.shared.errors import InputError

TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Segmentation:
    """The class map of one image.

    class_map: uint8 [height,width] of the upright image, the index of a class in each pixel. confidence: float32
    [height,width], the probability of that class, in steps of 1/255. classes: names of all classes. version: of the model.
    """

    class_map: NDArray[np.uint8]
    confidence: NDArray[np.float32]
    classes: tuple[str, ...]
    version: int

    def shares(self) -> dict[str, float]:
        """Share of each class that occurs in the class map, largest first."""
        counts = np.bincount(self.class_map.ravel(), minlength=len(self.classes))
        order = np.argsort(-counts, kind="stable")
        return {self.classes[index]: float(counts[index] / self.class_map.size) for index in order if counts[index]}

    def picture(self) -> Image.Image:
        """The class map as a Pillow image with a palette; its pixels are the indexes."""
        image = Image.fromarray(self.class_map)
        image.putpalette(palette())
        return image

    def save(self, path: str | Path) -> None:
        """Write the class map as a PNG with a palette; its pixels are the indexes. Raises InputError for another suffix."""
        if Path(path).suffix.lower() != ".png":
            raise InputError(f"{path}: a class map is written as PNG; expected a name that ends in .png")
        self.picture().save(path, "PNG")

    def overlay(self, image: Image.Image, opacity: float = 0.55) -> Image.Image:
        """Blend the class colours over the upright image. Raises InputError for an image of another size."""
        if image.size != self.class_map.shape[::-1]:
            height, width = self.class_map.shape
            raise InputError(f"image has {image.width}x{image.height} pixels; its class map has {width}x{height}")
        return Image.blend(image.convert("RGB"), self.picture().convert("RGB"), opacity)


def upright_size(data: bytes) -> tuple[int, int]:
    """Width and height of an encoded image after its EXIF orientation, from its header. Raises ImageError."""
    with opened(data) as image:
        turned = image.getexif().get(ORIENTATION) in TURNED
        return (image.height, image.width) if turned else (image.width, image.height)


def segmentation(row: dict[str, NDArray[Any]], size: tuple[int, int], version: int) -> Segmentation:
    """The class map of one row of a response: cut out of the canvas and enlarged to `size` (width, height) of the image."""
    height, width = (int(side) for side in row["size"])
    maps = []
    for name in ("class_map", "confidence"):
        inside = Image.fromarray(np.ascontiguousarray(row[name][:height, :width]))
        maps.append(np.asarray(inside if inside.size == size else inside.resize(size, Image.Resampling.NEAREST)))
    confidence = maps[1].astype(np.float32) / 255
    return Segmentation(maps[0], confidence, tuple(name.decode() for name in row["names"]), version)


def segmentations(
    outputs: dict[str, NDArray[Any]], sizes: Sequence[tuple[int, int]], version: int
) -> list[Segmentation]:
    """The class maps of a response, one for each image; sizes: their widths and heights."""
    rows = ({name: values[index] for name, values in outputs.items()} for index in range(len(sizes)))
    return [segmentation(row, size, version) for row, size in zip(rows, sizes, strict=True)]
