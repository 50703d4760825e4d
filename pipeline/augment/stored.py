"""Views of stored features: which of the stored views of an image a step takes, drawn on the CPU as all random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.augment.views import Draws


def draw_stored(count: int, views: int, stored: int, generator: torch.Generator) -> Draws:
    """For each of `views` views of `count` images, one of `stored` stored views."""
    return Draws((torch.randint(stored, (views, count, 1), generator=generator).double(),))


def take_stored(features: Tensor, draws: Draws) -> Tensor:
    """features [B,stored,D] → [views,B,D]."""
    number = draws.tables[0][..., 0].long()
    return features[torch.arange(len(features), device=features.device), number]
