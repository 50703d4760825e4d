"""Autocast exceptions: float32 for norms, softmax and losses inside a network that computes in bfloat16."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def full_precision(values: Tensor) -> Tensor:
    """Convert bfloat16 and float16 to float32; float32 and float64 are unchanged."""
    return values.float() if values.dtype in HALF else values


def without_autocast(values: Tensor) -> contextlib.AbstractContextManager[object]:
    """Context that disables autocast on the device of `values`: a cosine rounded to bfloat16 changes a logit by .1."""
    kind = values.device.type
    available = torch.amp.autocast_mode.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else contextlib.nullcontext()
