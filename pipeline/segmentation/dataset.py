"""Splits of task segmentation: training images with label maps in memory, held-out ones decoded batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.preprocess import ImageError, decode, letterbox
from pipeline.data.dataset import SHARE, Images, free_on_gpu
from pipeline.data.split_tables import read_split
from pipeline.params import Params, SegmentationAugmentParams, SegmentationParams
from pipeline.shared.artifacts import SPLIT
from pipeline.shared.errors import DataError
from pipeline.shared.host_memory import free_bytes
from pipeline.sources import UNLABELLED, LabelMapSource, decode_label_map, in_parts, open_label_maps, reading_order

CPU = torch.device("cpu")


@dataclass(frozen=True)
class LabelledImages(Images):
    """A training split in memory at its original sizes.

    images: uint8 [N,4,H,W], the colours and, as the last channel, the label map; padded at the bottom and at the right to
    the largest image. sizes: int64 [N,2], height and width of each image. labels is 0 for every image.
    """

    sizes: Tensor
    augment: SegmentationAugmentParams


class CanvasBatch(NamedTuple):
    """Images as the network gets them in evaluation and serving, with their label maps.

    images: uint8 [B,3,H,W] of the canvas. inside: height and width in it that each image takes. label_maps: uint8 [h,w]
    each, at the original size.
    """

    images: Tensor
    inside: list[tuple[int, int]]
    label_maps: list[np.ndarray]


class LabelMapSplit:
    """A split whose images and label maps are decoded when they are read, so that memory holds a few batches."""

    def __init__(self, params: Params, split: str, folder: Path = SPLIT) -> None:
        table = read_split(split, ["sample_id", "reference"], folder)
        self.sample_ids: list[str] = table.column("sample_id").to_pylist()
        self.references: list[str] = table.column("reference").to_pylist()
        self.source = open_label_maps(params.data)
        self._settings, self._fill = segmentation_of(params), fill_colour(params.image.mean)

    def __len__(self) -> int:
        return len(self.references)

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return self._settings.canvas[0], self._settings.canvas[1]

    def encoded(self, index: int) -> bytes:
        """The original bytes of one image."""
        return self.source.read(self.references[index])

    def read(self, index: int) -> tuple[np.ndarray, tuple[int, int], np.ndarray]:
        """Canvas uint8 [3,H,W], the size that the image takes in it, and the label map uint8 [h,w]. Raises DataError."""
        image, labels = read_pair(self.source, self.references[index])
        canvas, inside = letterbox(image, *self.canvas, self._fill)
        return canvas, inside, labels

    def batches(self, indices: list[int], size: int) -> Iterator[CanvasBatch]:
        """Batches of the images at `indices`, in order; the next one is decoded meanwhile."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = [list(map(int, part)) for part in in_parts(indices, size)]
            pending = [pool.submit(self.read, index) for index in parts[0]] if parts else []
            for _, following in pairwise([*parts, []]):
                ahead = [pool.submit(self.read, index) for index in following]
                canvases, inside, label_maps = zip(*(future.result() for future in pending), strict=True)
                yield CanvasBatch(torch.from_numpy(np.stack(canvases)), list(inside), list(label_maps))
                pending = ahead


def segmentation_of(params: Params) -> SegmentationParams:
    """Section `segmentation` of params whose task is segmentation."""
    assert params.segmentation
    return params.segmentation


def fill_colour(mean: list[float]) -> tuple[int, int, int]:
    """The mean colour, 0..255, which pads a canvas: it is 0 after normalisation."""
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


def read_pair(source: LabelMapSource, reference: str) -> tuple:
    """The image (Pillow, RGB) and its label map uint8 [h,w]. Raises DataError that names the image."""
    try:
        image = decode(source.read(reference))
        return image, decode_label_map(source.read_label_map(reference), image.size, source.label_maps)
    except ImageError as error:
        raise DataError(f"{reference}: it or its label map {error}; replace it") from None


def label_map_sizes(source: LabelMapSource, references: list[str]) -> np.ndarray:
    """Height and width of each label map, int64 [N,2], from the header of its PNG."""
    sizes = np.empty((len(references), 2), dtype=np.int64)
    for index in reading_order(references):
        header = source.read_label_map(references[index])[16:24]
        sizes[index] = int.from_bytes(header[4:], "big"), int.from_bytes(header[:4], "big")
    return sizes


def load_labelled_images(params: Params, folder: Path = SPLIT, device: torch.device = CPU) -> LabelledImages | None:
    """Decode the training split into memory.

    With stream.mode auto, None if it would take more than half of the free memory of the host or of the device; with `off`
    it is decoded anyway.
    """
    table = read_split("train", ["sample_id", "reference"], folder)
    references: list[str] = table.column("reference").to_pylist()
    source, augment = open_label_maps(params.data), segmentation_of(params).augment
    sizes = label_map_sizes(source, references)
    height, width = map(int, sizes.max(0))
    free = min([free_bytes(), *free_on_gpu(device).values()])
    if params.stream.mode == "auto" and len(references) * 4 * height * width > SHARE * free:
        return None
    stacked = np.zeros((len(references), 4, height, width), dtype=np.uint8)
    stacked[:, 3] = UNLABELLED

    def load(index: int) -> None:
        image, labels = read_pair(source, references[index])
        tall, wide = labels.shape
        stacked[index, :3, :tall, :wide] = np.asarray(image).transpose(2, 0, 1)
        stacked[index, 3, :tall, :wide] = labels

    with ThreadPoolExecutor() as pool:
        list(pool.map(load, reading_order(references)))
    return LabelledImages(
        torch.from_numpy(stacked), torch.zeros(len(references), dtype=torch.int64), table.column("sample_id").to_pylist(),
        references, source, torch.from_numpy(sizes), augment,
    )  # fmt: skip
