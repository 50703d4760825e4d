"""Memory of training features as a classifier: the class likelihood of Eq. 3, a mixture over the stored features of a class.

log p(x|c) = log sum_k share_k * exp(cos(x, row_k) / tau) over the rows of class c, up to a constant. A row is a training
image with share 1/n_c, or the mean of a cluster of the class's images, with the cluster's share of them. As a class
likelihood it is balanced: the target prior is added to it as to the logits of L_cls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.autocast import full_precision, without_autocast

MEMORY_BYTES = 64 * 2**20  # of all rows in float16, unless a number of rows is given
ITERATIONS = 10  # of k-means
CHUNK = 4096  # images of a k-means step


class MemoryRows(NamedTuple):
    """rows: [K,D] float16, of length 1, or means of such, sorted by class; log_share: [K] float32; row_class: [K] int64."""

    rows: Tensor
    log_share: Tensor
    row_class: Tensor


class FeatureMemory(nn.Module):
    """Logits of the memory, weight * log p(x|c), [B,C].

    tau, weight: numbers, of `fit_memory`. A class without a row has the smallest likelihood of float32.
    """

    rows: Tensor
    log_share: Tensor
    row_class: Tensor

    def __init__(self, stored: MemoryRows, classes: int, tau: float, weight: float) -> None:
        super().__init__()
        self.register_buffer("rows", stored.rows)
        self.register_buffer("log_share", stored.log_share)
        self.register_buffer("row_class", stored.row_class)
        self.classes, self.tau, self.weight = classes, tau, weight

    def forward(self, features: Tensor) -> Tensor:
        """Features of the encoder [B,D] → [B,C] float32, also under autocast."""
        with without_autocast(features):
            cosines = F.linear(F.normalize(full_precision(features), dim=1), self.rows.float())
            return self.weight * log_mixture(cosines, self.log_share, self.row_class, self.classes, self.tau)


def empty_rows(rows: int, width: int) -> MemoryRows:
    """Rows of zeros, into which a checkpoint is loaded."""
    return MemoryRows(
        torch.zeros(rows, width, dtype=torch.float16), torch.zeros(rows), torch.zeros(rows, dtype=torch.int64)
    )


def log_mixture(cosines: Tensor, log_share: Tensor, row_class: Tensor, classes: int, tau: float) -> Tensor:
    """log sum_k share_k * exp(cos_k / tau) over the rows of each class: cosines [B,K] → [B,C].

    The maximum of an image is subtracted before exp. A class with rows cannot underflow in float32 as long as
    2 / tau - log_share is below 87: at 20,000 rows for every tau above .027.
    """
    scores = cosines / tau + log_share
    peak = scores.amax(1, keepdim=True)
    sums = scores.new_zeros(scores.shape[0], classes).index_add(1, row_class, (scores - peak).exp())
    return sums.clamp(min=torch.finfo(sums.dtype).tiny).log() + peak


def build_memory(features: Tensor, labels: Tensor, classes: int, limit: int | None = None) -> MemoryRows:
    """Rows of training features [N,D] with labels [N] int64: all images, or cluster means where `limit` rows cannot hold them.

    limit: largest number of rows; None: as many as fit into MEMORY_BYTES. Each class has a row for each of its images
    up to a number that is the same for all classes; a larger class has as many cluster means, by k-means on its features
    of length 1. Deterministic. Raises ValueError if limit is below the number of classes with images.
    """
    counts = torch.bincount(labels, minlength=classes)
    budget = rows_per_class(counts.tolist(), limit or max(MEMORY_BYTES // (2 * features.shape[1]), classes))
    parts = []
    for label, most in enumerate(budget):
        if most:
            unit = F.normalize(features[labels == label].float(), dim=1)
            rows, sizes = (unit, torch.ones(len(unit))) if len(unit) == most else _cluster_means(unit, most)
            share = (sizes / sizes.sum()).log()
            parts.append(MemoryRows(rows.half(), share, torch.full((len(rows),), label)))
    return MemoryRows(*(torch.cat(column) for column in zip(*parts, strict=True)))


def rows_per_class(counts: list[int], limit: int) -> list[int]:
    """min(count, m) for each class, with the largest m for which the sum is at most `limit`.

    Raises ValueError if one row for each class with images is more than `limit`.
    """
    smaller, larger = 0, max(counts)
    while smaller < larger:
        middle = (smaller + larger + 1) // 2
        if sum(min(count, middle) for count in counts) <= limit:
            smaller = middle
        else:
            larger = middle - 1
    if not smaller:
        raise ValueError(f"is {limit}; expected at least {sum(map(bool, counts))}, one row for each class with images")
    return [min(count, smaller) for count in counts]


def _cluster_means(unit: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Spherical k-means (Lloyd) of unit features [n,D]: means [k,D] of clusters with images, k <= most, and sizes [k].

    A mean is shorter than 1, and its product with a query is the mean cosine of its images. Rescaled to length 1 its
    cosines would be larger than the mean of its images' cosines by 1 / length, a bias against classes that keep their images.
    """
    chosen = torch.randperm(len(unit), generator=torch.Generator().manual_seed(0))[:most]
    centres, nearest = unit[chosen], torch.zeros(0, dtype=torch.int64)
    for _ in range(ITERATIONS):
        previous = nearest
        nearest = torch.cat([(part @ centres.T).argmax(1) for part in unit.split(CHUNK)])
        sums = torch.zeros_like(centres).index_add(0, nearest, unit)
        if torch.equal(nearest, previous):
            break
        centres = F.normalize(sums, dim=1)
    sizes = torch.bincount(nearest, minlength=most)
    filled = sizes > 0  # a centre can lose its images
    return sums[filled] / sizes[filled, None], sizes[filled].float()
