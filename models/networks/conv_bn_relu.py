"""Convolution, batch norm, shortcut and ReLU with few passes over memory, for residual networks.

Every operation after the convolution works in place if no gradient needs its input. In a frozen network (evaluation
mode, no gradients) batch norm is a scale and a shift of the convolution's output, so on the CPU it is folded into the
convolution's weights. Folding is repeated at every call (2 ms for a ResNet-56), so that no cached weights can be out of
date.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm  # BatchNorm2d and other subclasses, equal in evaluation mode


def conv_bn_relu(x: Tensor, conv: nn.Conv2d, norm: BatchNorm, shortcut: Tensor | None = None) -> Tensor:
    """relu(norm(conv(x)) + shortcut): x [B,in,H,W]; shortcut: the result's shape or None. conv has no bias.

    Bit-identical to the four operations in training; equal up to rounding if frozen on the CPU.
    """
    out = _folded(x, conv, norm) if _frozen_on_cpu(x, norm) else norm(conv(x))
    if shortcut is not None:
        out = out.add_(shortcut)
    return F.relu(out, inplace=True)


def _frozen_on_cpu(x: Tensor, norm: BatchNorm) -> bool:
    # A compiled or exported graph keeps the norm, because its compiler folds it.
    return not (torch.is_grad_enabled() or norm.training or torch.compiler.is_compiling()) and x.device.type == "cpu"


def _folded(x: Tensor, conv: nn.Conv2d, norm: BatchNorm) -> Tensor:
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    bias = norm.bias - mean * scale
    return F.conv2d(
        x, conv.weight * scale[:, None, None, None], bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )
