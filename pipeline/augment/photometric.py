"""Photometric distortion of mmsegmentation: random brightness, contrast, saturation and hue of each image.

Every step is rounded to grey levels. Saturation and hue are those of HSV.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.augment.pixels import in_bytes

BRIGHTNESS = 32.0  # grey levels
FACTOR = (0.5, 1.5)  # of contrast and saturation
HUE = 36.0  # degrees; 18 in OpenCV's unit, half a circle in 180 steps
COLUMNS = 5  # of a row of `draw_photometric`


def draw_photometric(count: int, generator: torch.Generator) -> Tensor:
    """Draw brightness, contrast, contrast first, saturation and hue of each image: float64 [count, COLUMNS].

    Each change has probability 1/2; without it the brightness or hue is 0, the factor 1. contrast first: 1 before
    saturation and hue, 0 after them.
    """
    taken = torch.rand(count, 4, generator=generator) < 0.5
    chance = torch.rand(count, 4, dtype=torch.float64, generator=generator)
    first = torch.randint(2, (count,), generator=generator).double()
    low, high = FACTOR
    brightness, hue = (
        torch.where(taken[:, i], (2 * chance[:, i] - 1) * r, 0.0) for i, r in ((0, BRIGHTNESS), (3, HUE))
    )
    contrast, saturation = (torch.where(taken[:, i], low + (high - low) * chance[:, i], 1.0) for i in (1, 2))
    return torch.stack([brightness, contrast, first, saturation, hue], 1)


def apply_photometric(images: Tensor, drawn: Tensor) -> Tensor:
    """Apply the changes drawn for each image: uint8 [B,3,H,W] → uint8 [B,3,H,W]."""
    brightness, contrast, first, saturation, hue = drawn.float()[:, :, None, None, None].unbind(1)
    once = torch.ones_like(contrast)
    values = _rounded(images.float() + brightness)
    values = _rounded(values * torch.where(first > 0, contrast, once))
    values = _rounded(turned_hue(saturated(values, saturation), hue))
    return in_bytes(_rounded(values * torch.where(first > 0, once, contrast)))


def saturated(values: Tensor, factor: Tensor) -> Tensor:
    """Multiply the saturation of HSV, limited to 1: values [B,3,H,W] in 0..255, factor [B,1,1,1]; the same range."""
    high, low = values.amax(1, keepdim=True), values.amin(1, keepdim=True)
    # The distance from the largest channel is value times saturation; the smallest channel reaches 0 at saturation 1.
    return high - (high - values) * torch.minimum(factor, high / (high - low).clamp(min=1e-6))


def turned_hue(values: Tensor, degrees: Tensor) -> Tensor:
    """Turn the hue of HSV: values [B,3,H,W] in 0..255, degrees [B,1,1,1]; the same range."""
    red, green, blue = values.unbind(1)
    high, low = values.amax(1), values.amin(1)
    spread = high - low
    safe = spread.clamp(min=1e-6)
    sector = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sector = sector + degrees[:, 0] / 60
    # https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative
    shift = 5 - 2 * torch.arange(3, device=values.device)[:, None, None]
    place = (sector[:, None] + shift) % 6
    return high[:, None] - spread[:, None] * torch.minimum(place, 4 - place).clamp(0, 1)


def _rounded(values: Tensor) -> Tensor:
    return (values + 0.5).floor().clamp(0, 255)
