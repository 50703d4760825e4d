"""Views of a batch: all random numbers are drawn on the CPU, then applied to all views in one pass on the images' device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.augment.affine import AFFINE, fixed_matrix
from pipeline.augment.crops import CHANCES, boxes_of, cutout, draw_chances, padded_crop, resized_crop
from pipeline.augment.operations import CODE, apply_slot
from pipeline.augment.policies import Plan, draw_bicubic, draw_slots, is_geometric, plan_of
from pipeline.params import AugmentParams
from pipeline.shared.host_memory import copy_to_device


@dataclass(frozen=True)
class Draws:
    """Random numbers of a batch's views: one table float64 [views,B,columns] for each group of views with the same policy.

    Columns, in this order: the crop (top, left; for a resized crop CHANCES numbers, because the box depends on the
    image's size); the flip; for each slot its operation, argument and, if it may move pixels, matrix (six) and, with
    params.bicubic, whether the interpolation is bicubic; row and column of the Cutout square. float64 represents the
    integers exactly. To replay a captured step, it is enough to copy into the tables.
    """

    tables: tuple[Tensor, ...]

    @property
    def views(self) -> int:
        """The number of views."""
        return sum(len(table) for table in self.tables)

    def rows(self, start: int, stop: int) -> Draws:
        """The draws of images start..stop of each view, a rank's share of a global batch."""
        return Draws(tuple(table[:, start:stop] for table in self.tables))

    def of(self, rows: list[int]) -> Draws:
        """The draws of the images `rows` of each view."""
        return Draws(tuple(table[:, rows] for table in self.tables))

    def to(self, device: torch.device | str) -> Draws:
        """The draws on a device, by `copy_to_device`."""
        return Draws(tuple(copy_to_device(table, device) for table in self.tables))


def draw_views(
    count: int, height: int, width: int, views: int, params: AugmentParams, generator: torch.Generator
) -> Draws:
    """Draw independent random numbers for `views` views of `count` images of height x width, on the CPU.

    View 0 is the classifier view (params.policy), the others are contrast views (params.contrast_policy).
    """
    with one_thread(torch.device("cpu")):
        tables = [
            _draw_table(policy, members * count, height, width, params, generator).view(members, count, -1)
            for policy, members in _runs(views, params)
        ]
    return Draws(tuple(tables))


def apply_views(images: Tensor, draws: Draws, params: AugmentParams) -> Tensor:
    """Apply draws on the same device: uint8 [B,3,H,W] → uint8 [views,B,3,H,W]; crop and flip, policy, Cutout, in that order.

    With images uint8 [B,views,3,H,W], each view has its own pixels; resized crops are then already cut and flipped:
    `cut_boxes`.
    """
    parts, first = [], 0
    with one_thread(images.device):
        for (policy, members), table in zip(_runs(draws.views, params), draws.tables, strict=True):
            own = images[:, first : first + members].transpose(0, 1) if images.dim() == 5 else images
            parts.append(_apply_table(own, table, plan_of(policy, params), params))
            first += members
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def cuts_originals(views: int, params: AugmentParams) -> bool:
    """Whether any of `views` views is a resized crop, which is cut from the original image."""
    return any(plan_of(policy, params).resized for policy, _ in _runs(views, params))


def cut_boxes(draws: Draws, height: Tensor, width: Tensor, params: AugmentParams) -> list[tuple[list[int] | None, ...]]:
    """Boxes (top, left, height, width, flipped) of the views of B images, height and width int64 [B]; None: padded crop."""
    boxes_of_views: list[list[list[int] | None]] = []
    for (policy, members), table in zip(_runs(draws.views, params), draws.tables, strict=True):
        if plan_of(policy, params).resized:
            boxes = boxes_of(table[..., :CHANCES], height, width, params.crop_scale)
            boxes_of_views += torch.cat([boxes, table[..., CHANCES, None].long()], -1).tolist()
        else:
            boxes_of_views += [[None] * len(height)] * members
    return list(zip(*boxes_of_views, strict=True))


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Context in which torch uses one thread, for the CPU; no change for another device."""
    # Augmentation is some hundred small operations. On idle cores several threads save a few ms; on busy cores they
    # wait for one another by spinning, which takes a hundred times as long as the operations.
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _runs(views: int, params: AugmentParams) -> list[tuple[str, int]]:
    # (policy, number of views); views of the same policy share a table and a pass.
    contrast = params.policy if params.contrast_policy == "same" else params.contrast_policy
    if views == 1 or contrast == params.policy:
        return [(params.policy, views)]
    return [(params.policy, 1), (contrast, views - 1)]


def _draw_table(
    policy: str, count: int, height: int, width: int, params: AugmentParams, generator: torch.Generator
) -> Tensor:
    plan = plan_of(policy, params)
    columns: list[Tensor] = []
    if plan.resized:
        columns += draw_chances(count, generator).unbind(1)
    else:
        columns += torch.randint(2 * params.crop_padding + 1, (2, count), generator=generator).unbind(0)
    columns.append(torch.randint(2 if params.flip else 1, (count,), generator=generator))
    for slot, (code, value) in zip(
        plan.slots, draw_slots(policy, count, height, width, params, generator), strict=True
    ):
        columns += [code, value]
        if is_geometric(slot):
            columns += _matrices(code, value, height, width).unbind(1)
            if params.bicubic:
                columns.append(draw_bicubic(policy, code, generator))
    if plan.cutout:
        columns.append(torch.randint(height, (count,), generator=generator))
        columns.append(torch.randint(width, (count,), generator=generator))
    return torch.stack([column.double() for column in columns], 1)


def _matrices(code: Tensor, value: Tensor, height: int, width: int) -> Tensor:
    # Of every image; matrices of images without a geometric operation are not used.
    matrices = fixed_matrix("translate_x", torch.zeros_like(value), height, width)
    for name in AFFINE:
        matrices = torch.where((code == CODE[name])[:, None], fixed_matrix(name, value, height, width), matrices)
    return matrices


def _apply_table(images: Tensor, table: Tensor, plan: Plan, params: AugmentParams) -> Tensor:
    cropped = _cropped(images, table, plan, params)
    columns = iter(table[..., CHANCES + 1 if plan.resized else 3 :].unbind(-1))
    batch = cropped.flatten(0, 1)
    for slot in plan.slots:
        code, value = next(columns).flatten().long(), next(columns).flatten().float()
        matrix = bicubic = None
        if is_geometric(slot):
            matrix = torch.stack([next(columns).flatten() for _ in range(6)], 1).long()
            bicubic = next(columns).flatten().bool() if params.bicubic else None
        batch = apply_slot(
            batch, code, value, matrix, possible=slot, fill=plan.fill, method=plan.method, bicubic=bicubic
        )
    if plan.cutout:
        row, column = next(columns).flatten().long(), next(columns).flatten().long()
        batch = cutout(batch, row, column, plan.cutout, params.fill)
    return batch.view_as(cropped)


def _cropped(images: Tensor, table: Tensor, plan: Plan, params: AugmentParams) -> Tensor:
    # uint8 [V,B,3,H,W] from images [B,3,H,W], or from [V,B,3,H,W] if each view has its own pixels.
    if plan.resized:
        if images.dim() == 5:
            return images.clone(memory_format=torch.contiguous_format)  # cloned, because operations may work in place
        height, width = (torch.full((), side, dtype=torch.int64, device=images.device) for side in images.shape[2:])
        box = boxes_of(table[..., :CHANCES], height, width, params.crop_scale)
        return resized_crop(images, box, table[..., CHANCES].bool())
    top, left, flipped = table[..., 0].long(), table[..., 1].long(), table[..., 2].bool()
    if images.dim() == 4:
        return padded_crop(images, top, left, flipped, params.crop_padding, params.fill)
    top, left, flipped = (column.flatten()[None] for column in (top, left, flipped))
    return padded_crop(images.flatten(0, 1), top, left, flipped, params.crop_padding, params.fill).view_as(images)
