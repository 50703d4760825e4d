"""Memory of training features as a classifier: the class likelihood of Eq. 3, a mixture over the stored features of a class.

log p(x|c) = log sum_k share_k * exp(cos(x, row_k) / tau) over the rows of class c, up to a constant. A row is the feature
of a training image, with share 1/n_c, or the mean of a cluster of the class's images, with the share of the class's images
that are in the cluster. The result is a class likelihood, so it is balanced: the target prior is added to it as to the
logits of L_cls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.autocast import full_precision, without_autocast

MEMORY_BYTES = 64 * 2**20  # default limit of all rows in float16
ITERATIONS = 10  # k-means iterations
CHUNK = 4096  # images that k-means compares with the centres at once
BATCH = 256  # images that are compared with all rows at once


class MemoryRows(NamedTuple):
    """Rows of a memory, sorted by class.

    rows: [K,D] float16, unit vectors or means of unit vectors. log_share: [K] float32. row_class: [K] int64.
    """

    rows: Tensor
    log_share: Tensor
    row_class: Tensor


class FeatureMemory(nn.Module):
    """Computes the logits of the memory: weight * log p(x|c), [B,C].

    tau, weight: numbers that `fit_memory` returns. A class without a row has the smallest likelihood of float32.
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
    """Return rows of zeros; a checkpoint is loaded into them."""
    return MemoryRows(
        torch.zeros(rows, width, dtype=torch.float16), torch.zeros(rows), torch.zeros(rows, dtype=torch.int64)
    )


def log_mixture(cosines: Tensor, log_share: Tensor, row_class: Tensor, classes: int, tau: float) -> Tensor:
    """log sum_k share_k * exp(cos_k / tau) over the rows of each class: cosines [B,K] → [B,C].

    The largest score of an image is subtracted before exp. A class with rows cannot underflow in float32 while
    2 / tau - log_share is below 87; with 20,000 rows that holds for every tau above .027.
    """
    scores = cosines / tau + log_share
    peak = scores.amax(1, keepdim=True)
    sums = scores.new_zeros(scores.shape[0], classes).index_add(1, row_class, (scores - peak).exp())
    return sums.clamp(min=torch.finfo(sums.dtype).tiny).log() + peak


def build_memory(features: Tensor, labels: Tensor, classes: int, limit: int | None = None) -> MemoryRows:
    """Build rows from training features [N,D] and labels [N] int64: one for each image, or cluster means above the limit.

    limit: largest number of rows; None: as many as fit into MEMORY_BYTES. All classes have the same maximum of rows. A
    class with at most that many images has a row for each image. A larger class has that many cluster means, by k-means on
    its normalised features. Deterministic. Raises ValueError if limit is below the number of classes with images.
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
    """Return min(count, m) for each class, with the largest m for which the sum is at most `limit`.

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
    """Spherical k-means (Lloyd) of unit features [n,D]: means [k,D] of non-empty clusters, k <= most, and sizes [k].

    The means are not normalised, so that the product of a mean and a query is the mean cosine of the cluster's images. With
    length 1 it would be larger by 1 / length, a bias against classes that keep their images.
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
    filled = sizes > 0  # a cluster can become empty
    return sums[filled] / sizes[filled, None], sizes[filled].float()


def leave_one_out(
    features: Tensor,
    labels: Tensor,
    origin: Tensor,
    chosen: Tensor,
    rows: Tensor,
    classes: int,
    taus: tuple[float, ...],
) -> Tensor:
    """log p(x|c) of images in a memory of labelled images, without the image itself: [T,B,C] float32, for each of `taus`.

    features: [N,D] and labels: [N] int64, of all images. origin: [N] int64; an image is not compared with rows of its own
    origin, such as copies of it or images of its sequence. chosen: [B] int64, the images. rows: [K] int64, the images that
    are rows; see `choose_rows`. A class without another row has the value -inf.
    """
    unit = F.normalize(features[rows].float(), dim=1)
    row_class, row_origin = labels[rows], origin[rows]
    parts = []
    for part in chosen.split(BATCH):
        cosines = F.linear(F.normalize(features[part].float(), dim=1), unit)
        own = row_origin == origin[part][:, None]
        compared = torch.zeros(len(part), classes).index_add(1, row_class, (~own).float())
        cosines = cosines.masked_fill(own, -torch.inf)
        mixtures = [log_mixture(cosines, torch.zeros(len(rows)), row_class, classes, tau) for tau in taus]
        parts.append((torch.stack(mixtures) - compared.log()).masked_fill(compared == 0, -torch.inf))
    return torch.cat(parts, 1)


def choose_rows(labels: Tensor, classes: int, limit: int) -> Tensor:
    """Images that are rows of a memory of at most `limit` rows, int64 [K]: all of small classes, a sample of large ones.

    All classes have the same maximum, as in `rows_per_class`, which raises ValueError for a limit below the classes.
    """
    budget = rows_per_class(torch.bincount(labels, minlength=classes).tolist(), limit)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    own = [shuffled[labels[shuffled] == label][:most] for label, most in enumerate(budget) if most]
    return torch.cat(own).sort().values
