"""Class-wise queues: a memory of contrast features with a fixed number of rows for each class (Eq. 5)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def queue_lengths(counts: Sequence[int], total: int, minimum: int) -> list[int]:
    """Number of rows of each class in a memory of `total` rows: Eq. 5, rounded so that the rows sum to `total` exactly.

    The rows of class c end at ceil(minimum*(c+1) + (total - minimum*C) * cumcount_c / N): the ceiling of the
    *cumulative* Eq. 5. It is computed in integers, because in floating point the last row exceeds the buffer for some
    splits, among them CIFAR-LT.

    counts: C integers >= 0; total K; minimum k_m. Raises ValueError when total < minimum*C (the head would get fewer
    rows than the tail), when minimum < 1 or when a class would get no row.
    """
    n = [int(count) for count in counts]
    classes, samples = len(n), sum(int(count) for count in counts)
    if classes == 0 or samples == 0 or min(n) < 0:
        raise ValueError(f"counts is {n}; expected samples per class, none negative and not all 0")
    if minimum < 1:
        raise ValueError(f"queue minimum k_m is {minimum}; expected at least 1, or a rare class owns no row")
    if total < minimum * classes:
        raise ValueError(
            f"queue total K is {total}, below minimum k_m * classes = {minimum} * {classes}; "
            f"raise the total to at least {minimum * classes} or lower the minimum"
        )
    ends, cumulative = [0], 0
    for position, count in enumerate(n, start=1):
        cumulative += count
        ends.append(-(-(minimum * position * samples + (total - minimum * classes) * cumulative) // samples))
    return [end - start for start, end in itertools.pairwise(ends)]


class ClassQueues(nn.Module):
    """Feature memory of K rows, contiguous by class in label order; each class is a ring buffer.

    Buffers: features [K,D] (unprojected features of the contrast encoder), sample_ids [K] int64, pointers [C] int64,
    and the constant row_class [K], starts [C], lengths [C], all int64. Rows are initialised with unit-norm Gaussian
    features and unique negative ids. They are used as keys of their class until they are overwritten (as in the
    official code).
    """

    features: Tensor
    sample_ids: Tensor
    pointers: Tensor
    row_class: Tensor
    starts: Tensor
    lengths: Tensor

    def __init__(
        self, counts: Sequence[int], total: int, minimum: int, dim: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        rows = queue_lengths(counts, total, minimum)
        self.longest = max(rows)  # a Python int, because shapes depend on it
        lengths = torch.tensor(rows)
        initial = nn.functional.normalize(torch.randn(total, dim, generator=generator), dim=1)
        self.register_buffer("features", initial)
        self.register_buffer("sample_ids", -torch.arange(1, total + 1))
        self.register_buffer("pointers", torch.zeros_like(lengths))
        self.register_buffer("row_class", torch.repeat_interleave(torch.arange(len(rows)), lengths, output_size=total))
        self.register_buffer("starts", lengths.cumsum(0) - lengths)
        self.register_buffer("lengths", lengths)

    @torch.no_grad()
    def enqueue(self, features: Tensor, labels: Tensor, sample_ids: Tensor, valid: Tensor | None = None) -> None:
        """Store a batch: the k-th sample of a class goes to slot (pointer + k) mod length; k >= length is dropped.

        features: [B,D]; labels: [B] int64; sample_ids: [B] int64; valid: [B] bool, False for rows that are not stored
        (their labels must be classes); None: all rows are stored. Shapes are static and nothing is copied to the host:
        a dropped sample is written too, but with the content of the stored sample of the same slot.
        """
        same = labels[:, None] == labels[None, :]
        if valid is not None:
            same = same & valid
        rank = torch.tril(same, diagonal=-1).sum(1)
        length = self.lengths[labels]
        # An indexed write has no defined order for equal slots, so all samples of a slot write the same row.
        owner_rank = rank % length
        owner = (same & (rank[None, :] == owner_rank[:, None])).to(torch.int8).argmax(1)
        slots = self.starts[labels] + (self.pointers[labels] + owner_rank) % length
        stored = rank < length
        rows, ids = features[owner].to(self.features.dtype), sample_ids[owner]
        if valid is not None:
            # A row that is not valid writes what the first valid row writes; without any, every row keeps its slot.
            writer = torch.where(valid, torch.arange(len(labels), device=labels.device), valid.to(torch.int8).argmax())
            slots, any_valid, stored = slots[writer], valid.any(), stored & valid
            rows = torch.where(any_valid, rows[writer], self.features[slots])
            ids = torch.where(any_valid, ids[writer], self.sample_ids[slots])
        self.features[slots] = rows
        self.sample_ids[slots] = ids
        self.pointers.copy_(self.pointers.index_add(0, labels, stored.to(self.pointers.dtype)) % self.lengths)

    def fill(self) -> Tensor:
        """Share of the rows that hold the feature of a real sample: a scalar tensor in [0, 1]."""
        return (self.sample_ids >= 0).double().mean()
