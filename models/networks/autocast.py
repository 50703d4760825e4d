"""Where float32 is needed although the network around it computes in bfloat16: norms, softmax, losses."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def full_precision(values: Tensor) -> Tensor:
    """bfloat16 and float16 as float32; float32 and float64 as they are."""
    return values.float() if values.dtype in HALF else values


def without_autocast(values: Tensor) -> contextlib.AbstractContextManager[object]:
    """A block in which autocast is off on the device of `values`: a cosine rounded to bfloat16 is a logit wrong by .1."""
    kind = values.device.type
    available = torch.amp.autocast_mode.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else contextlib.nullcontext()
