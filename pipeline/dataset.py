"""Images of a split as one uint8 tensor in memory: what training and evaluation read."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.preprocess import ImageError, preprocess
from pipeline.artifacts import SPLIT
from pipeline.errors import DataError
from pipeline.params import ImageParams, Params
from pipeline.sources import Source, in_parts, open_source, reading_order
from pipeline.splits import read_split


@dataclass(frozen=True)
class Images:
    """images uint8 [N,3,H,W]; labels int64 [N]; sample_ids: N texts; references: N texts that find the bytes again."""

    images: Tensor
    labels: Tensor
    sample_ids: list[str]
    references: list[str]
    source: Source

    def __len__(self) -> int:
        return len(self.sample_ids)

    def encoded(self, index: int) -> bytes:
        """The original bytes of one image."""
        return self.source.read(self.references[index])


def load_images(params: Params, split: str, folder: Path = SPLIT) -> Images:
    """Decode and resize every image of a split. Raises ParamsError when the split is not made, DataError naming a bad file."""
    table = read_split(split, ["sample_id", "label", "reference"], folder)
    source = open_source(params.data)
    references = table.column("reference").to_pylist()
    size, resize_to = params.image.size, params.image.resize_to

    stacked = np.empty((len(references), 3, size, size), dtype=np.uint8)

    def load(positions: Sequence[int]) -> None:
        for position in positions:
            data = source.read(references[position])
            try:
                stacked[position] = preprocess(data, size, resize_to)
            except ImageError as error:
                raise DataError(
                    f"{references[position]}: {error}; replace the image and run `dvc repro` again"
                ) from None

    # Read as the images lie in the source, so that each row group of a table is read once.
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(load, in_parts(reading_order(references), 64)):
            pass
    labels = torch.from_numpy(table.column("label").to_numpy().astype(np.int64))
    return Images(torch.from_numpy(stacked), labels, table.column("sample_id").to_pylist(), references, source)


def normalise(images: Tensor, params: ImageParams) -> Tensor:
    """uint8 [..., 3,H,W] → float32 (x/255 - mean) / std per channel: the network's input."""
    return Normalisation(params, images.device)(images)


class Normalisation:
    """`normalise` with its constants already on the device, so that a step sends none."""

    def __init__(self, params: ImageParams, device: torch.device) -> None:
        self._mean = torch.tensor(params.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(params.std, device=device).view(3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [..., 3,H,W] on the device → float32, same shape."""
        return (images.float() / 255 - self._mean) / self._std
