"""Augmentation by lookup tables: 256 entries per image and channel, applied with one gather.

Tables follow Pillow's ImageOps and ImageEnhance, the arithmetic of the official pipeline: entries are truncated, not
rounded. Table functions take images uint8 [N,3,H,W] and value float32 [N] and return tables uint8 [N,3,256].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.augment.pixels import blend, in_bytes, luminance

SOLARIZE_ADD_BELOW = 128  # only values below it are increased (timm's solarize_add, AutoAugment's SolarizeAdd)


def apply_tables(images: Tensor, tables: Tensor) -> Tensor:
    """Replace every value of uint8 [N,3,H,W] by its entry in tables uint8 [N,3,256]."""
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def invert(images: Tensor, value: Tensor) -> Tensor:
    """Table of 255 - x."""
    return _per_image((255 - _levels(value)).expand(len(images), 256))


def solarize(_images: Tensor, threshold: Tensor) -> Tensor:
    """Table of 255 - x for x at or above the threshold, x below it."""
    levels = _levels(threshold)
    return _per_image(torch.where(levels < threshold[:, None], levels, 255 - levels))


def solarize_add(_images: Tensor, addition: Tensor) -> Tensor:
    """Table of x + addition (at most 255) for x below 128, x otherwise."""
    levels = _levels(addition)
    return _per_image(torch.where(levels < SOLARIZE_ADD_BELOW, levels + addition[:, None], levels).clamp(0, 255))


def posterize(_images: Tensor, bits: Tensor) -> Tensor:
    """Table of x with only the `bits` (0 to 8) highest bits kept."""
    step = torch.exp2(8 - bits)[:, None]
    return _per_image(torch.floor(_levels(bits) / step) * step)


def brightness(_images: Tensor, factor: Tensor) -> Tensor:
    """Table of factor · x."""
    return _per_image(blend(torch.zeros_like(factor)[:, None], _levels(factor), factor[:, None]))


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Table of m + factor · (x - m), where m is the mean luminance of the image, rounded."""
    pixels = images.shape[2] * images.shape[3]
    total = luminance(images).sum((1, 2), dtype=torch.int64)
    mean = torch.div(2 * total + pixels, 2 * pixels, rounding_mode="floor").float()
    return _per_image(blend(mean[:, None], _levels(factor), factor[:, None]))


def autocontrast(images: Tensor, _value: Tensor) -> Tensor:
    """Table that stretches each channel to the range 0..255; a channel with a single value is unchanged."""
    flat = images.flatten(2)
    low, high = flat.amin(2, keepdim=True).double(), flat.amax(2, keepdim=True).double()
    # In float64 and in Pillow's order of operations, because entries are truncated: one ulp can change a grey level.
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)  # 255 / tensor is computed as 255 * (1 / tensor)
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    stretched = (levels * scale + -low * scale).clamp(0, 255)
    return torch.where(high > low, stretched, levels).to(torch.uint8)


def equalize(images: Tensor, _value: Tensor) -> Tensor:
    """Table that equalises the histogram of each channel, in integer arithmetic."""
    counts = histogram(images)
    levels = torch.arange(256, device=images.device)
    last = torch.where(counts > 0, levels, 0).amax(2, keepdim=True)
    pixels = images.shape[2] * images.shape[3]
    step = torch.div(pixels - counts.gather(2, last), 255, rounding_mode="floor")
    below = counts.cumsum(2) - counts
    safe = step.clamp(min=1)
    levelled = torch.div(torch.div(safe, 2, rounding_mode="floor") + below, safe, rounding_mode="floor").clamp(max=255)
    # A step of 0 (all pixels, or nearly all, have one value) leaves the channel unchanged.
    return torch.where(step > 0, levelled, levels).to(torch.uint8)


def histogram(images: Tensor) -> Tensor:
    """Histogram of each channel of uint8 [N,3,H,W]: int64 [N,3,256]."""
    count, channels = images.shape[:2]
    start = 256 * torch.arange(count * channels, device=images.device)
    slots = (images.flatten(2).long() + start.view(count, channels, 1)).flatten()
    counts = torch.zeros(count * channels * 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(0, slots, torch.ones_like(slots)).view(count, channels, 256)


def _levels(value: Tensor) -> Tensor:
    return torch.arange(256, dtype=torch.float32, device=value.device)


def _per_image(table: Tensor) -> Tensor:
    # [N,256] → [N,3,256]: the same table for all three channels.
    return in_bytes(table)[:, None].expand(-1, 3, -1)


LOOKUP: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    table.__name__: table
    for table in (autocontrast, invert, equalize, solarize, solarize_add, posterize, contrast, brightness)
}
