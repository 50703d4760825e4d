"""Crops of a view: padded crop or resized crop, with horizontal flip, and Cutout.

Random numbers are drawn as CPU tensors, float64 or int64, one row per image. Functions that apply them take them on the
images' device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RATIO = (3 / 4, 4 / 3)  # width / height of a resized crop (Szegedy et al. 2015)
ATTEMPTS = 10
CHANCES = 2 * ATTEMPTS + 2  # random numbers of a resized crop: area and ratio of each attempt, then row and column
WEIGHT_BITS = 22  # of the fixed point in Pillow's resize
BLACK = (0, 0, 0)
LARGE = 64 * 64  # pixels from which one image at a time is faster on the CPU


def padded_crop(
    images: Tensor, top: Tensor, left: Tensor, flipped: Tensor, padding: int, fill: Sequence[int] = BLACK
) -> Tensor:
    """Crop H x W at top, left int64 [V,B] from uint8 [B,3,H,W] padded with the colour `fill`: uint8 [V,B,3,H,W].

    padding: pixels on each side. The crop is mirrored left to right where `flipped` (bool [V,B]) is True.
    """
    height, width = images.shape[2:]
    padded = images
    if padding:
        padded = colour(fill, images.device).expand(len(images), 3, height + 2 * padding, width + 2 * padding).clone()
        padded[:, :, padding : padding + height, padding : padding + width] = images
    rows = top[..., None] + torch.arange(height, device=images.device)
    columns = left[..., None] + _columns(width, flipped)
    index = (rows[..., None] * padded.shape[3] + columns[..., None, :]).flatten(2)
    views = index.shape[0]
    crops = padded.flatten(2).expand(views, -1, -1, -1).gather(3, index[:, :, None].expand(-1, -1, 3, -1))
    return crops.view(views, *images.shape)


def resized_crop(images: Tensor, box: Tensor, flipped: Tensor) -> Tensor:
    """Enlarge boxes (top, left, height, width) int64 [V,B,4] of uint8 [B,3,H,W] to H x W, bilinearly: uint8 [V,B,3,H,W].

    Columns are resized first, then rows; each result is rounded to grey levels in Pillow's fixed point. Pixels outside
    the box are not used. A box is never larger than the image, so no smoothing is needed. Mirrored where `flipped` is
    True.
    """
    large = images.shape[2] * images.shape[3] >= LARGE
    return (resize_one_by_one if large and images.device.type == "cpu" else resize_all_at_once)(images, box, flipped)


def resize_all_at_once(images: Tensor, box: Tensor, flipped: Tensor) -> Tensor:
    height, width = images.shape[2:]
    views = box.shape[0]
    top, left, tall, wide = box.unbind(-1)
    image = images.expand(views, -1, -1, -1, -1)
    image = resize_axis(image, 4, left, wide, _columns(width, flipped))
    rows = torch.arange(height, device=images.device).expand(*box.shape[:2], -1)
    return resize_axis(image, 3, top, tall, rows)


def resize_axis(
    image: Tensor, axis: int, start: Tensor, length: Tensor, position: Tensor, size: Tensor | None = None
) -> Tensor:
    """Resize one axis (3 or 4) of uint8 [V,B,3,H,W] bilinearly, without smoothing, at the positions int64 [V,B,S].

    Positions 0 .. size span the pixels start .. start + length; all three int64 [V,B]. size None: S. Result: uint8, S
    pixels along the axis, rounded in Pillow's fixed point.
    """
    count = position.shape[-1]
    first, second, share = _neighbours(start, length, position, size)
    shape = (*position.shape[:2], 1, 1, count) if axis == 4 else (*position.shape[:2], 1, count, 1)

    def pixels(index: Tensor) -> Tensor:
        sides = (image.shape[3], count) if axis == 4 else (count, image.shape[4])
        return image.gather(axis, index.view(shape).expand(*image.shape[:3], *sides)).to(torch.int32)

    share = share.view(shape)
    total = pixels(first) * ((1 << WEIGHT_BITS) - share) + pixels(second) * share
    return ((total + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS).to(torch.uint8)


def _neighbours(
    start: Tensor, length: Tensor, position: Tensor, size: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    # For output positions [...,S] of 0 .. size (None: S) that span start .. start + length [...]: the two neighbouring
    # pixels and the second's weight.
    scale = length.double() / (position.shape[-1] if size is None else size)
    source = (position + 0.5).double() * scale[..., None] - 0.5
    before = source.floor()
    share = ((source - before) * (1 << WEIGHT_BITS) + 0.5).to(torch.int32)
    before, last = before.long(), length[..., None] - 1
    first, second = (start[..., None] + (before + offset).clamp(min=0).minimum(last) for offset in (0, 1))
    return first, second, share


def resize_one_by_one(images: Tensor, box: Tensor, flipped: Tensor) -> Tensor:
    # Same result as resize_all_at_once, for the CPU: one image at a time fits in its cache, and whole lines are copied
    # instead of single pixels by gather.
    height, width = images.shape[2:]
    top, left, tall, wide = box.unbind(-1)
    across = _neighbours(torch.zeros_like(left), wide, _columns(width, flipped))
    down = _neighbours(torch.zeros_like(top), tall, torch.arange(height).expand(*box.shape[:2], -1))
    out = images.new_empty((len(box), *images.shape))
    for view, boxes in enumerate(box.tolist()):
        for index, (y, x, rows, columns) in enumerate(boxes):
            part = images[index, :, y : y + rows, x : x + columns].transpose(1, 2).contiguous()
            part = _between_lines(part, *(table[view, index] for table in across)).transpose(1, 2).contiguous()
            out[view, index] = _between_lines(part, *(table[view, index] for table in down))
    return out


def _between_lines(image: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    # uint8 [3,L,M] → uint8 [3,S,M]: a line interpolated at each of S positions.
    total = image.index_select(1, second).to(torch.int32)
    lower = image.index_select(1, first).to(torch.int32)
    total.sub_(lower).mul_(share[:, None]).add_(lower.bitwise_left_shift_(WEIGHT_BITS))
    return total.add_(1 << (WEIGHT_BITS - 1)).bitwise_right_shift_(WEIGHT_BITS).to(torch.uint8)


def _columns(width: int, flipped: Tensor) -> Tensor:
    column = torch.arange(width, device=flipped.device)
    return torch.where(flipped[..., None], width - 1 - column, column)


def draw_chances(count: int, generator: torch.Generator) -> Tensor:
    """Draw the random numbers that `boxes_of` needs for an image of any size: float64 [count, CHANCES], uniform in 0..1."""
    chance = torch.rand(2, count, ATTEMPTS, dtype=torch.float64, generator=generator)
    position = torch.rand(2, count, dtype=torch.float64, generator=generator)
    return torch.cat([chance[0], chance[1], position.T], 1)


def boxes_of(chances: Tensor, height: Tensor, width: Tensor, scale: list[float]) -> Tensor:
    """Boxes of random resized crops as in torchvision's RandomResizedCrop: int64 [...,4] (top, left, height, width).

    chances: [...,CHANCES] from `draw_chances`; height, width: int64 of the images, broadcast to [...]. The area is
    uniform in `scale` of the image, the ratio log-uniform in 3/4 .. 4/3. The first of ten attempts that fits is used,
    at a uniform position; if none fits, the largest centred box of an allowed ratio.
    """
    chance, down, across = chances[..., : 2 * ATTEMPTS].unflatten(-1, (2, ATTEMPTS)), chances[..., -2], chances[..., -1]
    area = (height * width)[..., None] * (scale[0] + (scale[1] - scale[0]) * chance[..., 0, :])
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = torch.exp(low + (high - low) * chance[..., 1, :])
    wide, tall = torch.round(torch.sqrt(area * ratio)).long(), torch.round(torch.sqrt(area / ratio)).long()
    fits = (wide > 0) & (wide <= width[..., None]) & (tall > 0) & (tall <= height[..., None])
    first = fits.long().argmax(-1, keepdim=True)  # argmax returns the first of equal values
    any_fits = fits.any(-1)
    largest_wide = torch.minimum(width, torch.round(height.double() * RATIO[1]).long())
    largest_tall = torch.minimum(height, torch.round(width.double() / RATIO[0]).long())
    wide = torch.where(any_fits, wide.gather(-1, first).squeeze(-1), largest_wide)
    tall = torch.where(any_fits, tall.gather(-1, first).squeeze(-1), largest_tall)
    top = torch.where(any_fits, (down * (height - tall + 1)).long(), (height - largest_tall) // 2)
    left = torch.where(any_fits, (across * (width - wide + 1)).long(), (width - largest_wide) // 2)
    return torch.stack([top, left, tall, wide], -1)


def colour(levels: Sequence[int], device: torch.device) -> Tensor:
    """uint8 [3,1,1] on the device, filled there: a captured step may not copy from the host."""
    return torch.stack([torch.full((1, 1), level, dtype=torch.uint8, device=device) for level in levels])


def cutout(images: Tensor, row: Tensor, column: Tensor, side: int, fill: Sequence[int] = BLACK) -> Tensor:
    """Cutout: uint8 [N,3,H,W] with a square of `side` pixels around row, column int64 [N], clipped at the borders.

    fill: colour of the square.
    """
    height, width = images.shape[2:]

    def inside(length: int, centre: Tensor) -> Tensor:
        distance = torch.arange(length, device=images.device) - (centre[:, None] - side // 2)
        return (distance >= 0) & (distance < side)

    hole = inside(height, row)[:, :, None] & inside(width, column)[:, None, :]
    # Products of bytes are faster than torch.where.
    kept = images * (~hole)[:, None].to(torch.uint8)
    return kept + hole[:, None].to(torch.uint8) * colour(fill, images.device) if any(fill) else kept
