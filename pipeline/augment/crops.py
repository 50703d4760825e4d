"""Where a view is cut from its image: padded crop or resized crop, with the flip, and the hole of Cutout.

Draws are CPU tensors, float64 or int64, one row an image; what applies them takes the same tensors on the images' device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RATIO = (3 / 4, 4 / 3)  # of a resized crop's width to its height (Szegedy et al. 2015)
ATTEMPTS = 10
CHANCES = 2 * ATTEMPTS + 2  # random numbers of a resized crop: area and ratio of each attempt, then row and column
WEIGHT_BITS = 22  # of Pillow's resize
LARGE = 64 * 64  # pixels from which the CPU is quicker with an image at a time


def padded_crop(images: Tensor, top: Tensor, left: Tensor, flipped: Tensor, padding: int) -> Tensor:
    """uint8 [B,3,H,W] with `padding` black pixels on each side, cropped H x W at top, left int64 [V,B]: uint8 [V,B,3,H,W].

    Where `flipped` (bool [V,B]) the crop is mirrored left to right.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (padding,) * 4) if padding else images
    rows = top[..., None] + torch.arange(height, device=images.device)
    columns = left[..., None] + _columns(width, flipped)
    place = (rows[..., None] * padded.shape[3] + columns[..., None, :]).flatten(2)
    views = place.shape[0]
    found = padded.flatten(2).expand(views, -1, -1, -1).gather(3, place[:, :, None].expand(-1, -1, 3, -1))
    return found.view(views, *images.shape)


def resized_crop(images: Tensor, box: Tensor, flipped: Tensor) -> Tensor:
    """uint8 [B,3,H,W] → uint8 [V,B,3,H,W]: box (top, left, height, width) int64 [V,B,4] enlarged to H x W, bilinearly.

    Columns first, then rows, each rounded to grey levels by Pillow's fixed point; pixels outside the box play no part.
    A box is never larger than the image, so that there is nothing to smooth before. Where `flipped`, mirrored.
    """
    large = images.shape[2] * images.shape[3] >= LARGE
    return (_one_by_one if large and images.device.type == "cpu" else _all_at_once)(images, box, flipped)


def _all_at_once(images: Tensor, box: Tensor, flipped: Tensor) -> Tensor:
    height, width = images.shape[2:]
    views = box.shape[0]
    top, left, tall, wide = box.unbind(-1)
    image = images.expand(views, -1, -1, -1, -1)
    image = _enlarged(image, 4, left, wide, _columns(width, flipped))
    rows = torch.arange(height, device=images.device).expand(*box.shape[:2], -1)
    return _enlarged(image, 3, top, tall, rows)


