"""Select one of the stored views of each image for a training step. Random numbers are drawn on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.augment.views import Draws


def draw_stored(count: int, views: int, stored: int, generator: torch.Generator) -> Draws:
    """Draw the index of a stored view, below `stored`, for each of `views` views of `count` images."""
    return Draws((torch.randint(stored, (views, count, 1), generator=generator).double(),))


def take_stored(features: Tensor, draws: Draws) -> Tensor:
    """Gather the drawn views: features [B,stored,D] → [views,B,D]."""
    number = draws.tables[0][..., 0].long()
    rows = torch.arange(len(features), device=features.device) * features.shape[1] + number
    # index_select copies whole rows, which is faster on the CPU than indexing with two tensors.
    return features.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)
