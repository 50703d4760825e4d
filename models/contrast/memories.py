"""Memories of contrast terms: a queue of projected keys, running class means, and reproducible random numbers.

The class-wise queues of GML are in models/contrast/queues.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FifoQueue(nn.Module):
    """First-in-first-out queue of the last K projected keys (He et al. 2020), with their class labels.

    Buffers: features [K,P], labels [K] int64, pointer [] int64 (the row of the next write). Rows are initialised with
    unit-norm Gaussian features and the label -1: until they are overwritten they are negatives of every query.
    """

    features: Tensor
    labels: Tensor
    pointer: Tensor

    def __init__(self, total: int, dim: int, generator: torch.Generator | None = None) -> None:
        """total: number of rows K >= 1. Raises ValueError for another total."""
        super().__init__()
        if total < 1:
            raise ValueError(f"queue total K is {total}; expected at least 1 row")
        initial = nn.functional.normalize(torch.randn(total, dim, generator=generator), dim=1)
        self.register_buffer("features", initial)
        self.register_buffer("labels", torch.full((total,), -1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, features: Tensor, labels: Tensor) -> None:
        """Overwrite the oldest rows by a batch: features [B,P], labels [B] int64. B is the batch of all ranks.

        K need not be a multiple of B. Raises ValueError if K is below B.
        """
        total, batch = len(self.labels), len(labels)
        if total < batch:
            raise ValueError(f"queue total K is {total}, below the batch of {batch} images (all ranks); raise K")
        rows = (self.pointer + torch.arange(batch, device=labels.device)) % total
        self.features[rows] = features.to(self.features.dtype)
        self.labels[rows] = labels
        self.pointer.add_(batch).remainder_(total)


class ClassMoments(nn.Module):
    """Sums and numbers of the unit features of each class, of this epoch and of the one before (Du et al. 2024, ProCo).

    Buffers: sums [2,C,P], counts [2,C] (row 0: this epoch, row 1: the epoch before), epoch [] int64.
    """

    sums: Tensor
    counts: Tensor
    epoch: Tensor

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(2, classes, dim))
        self.register_buffer("counts", torch.zeros(2, classes))
        self.register_buffer("epoch", torch.full((), -1))

    @torch.no_grad()
    def begin_epoch(self, epoch: int) -> None:
        """Move the sums of this epoch to the epoch before. A second call for the same epoch (on resume) changes nothing."""
        new = self.epoch != epoch
        for buffer in (self.sums, self.counts):
            buffer[1] = torch.where(new, buffer[0], buffer[1])
            buffer[0] = torch.where(new, 0.0, buffer[0])
        self.epoch.fill_(epoch)

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add unit features [M,P] of the classes labels [M] int64 to the sums of this epoch."""
        self.sums[0].index_add_(0, labels, features.to(self.sums.dtype))
        self.counts[0].index_add_(0, labels, torch.ones_like(labels, dtype=self.counts.dtype))

    def means(self) -> Tensor:
        """Mean of all stored features of each class: [C,P], not normalised; 0 for a class without features."""
        return self.sums.sum(0) / self.counts.sum(0).clamp(min=1)[:, None]


def counter_random(counter: Tensor, shape: tuple[int, ...], offset: int = 0) -> Tensor:
    """Random integers 0 <= r < 2**62 as a function of a counter: int64 tensor of the given shape.

    counter: [] int64, for example the number of the step; offset: position of the first element in the counter's
    sequence. Equal counters give equal numbers, so a resumed run and a captured CUDA graph draw what the run would have
    drawn. The mixing function is that of SplitMix64 (Steele, Lea and Flood 2014).
    """
    position = torch.arange(offset, offset + torch.Size(shape).numel(), device=counter.device)
    value = _mixed(_mixed(counter) + position)
    return (value & (2**62 - 1)).view(shape)


def _mixed(value: Tensor) -> Tensor:
    """The finaliser of SplitMix64; products wrap around 64 bits, and the masks make the right shifts logical."""
    value = value + (0x9E3779B97F4A7C15 - 2**64)
    value = (value ^ ((value >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    value = (value ^ ((value >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return value ^ ((value >> 31) & (2**33 - 1))
