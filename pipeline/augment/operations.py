"""Augmentation operations by name, and the application of a policy slot in which every image has its own operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipeline.augment.affine import AFFINE, Method, resample
from pipeline.augment.lookup import LOOKUP, apply_tables
from pipeline.augment.pixels import blurred, coloured, grey_only, sharpened

IDENTITY = "identity"
OPERATIONS = (IDENTITY, *AFFINE, *LOOKUP, "color", "sharpness", "grey", "blur")
CODE = {name: code for code, name in enumerate(OPERATIONS)}

PIXELS: dict[str, Callable[[Tensor, Tensor], Tensor]]
PIXELS = {"color": coloured, "sharpness": sharpened, "grey": grey_only, "blur": blurred}


def apply_slot(
    images: Tensor,
    code: Tensor,
    value: Tensor,
    matrix: Tensor | None,
    *,
    possible: tuple[str, ...],
    fill: tuple[int, int, int],
    method: Method,
    bicubic: Tensor | None = None,
) -> Tensor:
    """Apply operation OPERATIONS[code[i]] with argument value[i] to image i of uint8 [N,3,H,W]; may work in place.

    code int64 [N]; value float32 [N], in the operation's unit (a factor, pixels, degrees, bits, a threshold, a radius);
    matrix int64 [N,6] from `affine.fixed_matrix`, required if the slot has a geometric operation. `possible`: the
    operations of the slot; no others are computed. method: interpolation of geometric operations; bicubic: bool [N],
    the images that use bicubic interpolation instead. An image has only one operation per slot, so the kinds of
    operations can run in sequence.
    """
    lookups = [name for name in possible if name in LOOKUP]
    if lookups:
        chosen = _is_any(code, lookups)
        images = replaced(images, chosen, lambda *rows: _apply_lookups(lookups, *rows), images, code, value)
    if matrix is not None:
        chosen = _is_any(code, [name for name in possible if name in AFFINE])
        passes = [(chosen, method)] if bicubic is None else [(chosen & ~bicubic, method), (chosen & bicubic, "bicubic")]
        for rows, by in passes:
            images = replaced(images, rows, partial(resample, fill=fill, method=by), images, matrix)
    for name in possible:
        if name in PIXELS:
            images = replaced(images, code == CODE[name], PIXELS[name], images, value)
    return images


def replaced(state: Tensor, chosen: Tensor, change: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Replace the rows of `state` where `chosen` (bool [N]) by change(*inputs); all first dimensions are N.

    On the CPU only the chosen rows are computed, in place.
    """
    if computes_all_rows(state.device):
        return torch.where(chosen.view(-1, *(1,) * (state.dim() - 1)), change(*inputs), state)
    rows = chosen.nonzero().squeeze(1)
    if len(rows):
        changed = change(*(tensor.index_select(0, rows) for tensor in inputs))
        _in_words(state).index_copy_(0, rows, _in_words(changed.contiguous()))
    return state


def computes_all_rows(device: torch.device) -> bool:
    """Whether to compute every row and then select, so that shapes are static and nothing is copied to the host.

    Not on the CPU: there computing unneeded rows is expensive, and reading a mask needs no copy.
    """
    return device.type != "cpu"


def _in_words(tensor: Tensor) -> Tensor:
    # View rows as 8-byte words if possible: index_copy_ handles one element at a time, whatever its width.
    rows = tensor.flatten(1)
    return rows.view(torch.int64) if rows.shape[1] * rows.element_size() % 8 == 0 else rows


def _apply_lookups(names: list[str], images: Tensor, code: Tensor, value: Tensor) -> Tensor:
    tables = torch.arange(256, dtype=torch.uint8, device=images.device).repeat(len(images), 3, 1)
    for name in names:
        tables = replaced(tables, code == CODE[name], LOOKUP[name], images, value)
    return apply_tables(images, tables)


def _is_any(code: Tensor, names: list[str]) -> Tensor:
    chosen = code == CODE[names[0]]
    for name in names[1:]:
        chosen = chosen | (code == CODE[name])
    return chosen
