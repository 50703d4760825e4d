"""The operations by name, and one slot of a policy applied to a batch in which every image has its own operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipeline.augment.affine import AFFINE, Method, resample
from pipeline.augment.lookup import LOOKUP, look_up
from pipeline.augment.pixels import blurred, coloured, grey_only, sharpened

IDENTITY = "identity"
OPERATIONS = (IDENTITY, *AFFINE, *LOOKUP, "color", "sharpness", "grey", "blur")
CODE = {name: code for code, name in enumerate(OPERATIONS)}

PIXELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": coloured,
    "sharpness": sharpened,
    "grey": grey_only,
    "blur": blurred,
}


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
    """uint8 [N,3,H,W] → the same, image i changed by operation OPERATIONS[code[i]] with argument value[i]; may work in place.

    code int64 [N]; value float32 [N], in the operation's own unit (a factor, pixels, degrees, bits, a threshold, a
    radius); matrix int64 [N,6] as of `affine.fixed_matrix`, needed where the slot has a geometric operation. `possible`
    names what the slot may hold, so that nothing else costs anything. method: how geometric operations find a value between
    pixels; bicubic: bool [N], of which images they are bicubic instead. The operations of one slot exclude each other,
    hence the families may run one after the other.
    """
    lookups = [name for name in possible if name in LOOKUP]
    if lookups:
        chosen = _is_any(code, lookups)
        images = replaced(images, chosen, lambda *rows: _looked_up(lookups, *rows), images, code, value)
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
    """`state` with its rows where `chosen` (bool [N]) replaced by those of change(*inputs); all first axes are N.

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
    """Whether to compute every row and then select, so that shapes are static and the host is never asked.

    On the CPU it is not worth it: there arithmetic is dear and looking at a mask is free.
    """
    return device.type != "cpu"


def _in_words(tensor: Tensor) -> Tensor:
    # Rows as 8-byte words where they divide into such: index_copy_ takes a step per element, whatever its width.
    rows = tensor.flatten(1)
    return rows.view(torch.int64) if rows.shape[1] * rows.element_size() % 8 == 0 else rows


def _looked_up(names: list[str], images: Tensor, code: Tensor, value: Tensor) -> Tensor:
    tables = torch.arange(256, dtype=torch.uint8, device=images.device).repeat(len(images), 3, 1)
    for name in names:
        tables = replaced(tables, code == CODE[name], LOOKUP[name], images, value)
    return look_up(images, tables)


def _is_any(code: Tensor, names: list[str]) -> Tensor:
    chosen = code == CODE[names[0]]
    for name in names[1:]:
        chosen = chosen | (code == CODE[name])
    return chosen
