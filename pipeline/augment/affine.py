"""Affine operations (shear, translation, rotation) by one gather, with a matrix per image in 16-bit fixed point.

Pillow uses the same fixed-point arithmetic for nearest neighbours; the result is the same on every device. Coordinates
are int32, which suffices for images of up to 8192 pixels per side.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pipeline.augment.crops import colour
from pipeline.augment.pixels import in_bytes

AFFINE = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")

Method = Literal["nearest", "bilinear", "bicubic"]
FRACTION_BITS = 16
ONE = 1 << FRACTION_BITS


def fixed_matrix(name: str, value: Tensor, height: int, width: int) -> Tensor:
    """Fixed-point matrix of operation `name` for float64 [...] arguments: int64 [...,6], (a, b, c, d, e, f) · 2^16.

    Output pixel (column x, row y) is read at (a·x + b·y + c, d·x + e·y + f), in pixels; the centre of a pixel is at one
    half. Arguments: shear is a factor about the top left corner (Pillow's transform), translation is in pixels to the
    left or up, rotation is in degrees counter-clockwise about the centre.
    """
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    if name == "shear_x":
        entries = (one, value, zero, zero, one, zero)
    elif name == "shear_y":
        entries = (one, zero, zero, value, one, zero)
    elif name == "translate_x":
        entries = (one, zero, value, zero, one, zero)
    elif name == "translate_y":
        entries = (one, zero, zero, zero, one, value)
    elif name == "rotate":
        cosine, sine = torch.cos(value * (math.pi / 180)), torch.sin(value * (math.pi / 180))
        across, down = width / 2, height / 2
        shift_x, shift_y = across - across * cosine + down * sine, down - across * sine - down * cosine
        entries = (cosine, -sine, shift_x, sine, cosine, shift_y)
    else:
        raise ValueError(f"{name!r} is not geometric; expected one of {', '.join(AFFINE)}")
    a, b, c, d, e, f = entries
    centred = (a, b, c + (a + b) / 2, d, e, f + (d + e) / 2)
    return torch.floor(torch.stack(centred, -1) * ONE + 0.5).long()


def resample(images: Tensor, matrix: Tensor, *, fill: tuple[int, int, int], method: Method) -> Tensor:
    """Apply the matrix int64 [N,6] of `fixed_matrix` to uint8 [N,3,H,W]; pixels from outside the image get `fill`."""
    height, width = images.shape[2:]
    column = torch.arange(width, dtype=torch.int32, device=images.device)
    row = torch.arange(height, dtype=torch.int32, device=images.device)[:, None]
    a, b, c, d, e, f = (entry[:, None, None] for entry in matrix.to(torch.int32).unbind(1))
    x, y = (a * column + c) + b * row, d * column + (e * row + f)
    inside = (x >= 0) & (x < width * ONE) & (y >= 0) & (y < height * ONE)
    if method == "bilinear":
        resampled = _bilinear(images, x, y)
    elif method == "bicubic":
        resampled = _bicubic(images, x, y)
    else:
        resampled = _pixels(images, (x >> FRACTION_BITS).clamp(0, width - 1), (y >> FRACTION_BITS).clamp(0, height - 1))
    # A sum of products, because `where` on uint8 is many times slower on the CPU.
    inside, beyond = inside[:, None].to(torch.uint8), (~inside)[:, None].to(torch.uint8)
    return resampled * inside + colour(fill, images.device) * beyond


def _bilinear(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    height, width = images.shape[2:]
    x, y = x - ONE // 2, y - ONE // 2
    right, down = ((position & (ONE - 1)).float().div(ONE)[:, None] for position in (x, y))
    x, y = x >> FRACTION_BITS, y >> FRACTION_BITS
    columns = x.clamp(0, width - 1), (x + 1).clamp(0, width - 1)
    rows = y.clamp(0, height - 1), (y + 1).clamp(0, height - 1)

    def line(row: Tensor) -> Tensor:
        first, second = (_pixels(images, column, row).float() for column in columns)
        return first + right * (second - first)

    upper, lower = line(rows[0]), line(rows[1])
    # Truncated like in Pillow's filter.
    return in_bytes(upper + down * (lower - upper))


def _bicubic(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    height, width = images.shape[2:]
    x, y = x - ONE // 2, y - ONE // 2
    across, down = (_cubic_weights((position & (ONE - 1)).float().div(ONE)[:, None]) for position in (x, y))
    x, y = x >> FRACTION_BITS, y >> FRACTION_BITS
    total: Tensor | float = 0.0
    for step, weight in zip(range(-1, 3), down, strict=True):
        row = (y + step).clamp(0, height - 1)
        columns = ((x + offset).clamp(0, width - 1) for offset in range(-1, 3))
        line = sum(w * _pixels(images, column, row).float() for w, column in zip(across, columns, strict=True))
        total = total + weight * line
    return in_bytes(torch.as_tensor(total).clamp(0, 255))


def _cubic_weights(d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of cubic convolution (a = -1) for four neighbours, at distance 0 <= d < 1 from the second towards the third."""
    square, cube = d * d, d * d * d
    return 2 * square - d - cube, 1 - 2 * square + cube, d + square - cube, cube - square


def _pixels(images: Tensor, column: Tensor, row: Tensor) -> Tensor:
    width = images.shape[3]
    index = (row * width + column).long().flatten(1)[:, None].expand(-1, 3, -1)
    return images.flatten(2).gather(2, index).view_as(images)
