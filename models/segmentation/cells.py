"""Labels of cells, and the random choice of the cells that L_GML compares. Static shapes, no copy to the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.segmentation.losses import IGNORED

LAST = 2**62  # above every number of `counter_random`
CLASSES = 256  # labels of a label map


class Cells(NamedTuple):
    """Chosen cells: rows int64 [N], positions in the cells [B*h*w] of a batch, and a mask bool [N] of the valid rows."""

    rows: Tensor
    valid: Tensor


def cell_labels(labels: Tensor, height: int, width: int) -> Tensor:
    """Label of the pixel at the centre of each cell: labels [B,H,W] → [B,height,width].

    The pixel is floor((i + 1/2) * H / height), as in torch's `nearest-exact`; its `nearest` would take the corner.
    """
    rows, columns = (
        (2 * torch.arange(cells, device=labels.device) + 1) * pixels // (2 * cells)
        for cells, pixels in ((height, labels.shape[1]), (width, labels.shape[2]))
    )
    return labels[:, rows[:, None], columns]


def choose_queries(labels: Tensor, number: int, random: Tensor, ignored: int = IGNORED) -> Cells:
    """Choose `number` cells with a class, uniformly without replacement, so that queries have the classes' prior.

    labels: [B,h,w], of the cells; random: [B*h*w] int64 below 2**62. If fewer cells have a class, the same cells are
    chosen again; if none has, no row is valid.
    """
    valid = labels.flatten() != ignored
    count = valid.sum()
    order = random.masked_fill(~valid, LAST).argsort()
    chosen = torch.arange(number, device=labels.device) % count.clamp(min=1)
    return Cells(order[chosen], (count > 0).expand(number))


def choose_keys(labels: Tensor, number: int, per_class: int, random: Tensor, ignored: int = IGNORED) -> Cells:
    """Choose at most `per_class` random cells of each class in each image, and of those at most `number`, in random order.

    labels: [B,h,w], of the cells; random: [2,B*h*w] int64 below 2**62. Rows beyond the available cells are not valid.
    """
    flat = labels.flatten().long()
    image = torch.arange(len(labels), device=labels.device).repeat_interleave(labels[0].numel())
    group = (image * CLASSES + flat).masked_fill(flat == ignored, LAST)
    shuffled = random[0].argsort()
    order = shuffled[group[shuffled].argsort(stable=True)]
    sorted_group = group[order]
    rank = torch.arange(len(order), device=labels.device) - torch.searchsorted(sorted_group, sorted_group)
    chosen = (rank < per_class) & (sorted_group < LAST)
    first = random[1].masked_fill(~chosen, LAST).argsort()[:number]
    return Cells(order[first], chosen[first])
