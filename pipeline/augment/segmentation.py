"""Random crops of images with their label maps: resize by a random factor, crop, flip, photometric distortion.

Random numbers are drawn on the CPU and do not depend on the images' sizes; everything else runs on the images' device.
Image and label map have the same geometry: the image is interpolated bilinearly without smoothing, as by OpenCV, the
label map takes the pixel at the same place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.augment.crops import colour, resize_axis
from pipeline.augment.photometric import apply_photometric, draw_photometric
from pipeline.augment.views import Draws, one_thread
from pipeline.params import SegmentationAugmentParams

ATTEMPTS = 10
LABELS = 256


class Crop(NamedTuple):
    """Geometry of a crop of each image, int64 [B] each: the resized image's height and width, and the crop's corner.

    flipped: bool [B].
    """

    height: Tensor
    width: Tensor
    top: Tensor
    left: Tensor
    flipped: Tensor


def draw_crops(count: int, params: SegmentationAugmentParams, generator: torch.Generator) -> Draws:
    """Draw the random numbers of one view of `count` images: ratio, corners of ten crops, flip, photometric distortion."""
    ratio = torch.rand(count, 1, dtype=torch.float64, generator=generator)
    low, high = params.ratio
    corners = torch.rand(count, 2 * ATTEMPTS, dtype=torch.float64, generator=generator)
    flipped = torch.randint(2 if params.flip else 1, (count, 1), generator=generator).double()
    columns = [low + (high - low) * ratio, corners, flipped]
    if params.photometric:
        columns.append(draw_photometric(count, generator))
    return Draws((torch.cat(columns, 1)[None],))


def apply_crops(
    images: Tensor,
    labels: Tensor,
    draws: Draws,
    params: SegmentationAugmentParams,
    sizes: Tensor | None = None,
    *,
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
    ignored: int = 255,
) -> tuple[Tensor, Tensor]:
    """Crop images uint8 [B,3,H,W] and label maps uint8 [B,H,W]: uint8 [1,B,3,h,w] and uint8 [B,h,w] of params.crop.

    draws: of `draw_crops`, on the same device. sizes: int64 [B,2], height and width of each image if the tensors are
    padded at the bottom and at the right; None: the tensors have no padding. mean: colour in 0..1 of the padding.
    """
    with one_thread(images.device):
        return _apply(images, labels, draws.tables[0][0], params, sizes, mean, ignored)


def _apply(
    images: Tensor,
    labels: Tensor,
    table: Tensor,
    params: SegmentationAugmentParams,
    sizes: Tensor | None,
    mean: tuple[float, float, float],
    ignored: int,
) -> tuple[Tensor, Tensor]:
    if sizes is None:
        height, width = (torch.full((len(labels),), side, device=labels.device) for side in labels.shape[1:])
    else:
        height, width = sizes.unbind(1)
    crop = choose_crops(labels, height, width, table, params, ignored)
    rows, valid_rows = _positions(crop.top, crop.height, params.crop[0], torch.zeros_like(crop.flipped))
    columns, valid_columns = _positions(crop.left, crop.width, params.crop[1], crop.flipped)
    start = torch.zeros_like(height)[None]
    cut = resize_axis(images[None], 4, start, width[None], columns[None], crop.width[None])
    cut = resize_axis(cut, 3, start, height[None], rows[None], crop.height[None])
    if params.photometric:
        cut = apply_photometric(cut[0], table[:, 2 * ATTEMPTS + 2 :])[None]
    valid = valid_rows[:, :, None] & valid_columns[:, None, :]
    fill = colour([round(255 * v) for v in mean], images.device)
    own = _nearest(labels, rows, crop.height, height, columns, crop.width, width)
    return torch.where(valid[:, None], cut, fill), own.masked_fill(~valid, ignored)


def choose_crops(
    labels: Tensor, height: Tensor, width: Tensor, table: Tensor, params: SegmentationAugmentParams, ignored: int
) -> Crop:
    """The resized size of each image, and its first crop with at least two classes of which none fills max_share.

    If none of the ten crops qualifies, the last one is taken. labels: [B,H,W]; height, width: int64 [B]; table: float64
    [B,columns] of `draw_crops`.
    """
    factor = table[:, 0]
    if params.scale:
        long, short = params.scale
        sides = torch.stack([height, width]).double()
        factor = factor * torch.minimum(long / sides.amax(0), short / sides.amin(0))
    tall, wide = ((side * factor + 0.5).long().clamp(min=1) for side in (height, width))
    chance = table[:, 1 : 2 * ATTEMPTS + 1].unflatten(1, (2, ATTEMPTS))
    corners = [
        (chance[:, axis] * ((side - crop).clamp(min=0) + 1)[:, None]).long()
        for axis, (side, crop) in enumerate(((tall, params.crop[0]), (wide, params.crop[1])))
    ]
    flipped = table[:, 2 * ATTEMPTS + 1].bool()
    if params.max_share < 1:
        last = torch.full_like(tall, ATTEMPTS - 1)
        for attempt in reversed(range(ATTEMPTS - 1)):
            top, left = (corner[:, attempt] for corner in corners)
            accepted = _mixes_classes(labels, height, width, Crop(tall, wide, top, left, flipped), params, ignored)
            last = torch.where(accepted, attempt, last)
    else:
        last = torch.zeros_like(tall)
    top, left = (corner.gather(1, last[:, None]).squeeze(1) for corner in corners)
    return Crop(tall, wide, top, left, flipped)


def _mixes_classes(
    labels: Tensor, height: Tensor, width: Tensor, crop: Crop, params: SegmentationAugmentParams, ignored: int
) -> Tensor:
    # bool [B]: at least two classes, none of which has max_share of the labelled pixels.
    rows, valid_rows = _positions(crop.top, crop.height, params.crop[0], torch.zeros_like(crop.flipped))
    columns, valid_columns = _positions(crop.left, crop.width, params.crop[1], torch.zeros_like(crop.flipped))
    own = _nearest(labels, rows, crop.height, height, columns, crop.width, width)
    valid = valid_rows[:, :, None] & valid_columns[:, None, :]
    own = own.masked_fill(~valid, ignored).flatten(1).long()
    counts = torch.zeros(len(labels), LABELS, dtype=torch.int64, device=labels.device)
    counts.scatter_add_(1, own, torch.ones_like(own))
    counts[:, ignored] = 0
    largest, total = counts.amax(1), counts.sum(1)
    return ((counts > 0).sum(1) > 1) & (largest < params.max_share * total)


def _positions(start: Tensor, length: Tensor, size: int, flipped: Tensor) -> tuple[Tensor, Tensor]:
    # Rows or columns of the resized image in a crop of `size` from `start`, int64 [B,size], and whether they exist.
    step = torch.arange(size, device=start.device).expand(len(start), -1)
    inside = torch.minimum(length - start, torch.full_like(length, size))[:, None]
    index = torch.where(flipped[:, None], inside - 1 - step, step).clamp(min=0)
    return start[:, None] + index, step < inside


def _nearest(
    labels: Tensor, rows: Tensor, tall: Tensor, height: Tensor, columns: Tensor, wide: Tensor, width: Tensor
) -> Tensor:
    # Label at positions of the resized image: the pixel under the centre, as in torch's `nearest-exact`.
    def source(position: Tensor, size: Tensor, length: Tensor) -> Tensor:
        index = (2 * position + 1) * length[:, None] // (2 * size[:, None])
        return torch.minimum(index, length[:, None] - 1)

    down, across = source(rows, tall, height), source(columns, wide, width)
    image = torch.arange(len(labels), device=labels.device)[:, None, None]
    return labels[image, down[:, :, None], across[:, None, :]]