def _enlarged(image: Tensor, axis: int, start: Tensor, length: Tensor, position: Tensor) -> Tensor:
    # image [V,B,3,H,W] along one axis: output position [V,B,S] from start .. start + length, both [V,B].
    size = position.shape[-1]
    first, second, share = _neighbours(start, length, position)
    shape = (*position.shape[:2], 1, 1, size) if axis == 4 else (*position.shape[:2], 1, size, 1)

    def pixels(index: Tensor) -> Tensor:
        return image.gather(axis, index.view(shape).expand(image.shape)).to(torch.int32)

    share = share.view(shape)
    total = pixels(first) * ((1 << WEIGHT_BITS) - share) + pixels(second) * share
    return ((total + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS).to(torch.uint8)


def _neighbours(start: Tensor, length: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Output positions [...,S] of start .. start + length [...]: the two pixels that each lies between, and the second's share.
    place = (position + 0.5).double() * (length.double() / position.shape[-1])[..., None] - 0.5
    before = place.floor()
    share = ((place - before) * (1 << WEIGHT_BITS) + 0.5).to(torch.int32)
    before, last = before.long(), length[..., None] - 1
    first, second = (start[..., None] + (before + offset).clamp(min=0).minimum(last) for offset in (0, 1))
    return first, second, share


def _one_by_one(images: Tensor, box: Tensor, flipped: Tensor) -> Tensor:
    # The same, for the CPU: an image at a time stays in its cache, and whole lines are copied where a gather takes pixels.
    height, width = images.shape[2:]
    top, left, tall, wide = box.unbind(-1)
    across = _neighbours(torch.zeros_like(left), wide, _columns(width, flipped))
    down = _neighbours(torch.zeros_like(top), tall, torch.arange(height).expand(*box.shape[:2], -1))
    out = images.new_empty((len(box), *images.shape))
    for view, boxes in enumerate(box.tolist()):
        for place, (y, x, rows, columns) in enumerate(boxes):
            part = images[place, :, y : y + rows, x : x + columns].transpose(1, 2).contiguous()
            part = _between_lines(part, *(table[view, place] for table in across)).transpose(1, 2).contiguous()
            out[view, place] = _between_lines(part, *(table[view, place] for table in down))
    return out


def _between_lines(image: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    # uint8 [3,L,M] → uint8 [3,S,M]: a line at each of S places.
    total = image.index_select(1, second).to(torch.int32)
    lower = image.index_select(1, first).to(torch.int32)
    total.sub_(lower).mul_(share[:, None]).add_(lower.bitwise_left_shift_(WEIGHT_BITS))
    return total.add_(1 << (WEIGHT_BITS - 1)).bitwise_right_shift_(WEIGHT_BITS).to(torch.uint8)


def _columns(width: int, flipped: Tensor) -> Tensor:
    column = torch.arange(width, device=flipped.device)
    return torch.where(flipped[..., None], width - 1 - column, column)


def draw_chances(count: int, generator: torch.Generator) -> Tensor:
    """float64 [count, CHANCES], uniform in 0..1: what `boxes_of` needs for a box in an image of any size."""
    chance = torch.rand(2, count, ATTEMPTS, dtype=torch.float64, generator=generator)
    place = torch.rand(2, count, dtype=torch.float64, generator=generator)
    return torch.cat([chance[0], chance[1], place.T], 1)


def boxes_of(chances: Tensor, height: Tensor, width: Tensor, scale: list[float]) -> Tensor:
    """int64 [...,4] (top, left, height, width) of random resized crops, as torchvision's RandomResizedCrop draws them.

    chances: [...,CHANCES] of `draw_chances`; height, width: int64 of the images, broadcast to [...]. Area uniform in `scale` of
    the image, ratio log-uniform in 3/4 .. 4/3, the first of ten attempts that fits, or the largest centred box of an
    allowed ratio; then a uniform place.
    """
    chance, down, across = chances[..., : 2 * ATTEMPTS].unflatten(-1, (2, ATTEMPTS)), chances[..., -2], chances[..., -1]
    area = (height * width)[..., None] * (scale[0] + (scale[1] - scale[0]) * chance[..., 0, :])
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = torch.exp(low + (high - low) * chance[..., 1, :])
    wide, tall = torch.round(torch.sqrt(area * ratio)).long(), torch.round(torch.sqrt(area / ratio)).long()
    fits = (wide > 0) & (wide <= width[..., None]) & (tall > 0) & (tall <= height[..., None])
    first = fits.long().argmax(-1, keepdim=True)  # argmax gives the first of equals
    found = fits.any(-1)
    largest_wide = torch.minimum(width, torch.round(height.double() * RATIO[1]).long())
    largest_tall = torch.minimum(height, torch.round(width.double() / RATIO[0]).long())
    wide = torch.where(found, wide.gather(-1, first).squeeze(-1), largest_wide)
    tall = torch.where(found, tall.gather(-1, first).squeeze(-1), largest_tall)
    top = torch.where(found, (down * (height - tall + 1)).long(), (height - largest_tall) // 2)
    left = torch.where(found, (across * (width - wide + 1)).long(), (width - largest_wide) // 2)
    return torch.stack([top, left, tall, wide], -1)


def cutout(images: Tensor, row: Tensor, column: Tensor, side: int) -> Tensor:
    """uint8 [N,3,H,W] with a black square of `side` pixels around row, column int64 [N], clipped at the borders."""
    height, width = images.shape[2:]

    def inside(length: int, centre: Tensor) -> Tensor:
        distance = torch.arange(length, device=images.device) - (centre[:, None] - side // 2)
        return (distance >= 0) & (distance < side)

    hole = inside(height, row)[:, :, None] & inside(width, column)[:, None, :]
    return images * (~hole)[:, None].to(torch.uint8)
