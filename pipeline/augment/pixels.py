"""Pixel operations that combine channels or neighbouring pixels: saturation, grey, sharpness, blur.

Every operation takes images uint8 [N,3,H,W] and value float32 [N] and returns uint8 [N,3,H,W], in Pillow's arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLUR_PASSES = 3
MAX_BLUR_RADIUS = 2.0


def blend(degenerate: Tensor, original: Tensor, factor: Tensor) -> Tensor:
    """degenerate + factor · (original - degenerate), float32 clipped to [0, 255]; the caller truncates it to uint8."""
    return (degenerate + factor * (original - degenerate)).clamp(0, 255)


def in_bytes(values: Tensor) -> Tensor:
    """Truncate values within 0..255, of any dtype, to uint8."""
    # Through int16: PyTorch's cast from float32 to uint8 is five times slower on the CPU than both casts.
    return values.to(torch.int16).to(torch.uint8)


def luminance(images: Tensor) -> Tensor:
    """Luminance, int32 [N,H,W]: .299 R + .587 G + .114 B, rounded, in the 16-bit fixed point of Pillow's mode L (ITU-R 601)."""
    red, green, blue = images.to(torch.int32).unbind(1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def coloured(images: Tensor, factor: Tensor) -> Tensor:
    """Saturation: factor 0 gives grey, 1 the image."""
    grey = luminance(images).float()[:, None]
    return in_bytes(blend(grey, images.float(), factor[:, None, None, None]))


def grey_only(images: Tensor, _value: Tensor) -> Tensor:
    """Greyscale: all three channels are the luminance."""
    return in_bytes(luminance(images))[:, None].expand_as(images)


def sharpened(images: Tensor, factor: Tensor) -> Tensor:
    """Sharpness: factor 0 gives a 3x3 smoothing (centre 5, others 1, over 13), 1 the image; border pixels are unchanged."""
    wide = images.to(torch.int16)
    inner = wide[:, :, 1:-1, 1:-1]
    columns = wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]
    box = columns[:, :, :-2] + columns[:, :, 1:-1] + columns[:, :, 2:]
    # A multiple of 1/13 is never halfway between integers, so floor(x + 0.5) equals Pillow's rounding despite float
    # errors.
    smooth = ((box + 4 * inner).float() / 13 + 0.5).floor()
    changed = images.clone()
    changed[:, :, 1:-1, 1:-1] = in_bytes(blend(smooth, inner.float(), factor[:, None, None, None]))
    return changed


def blurred(images: Tensor, radius: Tensor) -> Tensor:
    """Pillow's Gaussian blur with standard deviation `radius` (pixels, at most 2): three box blurs per direction.

    A box of fractional width has the weight `whole` for pixels fully inside and `part` for the two pixels at its ends.
    The width is chosen so that three boxes have the variance of the Gaussian (Gwosdek et al. 2011). Beyond the border
    the last pixel is repeated. Every pass is rounded to grey levels, as in Pillow.
    """
    variance = radius.double().clamp(max=MAX_BLUR_RADIUS) ** 2 / BLUR_PASSES
    reach = torch.floor((torch.sqrt(12 * variance + 1) - 1) / 2)
    cut = (2 * reach + 1) * (reach * (reach + 1) - 3 * variance) / (6 * (variance - (reach + 1) ** 2))
    whole = 1 / (2 * (reach + cut) + 1)
    part = (1 - (2 * reach + 1) * whole) / 2
    # With a radius of at most 2, a box covers at most one whole and one partial pixel to either side.
    first, second = torch.where(reach > 0, whole, part), torch.where(reach > 0, part, 0)
    weights = [weight.float()[:, None, None, None] for weight in (whole, first, second)]
    values = images.float()
    for axis in (3, 2):
        for _ in range(BLUR_PASSES):
            values = _box(values, weights, axis)
    return in_bytes(values)


def _box(values: Tensor, weights: list[Tensor], axis: int) -> Tensor:
    size = values.shape[axis]
    padded = F.pad(values, (2, 2, 0, 0) if axis == 3 else (0, 0, 2, 2), mode="replicate")

    def around(distance: int) -> Tensor:
        return padded.narrow(axis, 2 - distance, size) + padded.narrow(axis, 2 + distance, size)

    return (weights[0] * values + weights[1] * around(1) + weights[2] * around(2) + 0.5).floor()
