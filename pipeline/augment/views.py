"""Views of a batch: every random number drawn on the CPU, then applied to all views in one pass on the images' device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.augment.affine import AFFINE, fixed_matrix
from pipeline.augment.crops import cutout, draw_boxes, padded_crop, resized_crop
from pipeline.augment.operations import CODE, apply_slot
from pipeline.augment.policies import Plan, draw_bicubic, draw_slots, plan_of
from pipeline.params import AugmentParams


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch's views: a table float64 [views,B,columns] for each run of views with one policy.

    Columns are, in this order: the crop (top, left; of a resized crop also height, width), the flip, for each slot
    its operation, argument and, where it may move pixels, matrix (six) and, with params.bicubic, whether it is bicubic, the
    hole's row and column. float64 holds
    the integers among them exactly. A table is all that a step needs: copy into it to replay a captured step.
    """

    tables: tuple[Tensor, ...]

    def rows(self, start: int, stop: int) -> Draws:
        """The draws of images start..stop of each view, a rank's share of a global batch."""
        return Draws(tuple(table[:, start:stop] for table in self.tables))

    def to(self, device: torch.device | str) -> Draws:
        """The same on a device; to a GPU without waiting for it."""
        device = torch.device(device)
        pinned = (table.pin_memory() if device.type == "cuda" and not table.is_cuda else table for table in self.tables)
        return Draws(tuple(table.to(device, non_blocking=True) for table in pinned))


def draw_views(
    count: int, height: int, width: int, views: int, params: AugmentParams, generator: torch.Generator
) -> Draws:
    """Independent draws for `views` views of `count` images of height x width, from and on the CPU.

    View 0 is the classifier view (params.policy), the others are contrast views (params.contrast_policy).
    """
    with _one_thread(torch.device("cpu")):
        tables = [
            _draw_table(policy, members * count, height, width, params, generator).view(members, count, -1)
            for policy, members in _runs(views, params)
        ]
    return Draws(tuple(tables))


def apply_views(images: Tensor, draws: Draws, params: AugmentParams) -> Tensor:
    """uint8 [B,3,H,W] → uint8 [views,B,3,H,W] by draws on the same device: crop and flip, policy, Cutout, in that order."""
    views = sum(len(table) for table in draws.tables)
    with _one_thread(images.device):
        parts = [
            _apply_table(images, table, plan_of(policy, params), params)
            for (policy, _), table in zip(_runs(views, params), draws.tables, strict=True)
        ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def random_views(images: Tensor, views: int, params: AugmentParams, generator: torch.Generator) -> Tensor:
    """uint8 [B,3,H,W] → uint8 [views,B,3,H,W] by fresh draws from a CPU generator."""
    count, _, height, width = images.shape
    draws = draw_views(count, height, width, views, params, generator)
    return apply_views(images, draws.to(images.device), params)


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    # Some hundred small operations: threads that meet after each save a few ms on idle cores, and on busy ones, where
    # they wait for one another by spinning, cost a hundred times what the operations do.
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
    # (policy, number of views): what has the same policy shares a table and a pass.
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
        columns += draw_boxes(count, height, width, params.crop_scale, generator).unbind(1)
    else:
        columns += torch.randint(2 * params.crop_padding + 1, (2, count), generator=generator).unbind(0)
    columns.append(torch.randint(2 if params.flip else 1, (count,), generator=generator))
    for slot, (code, value) in zip(
        plan.slots, draw_slots(policy, count, height, width, params, generator), strict=True
    ):
        columns += [code, value]
        if slot.geometric:
            columns += _matrices(code, value, height, width).unbind(1)
            if params.bicubic:
                columns.append(draw_bicubic(policy, code, generator))
    if plan.cutout:
        columns.append(torch.randint(height, (count,), generator=generator))
        columns.append(torch.randint(width, (count,), generator=generator))
    return torch.stack([column.double() for column in columns], 1)


def _matrices(code: Tensor, value: Tensor, height: int, width: int) -> Tensor:
    # Of every image, geometric or not; the others' are never looked at.
    matrices = fixed_matrix("translate_x", torch.zeros_like(value), height, width)
    for name in AFFINE:
        matrices = torch.where((code == CODE[name])[:, None], fixed_matrix(name, value, height, width), matrices)
    return matrices


def _apply_table(images: Tensor, table: Tensor, plan: Plan, params: AugmentParams) -> Tensor:
    columns = iter(table.unbind(-1))
    corner = [next(columns).long() for _ in range(4 if plan.resized else 2)]
    flipped = next(columns).bool()
    if plan.resized:
        cropped = resized_crop(images, torch.stack(corner, -1), flipped)
    else:
        cropped = padded_crop(images, corner[0], corner[1], flipped, params.crop_padding)
    batch = cropped.flatten(0, 1)
    for slot in plan.slots:
        code, value = next(columns).flatten().long(), next(columns).flatten().float()
        matrix = bicubic = None
        if slot.geometric:
            matrix = torch.stack([next(columns).flatten() for _ in range(6)], 1).long()
            bicubic = next(columns).flatten().bool() if params.bicubic else None
        batch = apply_slot(
            batch, code, value, matrix, possible=slot.possible, fill=plan.fill, method=plan.method, bicubic=bicubic
        )
    if plan.cutout:
        batch = cutout(batch, next(columns).flatten().long(), next(columns).flatten().long(), plan.cutout)
    return batch.view_as(cropped)
