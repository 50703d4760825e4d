"""A training split of task segmentation as a stream of crops, for data that do not fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from models.distributed import mean_over_ranks
from pipeline.augment import Draws, apply_crops, draw_crops
from pipeline.data.stream_order import PrefetchIterator, default_workers
from pipeline.params import Params
from pipeline.segmentation.dataset import (
    LabelledImages,
    LabelMapSplit,
    load_labelled_images,
    read_pair,
    segmentation_of,
)


def labelled_training_images(
    params: Params, device: torch.device
) -> tuple[LabelledImages | LabelledStream, str | None]:
    """The training split in memory or as a stream (stream.mode), and why it is a stream if the mode is auto."""
    images = None if params.stream.mode == "on" else load_labelled_images(params, device=device)
    # Free memory differs between processes, and processes with different decisions would wait for one another forever.
    if mean_over_ranks(torch.tensor(float(images is None), device=device)).item() > 0:
        reason = "reads images as it needs them: in memory they would take more than half of it (stream.mode: auto)"
        return LabelledStream(params, device), reason if params.stream.mode == "auto" else None
    assert images is not None
    return images, None


class LabelledStream(LabelMapSplit):
    """Images and label maps that are decoded and cropped on the CPU as training needs them.

    Has the methods of `dataset.Images` that training uses. A batch is uint8 [B,4,h,w]: the colours of a crop and, as the
    last channel, its label map. The crops equal those of the images in memory.
    """

    images = None

    def __init__(self, params: Params, device: torch.device) -> None:
        super().__init__(params, "train")
        settings = params.stream
        self.augment, self._mean, self.device = segmentation_of(params).augment, params.image.mean, device
        self._workers = default_workers() if settings.workers == "auto" else settings.workers
        self._prefetch = settings.prefetch
        self.labels = torch.zeros(len(self), dtype=torch.int64)
        self.wait_seconds = 0.0  # time that steps have waited for batches

    def order(self, generator: torch.Generator) -> Tensor:
        """The indices of an epoch in random order, int64 [N], from a CPU generator."""
        return torch.randperm(len(self), generator=generator)

    def feed(self, indices: Tensor, draws: Iterable[Draws]) -> PrefetchIterator:
        """Iterator over the batches of indices int64 [steps,B], some of them read ahead. draws: random numbers of each."""
        return PrefetchIterator(self, indices, self._workers, self._prefetch, iter(draws))

    def pixels(self, chosen: Tensor, draws: Draws | None = None) -> Tensor:
        """Crops uint8 [B,4,h,w] of the images at `chosen` int64 [B]; without draws, those of a fixed seed."""
        if draws is None:
            draws = draw_crops(len(chosen), self.augment, torch.Generator().manual_seed(0))
        with self.feed(chosen[None], [draws]) as feed:
            return next(feed)

    def allocate_batch(self, count: int, *_views: int) -> Tensor:
        """Allocate a batch; in pinned memory if the device is a GPU."""
        with torch.inference_mode(False):
            return torch.empty((count, 4, *self.augment.crop), dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def decode(self, indices: Sequence[int], out: Tensor, draws: Draws) -> list:
        """Read images with their label maps, and write their crops to out uint8 [n,4,h,w]. Returns an empty list."""
        for slot, index in enumerate(indices):
            image, labels = read_pair(self.source, self.references[index])
            pixels = torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))[None]
            views, cut = apply_crops(
                pixels, torch.from_numpy(labels)[None], draws.of([slot]), self.augment, mean=tuple(self._mean)
            )
            out[slot, :3], out[slot, 3] = views[0, 0], cut[0]
        return []

    def epoch_record(self, seconds: float) -> dict[str, float]:
        """Values for the record of an epoch of `seconds`: share of time waiting for data."""
        waited = mean_over_ranks(torch.tensor(self.wait_seconds, dtype=torch.float64, device=self.device)).item()
        self.wait_seconds = 0.0
        return {"data_wait": waited / seconds}

    def replaced(self) -> None:
        """Returns None: a damaged image raises DataError."""

    def warning(self) -> None:
        """Returns None: all orders are equally likely."""
