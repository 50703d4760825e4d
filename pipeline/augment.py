"""Random views of a batch, made on the device it lies on, each image by its own draw."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.params import AugmentParams


def random_views(images: Tensor, views: int, params: AugmentParams, generator: torch.Generator) -> Tensor:
    """uint8 [B,3,H,W] → uint8 [views,B,3,H,W], independent draws in one pass: crop, flip, Cutout, in that order."""
    batch = images.repeat(views, 1, 1, 1)
    if params.crop_padding:
        batch = random_crop(batch, params.crop_padding, generator)
    if params.flip:
        flipped = _draw(0, 2, batch.shape[0], generator).bool().to(batch.device)
        batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
    if params.cutout:
        batch = cutout(batch, params.cutout, generator)
    return batch.view(views, *images.shape)


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pad [B,3,H,W] with `padding` black pixels on each side and crop H x W at a uniformly drawn place per image."""
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top = _draw(0, 2 * padding + 1, count, generator).to(images.device)
    left = _draw(0, 2 * padding + 1, count, generator).to(images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    index = torch.arange(count, device=images.device)[:, None, None, None]
    channels = torch.arange(3, device=images.device)[None, :, None, None]
    return padded[index, channels, rows[:, None, :, None], columns[:, None, None, :]]


def cutout(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Blacken one square per image of [B,3,H,W]: centre uniform over the pixels, clipped at the borders (DeVries 2017)."""
    count, _, height, width = images.shape
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)

    def inside(axis: Tensor, length: int) -> Tensor:
        start = _draw(0, length, count, generator).to(images.device)[:, None] - side // 2
        return (axis >= start) & (axis < start + side)

    hole = inside(rows, height)[:, :, None] & inside(columns, width)[:, None, :]
    return images.masked_fill(hole[:, None], 0)


def _draw(low: int, high: int, count: int, generator: torch.Generator) -> Tensor:
    # Drawn on the generator's own device (the CPU), so that a run's randomness is the same on every device.
    return torch.randint(low, high, (count,), generator=generator)
